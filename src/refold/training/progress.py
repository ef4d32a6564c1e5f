"""Progress on the terminal: two bars, the whole run and the epoch, each with the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bars", "show_progress"]


class Bars:
    """What the loop reports to; does nothing without a terminal."""

    def __init__(self, progress: Progress | None, run: TaskID | None, epoch: TaskID | None, epochs: int) -> None:
        self._progress, self._run, self._epoch, self._epochs = progress, run, epoch, epochs

    def start_epoch(self, number: int, steps: int) -> None:
        """Begin epoch ``number`` (from 1) of ``steps`` steps."""
        if self._progress is not None and self._epoch is not None:
            self._progress.reset(self._epoch, total=steps, description=f"epoch {number}/{self._epochs}")

    def step(self) -> None:
        """One optimizer step is done."""
        if self._progress is not None and self._run is not None and self._epoch is not None:
            self._progress.advance(self._run)
            self._progress.advance(self._epoch)


@contextmanager
def show_progress(wanted: bool | None, *, epochs: int, steps: int, done: int) -> Iterator[Bars]:
    """Bars on standard error.

    Args:
        wanted: None shows them where standard error is a terminal.
        epochs: of the whole run.
        steps: of the whole run.
        done: steps already made by an earlier start of the same run.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield Bars(None, None, None, epochs)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        run = progress.add_task("training", total=steps, completed=done)
        epoch = progress.add_task("epoch", total=None)
        yield Bars(progress, run, epoch, epochs)
