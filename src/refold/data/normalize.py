"""From uint8 pixels to what a model takes."""

from __future__ import annotations

import torch
from torch import Tensor

from refold.data.decoding import MODES
from refold.errors import DataError
from refold.preprocessing import Preprocessing

__all__ = ["Normalize"]


class Normalize:
    """uint8 (B, C, H, W) -> float32 (B, channels, H, W), ``(x / 255 - mean) / std``; one channel becomes three.

    Args:
        preprocessing: has 1 or 3 channels.

    Raises:
        DataError: it has another number, which image files cannot give.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        if preprocessing.channels not in MODES:
            raise DataError(
                f"the model takes {preprocessing.channels} channels; image files give 1 or 3", where="preprocessing"
            )
        std = torch.tensor(preprocessing.std, dtype=torch.float64)[:, None, None]
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)[:, None, None]
        self._scale, self._shift = (1 / (255 * std)).float(), (-mean / std).float()

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self._shift, images.float(), self._scale)
