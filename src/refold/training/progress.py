"""Progress on the terminal: bars with the time left, of a run and its epochs, or of anything that is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bars", "show_count", "show_progress"]


class Bars:
    """What the loop reports to; does nothing without a terminal."""

    def __init__(self, progress: Progress | None, run: TaskID | None, epoch: TaskID | None, epochs: int) -> None:
        self._progress, self._run, self._epoch, self._epochs = progress, run, epoch, epochs

    def start_epoch(self, number: int, steps: int, done: int = 0) -> None:
        """Begin epoch ``number`` (from 1) of ``steps`` steps, of which ``done`` are made."""
        if self._progress is not None and self._epoch is not None:
            self._progress.reset(self._epoch, total=steps, completed=done, description=f"epoch {number}/{self._epochs}")

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
    with _bars(wanted) as progress:
        if progress is None:
            yield Bars(None, None, None, epochs)
            return
        run = progress.add_task("training", total=steps, completed=done)
        epoch = progress.add_task("epoch", total=None)
        yield Bars(progress, run, epoch, epochs)


@contextmanager
def show_count(wanted: bool | None, what: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """One bar on standard error, and the function that tells it how many of ``total`` are done.

    Args:
        wanted: as for :func:`show_progress`.
        what: the bar's name.
    """
    with _bars(wanted) as progress:
        if progress is None:
            yield lambda done: None
            return
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def _bars(wanted: bool | None) -> Iterator[Progress | None]:
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        yield progress
