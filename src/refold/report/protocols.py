"""Tables of protocols."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from refold.report.formats import NONE, count, duration
from refold.report.grids import Grid

if TYPE_CHECKING:
    from refold.protocols import VtabResult

__all__ = ["vtab_grid"]


def vtab_grid(result: VtabResult) -> Grid:
    """A row a task, then the means of groups and both averages; accuracies in percent."""
    from refold.protocols.vtab import GROUPS, TASKS

    seeds = len(result.rows[0].accuracy) if result.rows else 0
    how = "best epoch and candidate ON TEST, as published" if result.published_protocol else "last epoch"
    title = f"VTAB-1k, {result.method}: test accuracy, {how}; {seeds} seed{'s' * (seeds != 1)}; "
    title += f"inputs normalised: {result.normalize}"

    def rows() -> Iterator[tuple[str, ...]]:
        for row in result.rows:
            task = TASKS[row.name]
            images = count(row.images) + ("" if row.images == task.test else f" of {count(task.test)}")
            accuracy = f"{100 * row.mean:.1f}" + (f" ± {100 * row.spread:.1f}" if seeds > 1 else "")
            yield task.title, task.group, str(row.point), accuracy, images, duration(row.seconds)
        for name in GROUPS:
            yield f"mean of {name}", "", "", _share(result.group(name)), "", ""
        yield "mean of the three groups", "", "", _share(result.group_average), "", ""
        yield "mean of the 19 tasks", "", "", _share(result.task_average), "", ""

    return Grid(title, ("task", "group", "chosen", "accuracy %", "test images", "training"), tuple(rows()), 3)


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"
