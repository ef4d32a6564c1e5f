"""Batches for torchvision's detectors, the same for the same seed and epoch, whatever the machine does."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.utils.data import Dataset

from refold.data.loader import Order, Plan, PlannedLoader, Plans
from refold.detection.augmentation import BoxAugmentation
from refold.detection.boxes import BoxSet
from refold.errors import DataError

__all__ = ["BoxLoader"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class BoxLoader(PlannedLoader):
    """Iterate over ``(images, targets)``, lists: images (3, H, W) float32 in [0, 1], and :meth:`BoxSet.target`.

    Images are decoded at every pass; sizes differ. Order and augmentation are a function of (seed, epoch, image)
    alone, and processes share the batches, as with :class:`refold.data.Loader`.

    Args:
        box_set: what to read.
        augment: one of :data:`refold.detection.augmentation.AUGMENTATIONS`; None is ``"none"``.
        workers: processes that read ahead, at most the CPUs there are. 0 does it in this process.
        order: as for :class:`refold.data.Loader`.

    Raises:
        DataError: an argument out of range, an empty loader, or a file that cannot be decoded.
    """

    def __init__(
        self, box_set: BoxSet, *, augment: str | None = None, workers: int = 0, **order: Unpack[Order]
    ) -> None:
        plans = Plans(count=len(box_set), columns=1, **order)  # the column: seeds of the augmentation
        super().__init__(_Batches(box_set, BoxAugmentation(augment)), plans, workers)

    def _finish(self, batch: Batch) -> Batch:
        images, targets = batch
        return [image.float().div_(255) for image in images], targets


class _Batches(Dataset[Any]):
    """Reads and augments one batch; in a worker process, or in this one."""

    def __init__(self, box_set: BoxSet, augmentation: BoxAugmentation) -> None:
        self._box_set, self._augmentation = box_set, augmentation

    def __getitem__(self, plan: Plan) -> Batch | DataError:
        indices, randomness = plan
        seeds = (randomness[:, 0] * 2**32).long().tolist()
        try:
            found = [
                self._augmentation(self._box_set.read(index), self._box_set.target(index), seed)
                for index, seed in zip(indices.tolist(), seeds, strict=True)
            ]
        except DataError as error:  # raised by a worker, it would arrive wrapped in a traceback
            return error
        return [image for image, _ in found], [target for _, target in found]
