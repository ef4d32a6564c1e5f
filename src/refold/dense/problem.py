"""What segmentation and detection have in common as the training loop sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from refold.dense.cache import Key
from refold.training.problem import LoadedProblem

if TYPE_CHECKING:
    from refold.data.loader import PlannedLoader
    from refold.dense.features import Features

__all__ = ["DenseProblem"]


class DenseProblem(LoadedProblem):
    """A :class:`refold.training.problem.LoadedProblem` whose encoder may be fed with cached features.

    Its batches are (keys, batch): the (image, view) of each of the loader's images, and what the loader gives.

    Args:
        loader, train_set, val_set, classes: as there.
        features: prepared; None runs the backbone at every step.
    """

    def __init__(
        self,
        loader: PlannedLoader,
        train_set: Sized,
        val_set: Sized | None,
        classes: list[str],
        features: Features | None,
    ) -> None:
        super().__init__(loader, train_set, val_set, classes)
        self.planned, self.features = loader, features

    def batches(self, epoch: int, seed: int, start: int = 0, state: dict[str, Any] | None = None) -> Iterable[Any]:
        batches = super().batches(epoch, seed, start, state)
        return zip(self.planned.keys, batches, strict=True)

    def training(self, keys: Sequence[Key]) -> AbstractContextManager[None]:
        """Around the model's forward of a batch."""
        return nullcontext() if self.features is None else self.features.training(keys)

    def validating(self, number: int) -> AbstractContextManager[None]:
        """Around the model's forward of one validation image."""
        return nullcontext() if self.features is None else self.features.validating(number)
