"""Tables of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refold.report.formats import duration, metric
from refold.report.grids import Grid, metric_title

if TYPE_CHECKING:
    from refold.protocols import Standing
    from refold.sweeps import Row, SweepResult

__all__ = ["ranking_grid", "trainings_grid", "trials_grid"]

_ORDER = ("running", "finished", "stopped", "failed", "waiting")


def ranking_grid(result: SweepResult) -> Grid:
    """A row a candidate, the best first, and those that did not finish below."""
    seeds = max(len(one.rows) for one in result.ranking)
    title = (
        f"Validation {metric_title(result.metric)} at the best epoch, {result.search} search; "
        f"{seeds} seed{'s' * (seeds > 1)}"
    )
    rows = []
    for one in result.ranking:
        value = metric(result.metric, one.values.mean)
        spread = f" ± {metric(result.metric, one.values.spread)}" if len(one.values) > 1 else ""
        rows.append((one.name, "finished", value + spread, duration(sum(row.seconds for row in one.rows))))
    ranked = {one.name for one in result.ranking}
    for row in result.rows:
        if row.trial.candidate not in ranked:
            state = f"{row.status}, epoch {row.epochs}" if row.epochs else row.status
            rows.append((row.trial.candidate, state, metric(result.metric, row.value), duration(row.seconds)))
    return Grid(title, ("candidate", "state", metric_title(result.metric), "training"), tuple(rows), 2)


def trials_grid(rows: Sequence[Row]) -> Grid:
    """Where trials stand, a row each: those that run first."""
    cells = tuple(
        (
            row.trial.candidate,
            str(row.trial.config.seed),
            row.status,
            f"{row.epochs}/{row.planned}",
            metric(row.metric, row.value),
        )
        for row in sorted(rows, key=_place)
    )
    columns = ("candidate", "seed", "state", "epochs", metric_title(rows[0].metric) if rows else "")
    return Grid(f"Trials: {_states(rows)}", columns, cells, 3)


def trainings_grid(rows: Sequence[Standing]) -> Grid:
    """Where the trainings of a protocol stand, a row each: those that run first."""
    cells = tuple(
        (row.job.path.parent.name, row.job.path.stem, row.status, f"{row.epochs}/{row.planned}")
        for row in sorted(rows, key=_place)
    )
    return Grid(f"Trainings: {_states(rows)}", ("task", "training", "state", "epochs"), cells, 3)


def _place(row: Row | Standing) -> int:
    return _ORDER.index(row.status)


def _states(rows: Sequence[Row] | Sequence[Standing]) -> str:
    counts = ((sum(row.status == status for row in rows), status) for status in _ORDER)
    return ", ".join(f"{number} {status}" for number, status in counts if number)
