"""What a run trains on, as the training loop sees it: batches, their loss, and a validation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Problem"]


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

    def batches(self, epoch: int, seed: int) -> Iterable[Any]:
        """The batches of an epoch, from 0; ``seed`` is of the epoch and this process."""
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
