"""Progress on the terminal: bars with the time left, of a run and its epochs, or of anything that is counted.

A call that takes long says with :func:`showing` whether its user wants bars; the loops below it, which many calls
share, are :func:`counting`. There is one bar at a time: what validates while a run's bars are shown has none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bars", "More", "counting", "show_count", "show_progress", "showing"]

_SHOWN: ContextVar[bool] = ContextVar("shown", default=False)


class More(Protocol):
    """Tells a bar that so many more are done."""

    def __call__(self, count: int = 1) -> None: ...


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
def showing(wanted: bool | None) -> Iterator[None]:
    """Whether loops inside show bars on standard error; None: where that is a terminal."""
    token = _SHOWN.set(_decide(wanted))
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def counting(what: str, *, total: int, main: bool = True) -> Iterator[More]:
    """A bar if :func:`showing` is on and no bar is there yet, and the function that tells it how many more are done.

    Args:
        what: the bar's name.
        total: how many there are.
        main: whether this process is the one that shows bars.
    """
    done = 0
    with show_count(main and _SHOWN.get(), what, total=total) as show:

        def more(count: int = 1) -> None:
            nonlocal done
            done = min(done + count, total)  # the shares of several processes may differ by one
            show(done)

        yield more


def _decide(wanted: bool | None) -> bool:
    return sys.stderr.isatty() if wanted is None else wanted


@contextmanager
def _bars(wanted: bool | None) -> Iterator[Progress | None]:
    if not _decide(wanted):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(
        *columns,
        console=Console(stderr=True),
        refresh_per_second=4,
        speed_estimate_period=3600,  # seconds: a step of a large model, or a pass over a set, takes its time
    )
    with showing(False), bars:
        yield bars
