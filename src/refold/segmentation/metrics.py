"""Scores of semantic segmentation from one confusion matrix over all pixels of a set.

    IoU_k = n_kk / (sum_j n_kj + sum_i n_ik - n_kk),  n_ij pixels of class i that are called j

``miou`` is the mean over the classes that occur in the masks or in the predictions; the others have no IoU. Pixel
accuracy (aAcc) is sum_k n_kk / sum_ij n_ij; mean accuracy (mAcc) the mean of n_kk / sum_j n_kj over the classes that
occur in the masks. Unlabelled pixels (255) count nowhere. As Pascal VOC and Cityscapes do, pixels are counted over the
whole set, not image by image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refold.errors import DataError
from refold.segmentation.labels import IGNORE

__all__ = ["PixelConfusion"]


class PixelConfusion:
    """A confusion matrix that grows batch by batch.

    Args:
        classes: names in the order of the class indices.

    Attributes:
        classes: as above.
        counts: (K, K) int64 on the CPU; rows are true classes, columns predicted ones. Sum it over processes.
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes = list(classes)
        self.counts = torch.zeros(len(classes), len(classes), dtype=torch.long)

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Count the labelled pixels of a batch.

        Args:
            predictions: class indices, any shape.
            masks: class indices of the same shape, 255 where unlabelled.

        Raises:
            DataError: shapes that differ, or an index that is no class.
        """
        size = len(self.classes)
        if predictions.shape != masks.shape:
            raise DataError(
                f"predictions of shape {tuple(predictions.shape)} and masks of {tuple(masks.shape)}", where="metrics"
            )
        labelled = masks != IGNORE
        truth, guess = masks[labelled].long(), predictions[labelled].long()
        for name, values in (("mask", truth), ("prediction", guess)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
                raise DataError(f"a {name} holds an index beyond the {size} classes", where="metrics")
        self.counts += torch.bincount(truth * size + guess, minlength=size * size).cpu().view(size, size)

    def metrics(self) -> dict[str, float]:
        """``miou``, ``pixel_accuracy`` and ``mean_accuracy``.

        Raises:
            DataError: no labelled pixel was counted.
        """
        hits, truths, union = self._parts()
        if not int(truths.sum()):
            raise DataError("there is no labelled pixel to score", where="metrics")
        return {
            "miou": float((hits / union)[union > 0].mean()),
            "pixel_accuracy": float(hits.sum() / truths.sum()),
            "mean_accuracy": float((hits / truths)[truths > 0].mean()),
        }

    def per_class(self) -> list[dict[str, Any]]:
        """Rows of ``class``, ``pixels`` (true ones), ``iou`` and ``accuracy``; None where a class has none."""
        hits, truths, union = self._parts()
        return [
            {
                "class": name,
                "pixels": int(truths[k]),
                "iou": float(hits[k] / union[k]) if union[k] else None,
                "accuracy": float(hits[k] / truths[k]) if truths[k] else None,
            }
            for k, name in enumerate(self.classes)
        ]

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Right pixels, true pixels, and the union of true and predicted ones, (K,) float64 each."""
        counts = self.counts.double()
        hits, truths = counts.diagonal(), counts.sum(dim=1)
        return hits, truths, truths + counts.sum(dim=0) - hits
