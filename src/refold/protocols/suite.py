"""One method on several data sets, and the mean: FGVC's five sets, or a user's own.

Candidates are compared on each set's validation split with the first seed; what is chosen trains on the training split
with every seed, and the last epoch is scored on the test split once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refold.bench.environment import environment
from refold.errors import DataError
from refold.methods import Method
from refold.protocols.fewshot import load_classes, plan, require_different
from refold.protocols.points import Point
from refold.protocols.trial import Repeated, choose, finals, method_slug, write_json
from refold.training.config import TrainConfig

__all__ = ["SuiteResult", "SuiteRow", "run_suite"]


@dataclass(frozen=True)
class SuiteRow:
    """One method on one data set.

    Attributes:
        method: as a call.
        data: name of the set.
        point: what was chosen.
        candidates: validation accuracy of each candidate, where several were compared.
        accuracy: on test, one a seed.
        seconds: of all trainings.
    """

    method: str
    data: str
    point: Point
    candidates: dict[str, float]
    accuracy: Repeated
    seconds: float


@dataclass(frozen=True)
class SuiteResult:
    """What :func:`run_suite` returns.

    Attributes:
        rows: methods in the order given, sets in the order given.
        images: in each test set.
    """

    rows: list[SuiteRow]
    images: dict[str, int]

    def average(self, method: str) -> Repeated:
        """Mean over the sets, one a seed."""
        mine = [row.accuracy for row in self.rows if row.method == method]
        return Repeated(sum(values) / len(values) for values in zip(*mine, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [{**vars(row), "point": dict(row.point.values), "accuracy": list(row.accuracy)} for row in self.rows]
        methods = dict.fromkeys(row.method for row in self.rows)
        averages = {method: list(self.average(method)) for method in methods}
        return {"images": self.images, "rows": rows, "average": averages}


def run_suite(
    config: TrainConfig,
    methods: Sequence[Method],
    data: Mapping[str, str | Path],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    grid: Sequence[str] = (),
    progress: bool | None = False,
    on_row: Callable[[SuiteRow], None] | None = None,
) -> SuiteResult:
    """Train and test every method on every data set; finished trainings are kept and not repeated.

    Args:
        config: model and recipe; its ``data``, ``method`` and seed are not used.
        methods: to compare.
        data: name -> a data set with a test split, and with a validation split where candidates are compared.
        seeds: of the trainings.
        grid: candidates, see :func:`refold.protocols.parse_grid`; each method takes those settings that it or the
            recipe has.
        progress: bars on standard error; None shows them on a terminal.
        on_row: called with each finished row.

    Raises:
        DataError: a split that is missing, or settings that do not go together.
        RefoldError: whatever training raises.
    """
    require_different(seeds=seeds)
    if not data:
        raise DataError("there is none", where="data")
    plans = plan(config, methods, grid)
    several = any(len(candidates) > 1 for _, candidates in plans)
    loaded, images = {}, {}
    for name, source in data.items():
        splits, _ = load_classes(config.replace(data=str(source)))
        if splits.test is None:
            raise DataError("has no test split", where=name, remedy="Add test/, or give split sizes with one")
        if several and splits.val is None:
            raise DataError("has no validation split to compare candidates on", where=name, remedy="Give split sizes")
        loaded[name], images[name] = splits, len(splits.test)
    rows = []
    for method, candidates in plans:
        for name, splits in loaded.items():
            base = config.replace(method=method, data=str(data[name]))
            folder = Path(config.output) / name / method_slug(method)
            search, final = replace(splits, test=None), replace(splits, val=None)
            chosen = choose(base.replace(seed=seeds[0]), candidates, search, folder, progress=progress)
            records, seconds = finals(base, chosen, seeds, lambda seed, final=final: final, folder, progress=progress)
            accuracy = Repeated(record["test"]["accuracy"] for record in records)
            rows.append(SuiteRow(method.describe(), name, chosen.point, chosen.candidates, accuracy, seconds))
            if on_row is not None:
                on_row(rows[-1])
    result = SuiteResult(rows, images)
    write_json(Path(config.output) / "results.json", {**result.to_json(), "environment": environment()})
    return result
