"""Runs that are stopped between two steps, as a lost machine would."""

from __future__ import annotations

from typing import Any

import pytest

from refold.training import trainer

__all__ = ["Stopped", "interrupt_at"]


class Stopped(Exception):
    """What a stopped run raises."""


def interrupt_at(patch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Make the step of that number, counted from 1 over all runs from now on, raise; the list grows with each step."""
    step, made = trainer.Trainer._step, []

    def count(self: Any, *args: Any) -> Any:
        made.append(1)
        if len(made) == number:
            raise Stopped
        return step(self, *args)

    patch.setattr(trainer.Trainer, "_step", count)
    return made
