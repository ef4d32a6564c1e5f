"""Tables of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from refold.report.formats import duration, metric
from refold.report.grids import Grid, metric_title

if TYPE_CHECKING:
    from refold.sweeps import Row, SweepResult

__all__ = ["ranking_grid", "trials_grid"]

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
    states = ", ".join(
        f"{number} {status}" for status in _ORDER if (number := sum(row.status == status for row in rows))
    )
    cells = tuple(
        (
            row.trial.candidate,
            str(row.trial.config.seed),
            row.status,
            f"{row.epochs}/{row.trial.config.epochs}",
            metric(row.metric, row.value),
        )
        for row in sorted(rows, key=lambda row: _ORDER.index(row.status))
    )
    columns = ("candidate", "seed", "state", "epochs", metric_title(rows[0].metric) if rows else "")
    return Grid(f"Trials: {states}", columns, cells, 3)
