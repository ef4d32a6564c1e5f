"""Many trainings on the terminal: a bar with the time left, and below it a table of where each one stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from refold.cli.console import console

if TYPE_CHECKING:
    from refold.report.grids import Grid

__all__ = ["board"]

_OPEN = ("waiting", "running")


class _Standing(Protocol):
    """Where a training stands: a status, and how many of its epochs are done."""

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def epochs(self) -> int: ...
    @property
    def planned(self) -> int: ...


T = TypeVar("T", bound=_Standing)


@contextmanager
def board(grid: Callable[[Sequence[T]], Grid], line: Callable[[T], str]) -> Iterator[Callable[[T], None]]:
    """What is told of trainings: live on a terminal, elsewhere a line for each that does not run any more.

    Args:
        grid: of all that were told, by their names.
        line: of one that ended.
    """
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from refold.report.tables import rich_table

    known: dict[str, T] = {}
    if not console.is_terminal:

        def say(one: T) -> None:
            if one.status not in _OPEN and known.get(one.name) != one:
                console.print(line(one), highlight=False)
            known[one.name] = one

        yield say
        return
    columns = (TextColumn("epochs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, speed_estimate_period=3600)  # an epoch may take minutes
    task = bar.add_task("epochs", total=None)
    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(one: T) -> None:
            first = one.name not in known
            known[one.name] = one
            done = sum(each.epochs for each in known.values())
            left = sum(each.planned - each.epochs for each in known.values() if each.status in _OPEN)
            if first:  # what it has already says nothing of how fast the others will be
                bar.reset(task, completed=done, total=done + left)
            bar.update(task, completed=done, total=done + left)
            live.update(Group(bar, rich_table(grid(list(known.values())))))

        yield show
