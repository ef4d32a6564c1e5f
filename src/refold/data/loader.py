"""Batches of normalised images, the same for the same seed and epoch, whatever the machine does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from refold.data.augmentation import Augmentation, make_augmentation
from refold.data.images import ImageSet
from refold.data.normalize import Normalize
from refold.data.parallel import available_cpus, one_torch_thread
from refold.data.randomness import generator
from refold.errors import DataError
from refold.preprocessing import Preprocessing

__all__ = ["Loader", "Order", "Plan", "PlannedLoader", "Plans"]

Plan = tuple[Tensor, Tensor]  # (B,) indices into the image set, and (B, columns) random numbers


class Order(TypedDict, total=False):
    """Which images make a batch, and how they look: what a loader's caller chooses.

    Attributes:
        batch_size: images of a step, over all processes together; a multiple of ``world``.
        shuffle: a new order every epoch, as for training.
        drop_last: leave out the images of a last batch that is not full.
        seed: of order and augmentation.
        rank, world: this process and how many there are.
        views: how many different augmentations an image has; epochs use them in turn. None, the default, is a new one
            every epoch.
    """

    batch_size: Required[int]
    shuffle: bool
    drop_last: bool
    seed: int
    rank: int
    world: int
    views: int | None


class PlannedLoader(ABC):
    """Batches that are a function of (seed, epoch, sample) alone, read in this process or ahead in others.

    Args:
        batches: what reads a batch, given its plan; a DataError that it returns is raised here.
        plans: what the batches consist of.
        workers: processes that read ahead; at most the CPUs there are. 0 does it in this process.

    Raises:
        DataError: fewer workers than none.
    """

    def __init__(self, batches: Dataset[Any], plans: Plans, workers: int) -> None:
        if workers < 0:
            raise DataError(f"must be 0 or more, not {workers}", where="workers")
        self._plans = plans
        self.set_epoch(0)
        processes = min(workers, available_cpus())
        self._loader = DataLoader(
            batches,
            sampler=plans,
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

    @property
    def keys(self) -> list[list[tuple[int, int]]]:
        """(image, view) of each image of each batch of the coming epoch; see :class:`Order`."""
        return [[(index, self._plans.view) for index in indices.tolist()] for indices, _ in self._plans]

    def state(self) -> dict[str, Any]:
        """Where the last batch ended, beside its number: nowhere else."""
        return {}

    def set_epoch(self, epoch: int, start: int = 0, state: dict[str, Any] | None = None) -> None:
        """Choose the epoch, from 0, of the next iteration, which leaves out its first ``start`` batches.

        Raises:
            DataError: a negative epoch.
        """
        generator(self._plans.seed, epoch, "order")  # complains about bad numbers now
        self._plans.epoch, self._plans.start, self._plans.spared = epoch, start, frozenset()

    def spare(self, batches: Iterable[int]) -> None:
        """Leave these out of the coming epoch as well, counted from the first that it would have."""
        self._plans.spared = frozenset(batches)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            with one_torch_thread():
                batch = next(batches, None)
                if batch is None:
                    return
                if isinstance(batch, DataError):
                    raise batch
                batch = self._finish(batch)
            yield batch

    @abstractmethod
    def _finish(self, batch: Any) -> Any:
        """What is done to a batch in this process."""


class Loader(PlannedLoader):
    """Iterate over ``(images, targets)``: (B, C, H, W) float32 normalised, and the targets of those images.

    Images are decoded once, here and now, if they fit in memory (:meth:`ImageSet.hold`), else at every pass. Order
    and augmentation are a function of (seed, epoch, sample) alone: they do not depend on batch size, number of
    processes, workers or caching, and neither read nor change the global random state. To resume after epoch 3 is
    ``set_epoch(3)``, and after 50 batches of the next ``set_epoch(3, 50)``.

    With several processes each takes its share of every batch. Shuffled, all have equally many images in each
    batch: the last one is filled up from the front of the order. Not shuffled, every image comes exactly once, and
    processes may differ by one image (and so by one batch).

    Args:
        image_set: what to read.
        preprocessing: evaluation preprocessing; has 1 or 3 channels. One-channel sets are repeated for three.
        augment: ``"none"``, ``"flip"``, ``"light"``, ``"randaugment"`` or a policy of timm, see
            :mod:`refold.data.augmentation`; None is ``"none"``.
        workers: processes that read ahead, where images are decoded at every pass or augmented one by one; at most
            the CPUs there are. 0 does it in this process.
        order: the fields of :class:`Order`, of which ``batch_size`` is needed.

    Raises:
        DataError: an argument out of range, an empty loader, or a file that cannot be decoded.
    """

    def __init__(
        self,
        image_set: ImageSet,
        preprocessing: Preprocessing,
        *,
        augment: str | None = None,
        workers: int = 0,
        **order: Unpack[Order],
    ) -> None:
        self._image_set, self._normalize = image_set, Normalize(preprocessing)
        self._augmentation = make_augmentation(augment, preprocessing, min(image_set.channels, preprocessing.channels))
        plans = Plans(count=len(image_set), columns=self._augmentation.columns, **order)
        if image_set.hold(self._augmentation.rendering) and not self._augmentation.slow:
            workers = min(workers, 0)  # nothing to read ahead
        super().__init__(_Batches(image_set, self._augmentation), plans, workers)

    def _finish(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, indices, randomness = batch
        images = self._augmentation.finish(self._normalize(images), randomness)
        return images, self._image_set.targets[indices]


@dataclass(eq=False, kw_only=True)
class Plans(Sampler[Plan]):
    """What each batch of this process consists of: :class:`Order` of ``count`` images, with ``columns`` random numbers.

    Raises:
        DataError: an argument out of range, or no image.
    """

    count: int
    columns: int
    batch_size: int
    shuffle: bool = False
    drop_last: bool = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    views: int | None = None
    epoch: int = 0
    start: int = 0
    spared: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise DataError(f"must be at least 0 and under world ({self.world}), not {self.rank}", where="rank")
        if self.batch_size < 1 or self.batch_size % self.world:
            raise DataError(
                f"must be a positive multiple of {self.world} processes, not {self.batch_size}", where="batch_size"
            )
        if self.views is not None and self.views < 1:
            raise DataError(f"must be 1 or more, not {self.views}", where="views")
        if not self.count:
            raise DataError("the image set is empty", where="image_set")
        if self.drop_last and self.count < self.batch_size:
            raise DataError(
                f"{self.count} images are no full batch of {self.batch_size}", where="batch_size", remedy="Lower it"
            )

    @property
    def view(self) -> int:
        """Which augmentation every image has in this epoch."""
        return self.epoch if self.views is None else self.epoch % self.views

    @property
    def total(self) -> int:
        """Images of one epoch, over all processes."""
        if self.drop_last:
            return self.count // self.batch_size * self.batch_size
        return -(-self.count // self.world) * self.world if self.shuffle else self.count

    def __len__(self) -> int:
        mine = len(range(self.rank, self.total, self.world))
        return -(-mine // (self.batch_size // self.world))

    def __iter__(self) -> Iterator[Plan]:
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=generator(self.seed, self.epoch, "order"))
        order = order[torch.arange(self.total) % self.count]
        source = generator(self.seed, self.view, "augmentation")
        draws = torch.rand(self.count, self.columns, dtype=torch.float64, generator=source)
        batches = order[self.rank :: self.world].split(self.batch_size // self.world)[self.start :]
        for number, indices in enumerate(batches):
            if len(indices) and number not in self.spared:
                yield indices, draws[indices]


class _Batches(Dataset[Any]):
    """Reads and augments one batch; in a worker process, or in this one."""

    def __init__(self, image_set: ImageSet, augmentation: Augmentation) -> None:
        self._image_set, self._augmentation = image_set, augmentation

    def __getitem__(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor] | DataError:
        indices, randomness = plan
        try:
            images = self._image_set.render(indices, self._augmentation.rendering)
        except DataError as error:  # raised by a worker, it would arrive wrapped in a traceback
            return error
        return self._augmentation(images, randomness), indices, randomness


def _as_it_is(batch: Any) -> Any:
    return batch
