"""The pixel-wise cross-entropy that segmentation models are trained with."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from refold.segmentation.labels import IGNORE

__all__ = ["segmentation_loss"]


def segmentation_loss(
    outputs: Tensor | Sequence[Tensor], masks: Tensor, *, weights: Tensor | None = None, auxiliary: float = 0.4
) -> Tensor:
    """Mean cross-entropy over the labelled pixels; zero, with zero gradients, for a batch without any.

    Args:
        outputs: logits (B, K, H, W), or a list of them: the main ones, then those of auxiliary heads.
        masks: class indices (B, H, W), 255 where a pixel has no label.
        weights: of the classes, (K,); the mean is a weighted one.
        auxiliary: weight of each auxiliary head's loss; 0.4 is PSPNet's and SETR's.
    """
    main, *others = [outputs] if isinstance(outputs, Tensor) else outputs
    masks = masks.long()
    loss = _mean(main, masks, weights)
    for logits in others:
        loss = loss + auxiliary * _mean(logits, masks, weights)
    return loss


def _mean(logits: Tensor, masks: Tensor, weights: Tensor | None) -> Tensor:
    logits = logits.float()
    if not bool((masks != IGNORE).any()):  # the mean over nothing would be NaN
        return logits.sum() * 0.0
    return F.cross_entropy(logits, masks, weight=weights, ignore_index=IGNORE)
