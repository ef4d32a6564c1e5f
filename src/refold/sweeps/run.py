"""``refold.sweep``: many runs of :func:`refold.train`, compared on validation images alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from refold.bench.environment import environment
from refold.errors import DataError, RefoldError
from refold.methods import Method
from refold.protocols.fewshot import plan, require_different
from refold.protocols.trial import Repeated, method_slug, write_json
from refold.sweeps.halving import halve, rungs
from refold.sweeps.trials import Row, Trial, advance, look, reached, survey
from refold.sweeps.tune import RayEngine, Report
from refold.training.checkpoint import check_same
from refold.training.config import TrainConfig
from refold.training.inference import start_accelerator
from refold.training.run import RunFolder

__all__ = ["SEARCHES", "Candidate", "SweepResult", "run_sweep"]

SEARCHES = ("grid", "random", "asha")


@dataclass(frozen=True)
class Candidate:
    """One point of the search, with every seed.

    Attributes:
        name: method and settings, for people.
        rows: one a seed, all finished.
        values: the metric of each at its best epoch.
    """

    name: str
    rows: list[Row]
    values: Repeated


@dataclass(frozen=True)
class SweepResult:
    """What :func:`run_sweep` returns.

    Attributes:
        rows: one a trial.
        metric: on validation, that trials are compared by.
        search: how: one of :data:`SEARCHES`.
        ranking: candidates whose seeds all finished, the best first.
        parquet: ``results.parquet``; None without the package pyarrow.
    """

    rows: list[Row]
    metric: str
    search: str
    ranking: list[Candidate]
    parquet: Path | None = None

    @property
    def best(self) -> Trial:
        """The best candidate's run with the first seed."""
        return self.ranking[0].rows[0].trial

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "metric": self.metric,
            "search": self.search,
            "best": self.best.name,
            "candidates": [
                {
                    "candidate": one.name,
                    "values": list(one.values),
                    "mean": one.values.mean,
                    "spread": one.values.spread,
                }
                for one in self.ranking
            ],
            "trials": [row.to_json() for row in self.rows],
        }


def run_sweep(
    config: TrainConfig,
    grid: Sequence[str],
    *,
    methods: Sequence[Method] | None = None,
    search: str = "grid",
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    grace: int = 1,
    reduction: int = 3,
    engine: RayEngine | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> SweepResult:
    """Train every candidate in a run folder of its own, and rank them by their best epochs on validation images.

    Whole images and dense tasks alike. The test split is not looked at. Trials that are finished are not run again and
    others go on from their checkpoints, so the same call after a stop, or with a larger grid, does what is left. A
    trial that fails (its loss diverges, say) is out, and is tried again by the next call.

    ``config.output`` holds ``trials/``, a run folder each, ``results.json`` and, with pyarrow, ``results.parquet``.

    Args:
        config: of all runs; its seed is used where ``seeds`` are not given.
        grid: candidates, such as ``["lr=1e-3,5e-3", "scale=0.1,1"]``; several combine, see
            :func:`refold.protocols.parse_grid`. Each method takes those settings that it or the recipe has.
        methods: to compare; None is the config's.
        search: ``"grid"`` takes all combinations, ``"random"`` draws some of them, and ``"asha"`` trains all, or
            those drawn, by successive halving, see :mod:`refold.sweeps.halving`.
        samples: combinations to draw, the first of an order that the first seed decides.
        seeds: of splits that are drawn and of training; a candidate's value is the mean over them. One for ``"asha"``.
        grace: of ``"asha"``: epochs after which trials are first compared.
        reduction: of ``"asha"``: one trial in so many goes on.
        engine: Ray; None runs one trial after the other, here.
        on_row: called with every trial at the start, and whenever its state has changed.

    Raises:
        DataError: bad data, no validation split, a grid that cannot be read, settings that do not go together, or an
            output folder of a sweep with other settings or data.
        RefoldError: all trials failed; with the reason of the first.
        KeyboardInterrupt: with a note that says how to go on.
    """
    if start_accelerator().num_processes > 1:
        raise DataError("trains on one process each", where="sweep", remedy="Start it without a launcher, or on Ray")
    numbers = [config.seed] if seeds is None else list(seeds)
    _require(config, search, samples, numbers, grace, reduction)
    trials = make_trials(config, methods or [config.method], grid, numbers, samples)
    metric, data = survey(config.replace(seed=numbers[0]))
    root = Path(config.output)
    _same_data(root / "data.json", data)
    for trial in trials:
        if search == "asha" and trial.config.epochs != config.epochs:
            raise DataError("is what asha itself decides", where="epochs", remedy="Leave it out of the grid")
        RunFolder(trial.config.output).check(trial.config, resume=True)
    halving = (config.epochs, grace, reduction) if search == "asha" else None
    tell = on_row or (lambda row: None)
    for row in [look(trial, metric) for trial in trials]:
        tell(row if row.status == "finished" else replace(row, status="waiting"))
    try:
        if engine is None:
            failures = _in_turn(trials, metric, halving, tell)
        else:
            failures = _on_ray(engine, trials, metric, halving, root, tell)
    except KeyboardInterrupt as stop:
        stop.__notes__ = [f"Stopped. The same call, or command, goes on with what is in {root}"]
        raise
    rows = [look(trial, metric) for trial in trials]
    rows = [
        replace(row, status="failed", reason=failures[row.trial.name]) if row.trial.name in failures else row
        for row in rows
    ]
    ranking = rank(rows)
    if not ranking:
        raise RefoldError(
            f"no trial was finished: {next(iter(failures.values()), 'all were stopped')}", where=str(root)
        )
    result = SweepResult(rows, metric, search, ranking, _write_parquet(rows, root / "results.parquet"))
    write_json(root / "results.json", {**result.to_json(), "environment": environment()})
    return result


def make_trials(
    config: TrainConfig, methods: Sequence[Method], grid: Sequence[str], seeds: Sequence[int], samples: int | None
) -> list[Trial]:
    """The runs of a sweep; of a candidate one after the other.

    Raises:
        DataError, SiteError: a grid that cannot be read, values out of range, or two candidates of one name.
    """
    candidates = [(method, point) for method, own in plan(config, methods, grid) for point in own]
    if samples is not None:
        Random(seeds[0]).shuffle(candidates)  # so that more samples are the same and others
        candidates = candidates[:samples]
    trials = []
    for method, point in candidates:
        base = point.apply(config.replace(method=method, evaluate_test=False))
        for seed in seeds:
            name = f"{method_slug(method)}-{point.slug}-{seed}"
            output = str(Path(config.output) / "trials" / name)
            candidate = f"{method.describe()}, {point}" if point.values else method.describe()
            trials.append(Trial(name, candidate, dict(point.values), base.replace(seed=seed, output=output)))
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        raise DataError("two candidates have one name", where=next(n for n in names if names.count(n) > 1))
    return trials


def rank(rows: Sequence[Row]) -> list[Candidate]:
    """Candidates whose trials all finished: the best mean first, of equals the least mean loss, then the earlier."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.trial.candidate, []).append(row)
    ranking = [
        Candidate(name, some, Repeated(row.value for row in some if row.value is not None))
        for name, some in found.items()
        if all(row.status == "finished" for row in some)
    ]

    def order(one: Candidate) -> tuple[float, float]:
        worth = [row.worth for row in one.rows]
        return sum(value for value, _ in worth), sum(of_loss for _, of_loss in worth)

    return sorted(ranking, key=order, reverse=True)


def _in_turn(
    trials: Sequence[Trial], metric: str, halving: tuple[int, int, int] | None, tell: Callable[[Row], None]
) -> dict[str, str]:
    failures: dict[str, str] = {}

    def score(trial: Trial, epochs: int) -> tuple[float, float] | None:
        try:
            row = advance(trial, metric, epochs, tell)
        except RefoldError as error:
            failures[trial.name] = str(error)
            tell(Row(trial, metric, "failed", reason=str(error)))
            return None
        tell(row)
        return reached(trial, metric, epochs).worth  # a restart finds it further than it was when this was decided

    if halving is None:
        for trial in trials:
            score(trial, trial.config.epochs)
    else:
        epochs, grace, reduction = halving
        halve(trials, score, epochs=epochs, grace=grace, reduction=reduction)
    return failures


def _on_ray(
    engine: RayEngine,
    trials: Sequence[Trial],
    metric: str,
    halving: tuple[int, int, int] | None,
    root: Path,
    tell: Callable[[Row], None],
) -> dict[str, str]:
    # What ASHA has stopped stays stopped, whatever order a restart brings the trials in.
    path = root / "stopped.json"
    stopped: list[str] = json.loads(path.read_text()) if halving and path.is_file() else []
    rows = {trial.name: look(trial, metric) for trial in trials}
    decided = {name for name, row in rows.items() if row.status == "finished" or name in stopped}
    for name in decided.intersection(stopped):
        tell(rows[name])
    if len(decided) == len(trials):
        return {}
    # The trials that are decided tell the scheduler what they reached; without one they have nothing to tell.
    levels = [] if halving is None else rungs(*halving)
    items = [(t, metric, levels, t.name in decided) for t in trials if levels or t.name not in decided]

    def on_report(item: int, report: dict[str, Any]) -> None:
        trial, *_, known = items[item]
        if not known and "value" in report:
            tell(Row(trial, metric, "running", report["epoch"], report["value"], report["loss"]))

    def on_end(item: int) -> None:
        trial, *_, known = items[item]
        if not known:
            row = look(trial, metric)
            if halving is not None and row.status == "stopped":
                stopped.append(trial.name)
                write_json(path, stopped)
            tell(row)

    found = engine.run(_train, items, root, halving=halving, on_report=on_report, on_end=on_end)
    failures = {items[item][0].name: reason for item, reason in found.items()}
    for item, reason in found.items():
        tell(Row(items[item][0], metric, "failed", reason=reason))
    return failures


def _train(item: tuple[Trial, str, list[int], bool], report: Report) -> None:
    """In a worker: train from rung to rung, where the scheduler may stop it, and to the end."""
    trial, metric, levels, decided = item

    def tell(row: Row) -> None:
        report({"epoch": row.epochs, "value": row.value, "loss": row.loss})

    for level in levels:
        if not decided:
            advance(trial, metric, level, tell)
        row = reached(trial, metric, level)
        if row.epochs == level:
            report({"epochs": level, "worth": row.worth[0]})
    if not decided:
        advance(trial, metric, on_row=tell)


def _require(
    config: TrainConfig, search: str, samples: int | None, seeds: Sequence[int], grace: int, reduction: int
) -> None:
    if search not in SEARCHES:
        raise DataError(f"must be one of {', '.join(SEARCHES)}, not {search!r}", where="search")
    require_different(seeds=seeds)
    if samples is not None and samples < 1:
        raise DataError(f"must be 1 or more, not {samples}", where="samples")
    if (samples is None) == (search == "random") or (samples is not None and search == "grid"):
        reason = "is needed for a random search" if samples is None else "is not for a grid, of which all are taken"
        raise DataError(reason, where="samples")
    if search != "asha":
        return
    if len(seeds) > 1:
        raise DataError("asha compares runs of one seed", where="seeds", remedy="Repeat the best with search='grid'")
    if not 1 <= grace < config.epochs:
        raise DataError(f"must be at least 1 and under epochs ({config.epochs}), not {grace}", where="grace")
    if reduction < 2:
        raise DataError(f"must be 2 or more, not {reduction}", where="reduction")
    if config.validate_every != 1:
        raise DataError("must be 1 for asha, which compares trials after epochs", where="validate_every")


def _same_data(path: Path, data: dict[str, str]) -> None:
    if path.is_file():
        try:
            check_same(json.loads(path.read_text(encoding="utf-8")), data)
        except DataError as error:
            raise DataError(
                f"the sweep began with other images or labels ({error.where})",
                where=str(path.parent),
                remedy="Use another output folder",
            ) from error
    write_json(path, data)


def _write_parquet(rows: Sequence[Row], path: Path) -> Path | None:
    """One row a trial, one column a setting."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        return None
    records = [row.to_json() for row in rows]
    columns = {name: [record[name] for record in records] for name in records[0] if name != "settings"}
    for name in dict.fromkeys(name for record in records for name in record["settings"]):
        columns[f"setting {name}"] = [record["settings"].get(name) for record in records]

    def column(values: list[Any]) -> Any:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # a setting with values of several kinds
            return pa.array([None if value is None else str(value) for value in values])

    temporary = path.with_name(f".{path.name}.part")
    pyarrow.parquet.write_table(pa.table({name: column(values) for name, values in columns.items()}), temporary)
    temporary.replace(path)
    return path
