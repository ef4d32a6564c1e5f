"""What a run trains on, as the training loop sees it: batches, their loss, and a validation."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from refold.errors import DataError
from refold.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.data.loader import Order, PlannedLoader
    from refold.data.streams import StreamLoader

__all__ = ["LoadedProblem", "Problem", "one_of", "training_order"]


class Problem(Protocol):
    """Data, loss and metrics of one kind of task.

    Attributes:
        images: how many are in the training set.
        steps: batches of an epoch.
        select: the validation metric that chooses the best epoch.
        facts: what a resumed run must have in common with the run it goes on from.
    """

    images: int
    steps: int
    select: str
    facts: dict[str, Any]

    def batches(self, epoch: int, seed: int, start: int = 0, state: dict[str, Any] | None = None) -> Iterable[Any]:
        """The batches of an epoch, from 0.

        Args:
            epoch: which.
            seed: of the epoch and this process.
            start: batches to leave out, which a run that is resumed has seen.
            state: what :meth:`state` said after them.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What going on in the middle of an epoch needs beside the number of batches: tensors and plain data."""
        ...

    def step(self) -> AbstractContextManager[Any]:
        """Around a training step, the backward pass included."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, on the training device; ``model`` may be wrapped for several processes."""
        ...

    def validate(self) -> dict[str, float] | None:
        """Metrics on the validation set, ``loss`` among them where there is one; None without such a set."""
        ...

    def try_step(self, size: int) -> Any:
        """Run the model forward as in a step, on noise of a batch of ``size``; for measuring."""
        ...


class LoadedProblem:
    """The parts of a :class:`Problem` that follow from a loader of its training set.

    Args:
        loader: of this process.
        train_set, val_set: for their numbers of images; None is no validation set.
        classes: names, None for numbers.
    """

    def __init__(
        self,
        loader: PlannedLoader | StreamLoader,
        train_set: Sized,
        val_set: Sized | None,
        classes: list[str] | None,
    ) -> None:
        self.loader = loader
        self.images, self.steps = len(train_set), len(loader)
        self.facts: dict[str, Any] = {
            "training images": len(train_set),
            "validation images": 0 if val_set is None else len(val_set),
            "classes": classes,
        }

    def batches(self, epoch: int, seed: int, start: int = 0, state: dict[str, Any] | None = None) -> Iterable[Any]:
        self.loader.set_epoch(epoch, start, None if state is None else state["loader"])
        return self.loader

    def state(self) -> dict[str, Any]:
        return {"loader": self.loader.state()}

    def step(self) -> AbstractContextManager[Any]:
        return nullcontext()


def training_order(recipe: Recipe, count: int, accelerator: Accelerator) -> Order:
    """How a loader of ``count`` training images makes this process's batches: shuffled, full ones where there are.

    Raises:
        DataError: a step cannot be divided into ``recipe.accumulate`` equal batches.
    """
    parts = recipe.accumulate
    if parts > 1 and (recipe.batch_size % (parts * accelerator.num_processes) or count < recipe.batch_size):
        raise DataError(
            f"a step of {recipe.batch_size} out of {count} images is not divided into {parts} equal batches on each of "
            f"{accelerator.num_processes} processes",
            where="accumulate",
            remedy="Choose batch_size as a multiple of both, and of at most all images",
        )
    return {
        "batch_size": recipe.batch_size // parts,
        "shuffle": True,
        "drop_last": count >= recipe.batch_size,
        "seed": recipe.seed,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
    }


def one_of(recipe: Recipe, metrics: tuple[str, ...]) -> str:
    """The metric that chooses the best epoch: the recipe's, or the first.

    Raises:
        DataError: the recipe's is not among them.
    """
    chosen = recipe.select or metrics[0]
    if chosen not in metrics:
        raise DataError(f"{chosen!r} is no metric here", where="select", remedy=f"Known: {', '.join(metrics)}")
    return chosen
