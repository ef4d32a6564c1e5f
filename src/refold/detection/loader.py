"""Batches for torchvision's detectors, the same for the same seed and epoch, whatever the machine does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refold.data.loader import Plan, Plans
from refold.data.parallel import available_cpus, one_torch_thread
from refold.data.randomness import generator
from refold.detection.augmentation import BoxAugmentation
from refold.detection.boxes import BoxSet
from refold.errors import DataError

__all__ = ["BoxLoader"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class BoxLoader:
    """Iterate over ``(images, targets)``, lists: images (3, H, W) float32 in [0, 1], and :meth:`BoxSet.target`.

    Images are decoded at every pass; sizes differ. Order and augmentation are a function of (seed, epoch, image)
    alone, and processes share the batches, as with :class:`refold.data.Loader`.

    Args:
        box_set: what to read.
        batch_size: images of a step, over all processes together; a multiple of ``world``.
        augment: one of :data:`refold.detection.augmentation.AUGMENTATIONS`; None is ``"none"``.
        shuffle: a new order every epoch, as for training.
        drop_last: leave out the images of a last batch that is not full.
        seed: of order and augmentation.
        rank, world: this process and how many there are.
        workers: processes that read ahead, at most the CPUs there are. 0 does it in this process.

    Raises:
        DataError: an argument out of range, an empty loader, or a file that cannot be decoded.
    """

    def __init__(
        self,
        box_set: BoxSet,
        *,
        batch_size: int,
        augment: str | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if workers < 0:
            raise DataError(f"must be 0 or more, not {workers}", where="workers")
        self._plans = Plans(
            count=len(box_set),
            columns=1,  # the seed of an image's augmentation
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            rank=rank,
            world=world,
        )
        self.set_epoch(0)
        processes = min(workers, available_cpus())
        self._loader = DataLoader(
            _Batches(box_set, BoxAugmentation(augment)),
            sampler=self._plans,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=processes,
            persistent_workers=processes > 0,
            generator=torch.Generator(),  # the default would draw from the global one
        )

    def __len__(self) -> int:
        """Batches of this process in one epoch."""
        return len(self._plans)

    @property
    def indices(self) -> Tensor:
        """(n,) int64: the images of this process in the coming epoch, in order."""
        return torch.cat([indices for indices, _ in self._plans])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, of the next iteration.

        Raises:
            DataError: a negative one.
        """
        generator(self._plans.seed, epoch, "order")  # complains about bad numbers now
        self._plans.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            with one_torch_thread():
                batch = next(batches, None)
                if batch is None:
                    return
                if isinstance(batch, DataError):
                    raise batch
                images, targets = batch
                images = [image.float().div_(255) for image in images]
            yield images, targets


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


def _as_it_is(batch: Any) -> Any:
    return batch
