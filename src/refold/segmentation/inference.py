"""From a trained segmenter to class probabilities: the whole image, a sliding window, several scales and flips."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.errors import DataError
from refold.segmentation.metrics import PixelConfusion

__all__ = ["Inference", "evaluate"]


@dataclass(frozen=True)
class Inference:
    """How a model looks at an image.

    Attributes:
        window: (height, width) in pixels of a window that slides over the image, the crop the model was trained on;
            None for the whole image at once. An image smaller than the window is seen whole.
        stride: (rows, columns) between windows; None is two thirds of the window. The last window of a row or column
            ends at the image's edge; where windows overlap, logits are averaged.
        scales: the image is resized by each factor; probabilities are averaged.
        flip: every scale also mirrored.

    Raises:
        DataError: a size, stride or scale that is not positive, or a stride beyond the window.
    """

    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if self.window is not None and min(self.window) < 1:
            raise DataError(f"must be positive, not {self.window}", where="window")
        if self.stride is not None:
            if self.window is None:
                raise DataError("means nothing without a window", where="stride", remedy="Give window, too")
            if min(self.stride) < 1 or any(s > w for s, w in zip(self.stride, self.window, strict=True)):
                raise DataError(
                    f"must be 1 to the window's {self.window}, not {self.stride}",
                    where="stride",
                    remedy="Pixels between larger steps would never be seen",
                )
        if not self.scales or min(self.scales) <= 0:
            raise DataError(f"must be positive factors, not {self.scales}", where="scales")

    @torch.no_grad()
    def __call__(self, model: nn.Module, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Probabilities (B, K, H, W), in float32.

        Args:
            model: images (B, C, h, w) -> logits (B, K, h, w) at any size; in evaluation mode.
            images: normalised.
            size: (H, W) wanted; None is the images' own.

        Raises:
            DataError: the model is in training mode, or cannot take images of this size.
        """
        if model.training:
            raise DataError("the model is in training mode", where="inference", remedy="Call model.eval() first")
        size = size or (images.shape[-2], images.shape[-1])
        views = [(scale, mirrored) for scale in self.scales for mirrored in ((False, True) if self.flip else (False,))]
        total: Tensor | None = None
        for scale, mirrored in views:
            view = images if scale == 1 else _resize(images, _scaled(images, scale))
            logits = self._logits(model, view.flip(-1) if mirrored else view)
            # Resized before the softmax: averages of logits between pixels, as in the training loss.
            scores = _resize(logits.flip(-1) if mirrored else logits, size).softmax(dim=1)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total.div_(len(views))

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, K, h, w) float32 of images (B, C, h, w), whole or window by window."""
        height, width = images.shape[-2:]
        if self.window is None or (height <= self.window[0] and width <= self.window[1]):
            return model(images).float()
        rows, columns = self.window
        steps = self.stride or (-(-rows * 2 // 3), -(-columns * 2 // 3))
        places = [
            (..., slice(top, top + rows), slice(left, left + columns))
            for top in _starts(height, rows, steps[0])
            for left in _starts(width, columns, steps[1])
        ]
        first = model(images[places[0]]).float()
        total = first.new_zeros((*first.shape[:2], height, width))
        seen = first.new_zeros((1, 1, height, width))
        for place in places:
            total[place] += first if place is places[0] else model(images[place]).float()
            seen[place] += 1
        return total.div_(seen)


def evaluate(
    model: nn.Module,
    pairs: Iterable[tuple[Tensor, Tensor]],
    classes: list[str],
    inference: Inference | None = None,
    device: torch.device | str = "cpu",
    around: Callable[[int], AbstractContextManager[Any]] | None = None,
) -> PixelConfusion:
    """Confusion of a model's predictions, at the size of each mask.

    Args:
        model: a segmenter in evaluation mode, on ``device``.
        pairs: images (B, C, h, w) and masks (B, H, W), such as :func:`refold.segmentation.evaluation_pairs`.
        classes: names in the order of the logits.
        inference: None sees whole images, at one scale.
        around: what the model runs in, given the number of the pair from 0.

    Raises:
        DataError: as :class:`Inference` and :meth:`PixelConfusion.update`.
    """
    inference = inference or Inference()
    confusion = PixelConfusion(classes)
    for k, (images, masks) in enumerate(pairs):
        with nullcontext() if around is None else around(k):
            scores = inference(model, images.to(device), (masks.shape[-2], masks.shape[-1]))
        confusion.update(scores.argmax(dim=1), masks.to(device))
    return confusion


def _starts(length: int, window: int, step: int) -> list[int]:
    """First pixels of the windows over ``length`` pixels; the last window ends at the edge."""
    last = max(length - window, 0)
    return [*range(0, last, step), last]


def _scaled(images: Tensor, scale: float) -> tuple[int, int]:
    return max(round(images.shape[-2] * scale), 1), max(round(images.shape[-1] * scale), 1)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
