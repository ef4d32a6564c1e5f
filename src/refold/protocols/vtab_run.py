"""``run_vtab``: every task of VTAB-1k with one method, and the averages of the papers.

What is chosen is chosen on val200: each candidate trains on train800 with the first seed, and its last epoch counts.
What is reported is trained on all 1000 images with each seed, and its last epoch scored on test once.

The published numbers of RepAdapter, FacT, Convpass and others come about otherwise: their code scores the test set
every ten epochs and prints the best of these, for the scale that does best on test. ``published_protocol`` does the
same, so that they can be compared; what it gives is no estimate of accuracy on new images, and is labelled so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refold.bench.environment import environment
from refold.data import Splits
from refold.errors import DataError
from refold.protocols.fewshot import require_different
from refold.protocols.points import Point, points
from refold.protocols.trial import (
    Choice,
    Engine,
    Job,
    Repeated,
    Standing,
    choose,
    final_jobs,
    finals,
    search_jobs,
    write_json,
)
from refold.protocols.vtab import GROUPS, TASKS, find_tasks, load_task
from refold.training.config import TrainConfig

__all__ = ["TaskResult", "VtabResult", "run_vtab"]

_PUBLISHED_EVERY = 10  # epochs


@dataclass(frozen=True)
class TaskResult:
    """One row.

    Attributes:
        name: of the task.
        point: what was chosen.
        candidates: accuracy of each candidate: on val200, or with the published protocol the best on test.
        accuracy: on test, one a seed, shares.
        images: in the test set.
        seconds: of all trainings.
    """

    name: str
    point: Point
    candidates: dict[str, float]
    accuracy: Repeated
    images: int
    seconds: float


@dataclass(frozen=True)
class VtabResult:
    """What :func:`run_vtab` returns.

    Attributes:
        rows: one a task.
        published_protocol: whether the test set chose.
        normalize: of the inputs.
        method: as a call.
    """

    rows: list[TaskResult]
    published_protocol: bool
    normalize: str
    method: str

    def group(self, name: str) -> float | None:
        """Mean over the tasks of a group; None unless all are there."""
        members = {task.name for task in TASKS.values() if task.group == name}
        found = [row.accuracy.mean for row in self.rows if row.name in members]
        return statistics.mean(found) if len(found) == len(members) else None

    @property
    def group_average(self) -> float | None:
        """Mean of the three groups, the papers' "Average"; None unless all tasks are there."""
        means = [self.group(name) for name in GROUPS]
        return None if None in means else statistics.mean(value for value in means if value is not None)

    @property
    def task_average(self) -> float | None:
        """Mean of the 19 tasks; None unless all are there."""
        return statistics.mean(row.accuracy.mean for row in self.rows) if len(self.rows) == len(TASKS) else None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.method,
            "normalize": self.normalize,
            "selected_on": "test" if self.published_protocol else "val200",
            "tasks": [
                {
                    "task": row.name,
                    "group": TASKS[row.name].group,
                    "chosen": dict(row.point.values),
                    "candidates": row.candidates,
                    "accuracy": list(row.accuracy),
                    "test_images": row.images,
                    "seconds": row.seconds,
                }
                for row in self.rows
            ],
            "groups": {name: self.group(name) for name in GROUPS},
            "group_average": self.group_average,
            "task_average": self.task_average,
        }


def run_vtab(
    config: TrainConfig,
    *,
    tasks: Sequence[str] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: Sequence[int] = (0,),
    published_protocol: bool = False,
    engine: Engine | None = None,
    progress: bool | None = False,
    on_task: Callable[[TaskResult], None] | None = None,
    on_job: Callable[[Standing], None] | None = None,
) -> VtabResult:
    """Train and test a method on tasks of VTAB-1k; finished trainings are kept in ``config.output`` and not repeated.

    Args:
        config: ``data`` is the folder with all tasks, ``output`` the folder to write; its seed is not used.
        tasks: names of :data:`TASKS`; None is all 19.
        grid: name -> candidates, see :func:`refold.protocols.points.parse_grid`; None searches nothing.
        seeds: of the final trainings; the first also of the search.
        published_protocol: choose epoch and candidate on the test set, as the published code does.
        engine: trains many at once, over all tasks; None trains one after the other, here.
        progress: bars on standard error; None shows them on a terminal.
        on_task: called with each finished row.
        on_job: called with where each training of the engine stands, at the start and whenever that changes.

    Raises:
        DataError: data that are not there, settings that do not go together, or an output folder of other settings.
        RefoldError: whatever training raises.
    """
    _require_plain(config)
    require_different(seeds=seeds)
    candidates = points(grid or {})
    folders = find_tasks(config.data, tasks)
    for point in candidates:
        point.apply(config)  # complains now
    loaded = {name: load_task(TASKS[name], folder, cache=config.cache) for name, folder in folders.items()}
    runs = {
        name: _Task(config, Path(config.output) / name, search, final, candidates, seeds, progress)
        for name, (search, final) in loaded.items()
    }
    if engine is not None:
        waves = (_Task.published_jobs,) if published_protocol else (_Task.search_jobs, _Task.final_jobs)
        for wave in waves:
            engine.records([job for run in runs.values() for job in wave(run)], Path(config.output), on_job)
    rows = []
    for name, run in runs.items():
        rows.append((run.published if published_protocol else run.honest)(name))
        if on_task is not None:
            on_task(rows[-1])
    result = VtabResult(rows, published_protocol, config.normalize, config.method.describe())
    write_json(Path(config.output) / "results.json", {**result.to_json(), "environment": environment()})
    return result


@dataclass(frozen=True)
class _Task:
    """The trainings of one task."""

    config: TrainConfig
    folder: Path
    search: Splits
    final: Splits
    candidates: list[Point]
    seeds: Sequence[int]
    progress: bool | None

    def search_jobs(self) -> list[Job]:
        return search_jobs(self._first, self.candidates, self.search, self.folder)

    def final_jobs(self) -> list[Job]:
        return final_jobs(self.config, self._chosen().point, self.seeds, lambda _: self.final, self.folder)

    def honest(self, name: str) -> TaskResult:
        chosen = self._chosen()
        records, seconds = finals(
            self.config, chosen, self.seeds, lambda _: self.final, self.folder, progress=self.progress
        )
        accuracy = Repeated(record["test"]["accuracy"] for record in records)
        return self._row(name, chosen, accuracy, seconds)

    @property
    def _first(self) -> TrainConfig:
        return self.config.replace(seed=self.seeds[0])

    def _chosen(self) -> Choice:
        return choose(self._first, self.candidates, self.search, self.folder, progress=self.progress)

    def published_jobs(self) -> list[Job]:
        """Of every candidate one for each seed."""
        as_val = replace(self.final, val=self.final.test, test=None)
        return [
            Job(
                point.apply(self.config).replace(seed=seed, validate_every=_PUBLISHED_EVERY),
                as_val,
                self.folder / f"published-{point.slug}-{seed}.json",
            )
            for point in self.candidates
            for seed in self.seeds
        ]

    def published(self, name: str) -> TaskResult:
        records = [job.make(self.progress) for job in self.published_jobs()]
        best_epochs = [max(row["accuracy"] for row in record["val"]) for record in records]
        seeds = len(self.seeds)
        scores = {point: Repeated(best_epochs[k * seeds : (k + 1) * seeds]) for k, point in enumerate(self.candidates)}
        seconds = sum(record["seconds"] for record in records)
        best = max(self.candidates, key=lambda point: scores[point].mean)
        shown = {str(point): found.mean for point, found in scores.items()} if len(self.candidates) > 1 else {}
        return self._row(name, Choice(best, shown, 0.0), scores[best], seconds)

    def _row(self, name: str, chosen: Choice, accuracy: Repeated, seconds: float) -> TaskResult:
        assert self.final.test is not None
        return TaskResult(name, chosen.point, chosen.candidates, accuracy, len(self.final.test), seconds)


def _require_plain(config: TrainConfig) -> None:
    for name in ("task", "train", "val", "test", "target", "start"):
        if getattr(config, name) is not None:
            raise DataError("is not for VTAB-1k", where=name, remedy="Leave it out")
