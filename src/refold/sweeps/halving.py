"""Successive halving: all trials train a little, and the best part of them goes on.

    rungs  r_k = grace * reduction^k  epochs, k = 0, 1, ..., below all epochs

Of the n trials at a rung the best floor(n / reduction), at least one, train on to the next. "Non-stochastic Best Arm
Identification and Hyperparameter Optimization" (arXiv 1502.07943); ASHA (arXiv 1810.05934) has the same rungs, and
decides before all have come to one, so that none of many workers waits. One worker waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

__all__ = ["halve", "rungs"]

T = TypeVar("T")


def rungs(epochs: int, grace: int, reduction: int) -> list[int]:
    """After how many epochs trials are compared."""
    found = []
    while grace < epochs:
        found.append(grace)
        grace *= reduction
    return found


def halve(trials: Sequence[T], score: Callable[[T, int], Any], *, epochs: int, grace: int, reduction: int) -> list[T]:
    """Train trials, fewer and fewer, and the last of them to the end.

    Args:
        trials: of equal scores the earlier is the better.
        score: trains a trial until so many epochs are done and says its worth then, more is better; None is a failure.
        epochs: of a whole run.
        grace: epochs of the first rung.
        reduction: one in so many goes on.

    Returns:
        those that were trained to the end.
    """
    alive = list(trials)
    for rung in rungs(epochs, grace, reduction):
        scored = [(value, trial) for trial in alive if (value := score(trial, rung)) is not None]
        scored.sort(key=lambda pair: pair[0], reverse=True)  # stable: of equals the earlier
        alive = [trial for _, trial in scored[: max(1, len(alive) // reduction)]]
    return [trial for trial in alive if score(trial, epochs) is not None]
