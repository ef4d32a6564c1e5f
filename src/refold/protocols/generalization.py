"""Domain generalization: trained on one set, tested on others with the same classes.

The published setting trains on 16 images of each ImageNet class and tests on ImageNet and on V2, Sketch, A and R. A
further set may have some of the classes alone (A and R have 200): those then compete with each other only, as is usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from refold.bench.environment import environment
from refold.data import Splits, load_dataset
from refold.data.tables import read_pairs
from refold.errors import DataError
from refold.methods import Method
from refold.protocols.fewshot import load_classes, plan, require_different, shot_splits
from refold.protocols.points import Point
from refold.protocols.trial import Other, Repeated, choose, finals, method_slug, write_json
from refold.training.config import TrainConfig

__all__ = ["DomainResult", "DomainRow", "load_other", "run_domains"]


@dataclass(frozen=True)
class DomainRow:
    """One method.

    Attributes:
        method: as a call.
        point: what was chosen.
        candidates: validation accuracy of each candidate, where several were compared.
        source: accuracy on the training set's own test split, one a seed; None without one.
        others: the same on each further set.
        seconds: of all trainings.
    """

    method: str
    point: Point
    candidates: dict[str, float]
    source: Repeated | None
    others: dict[str, Repeated]
    seconds: float

    @property
    def average(self) -> Repeated:
        """Mean over the further sets, one a seed."""
        return Repeated(sum(values) / len(values) for values in zip(*self.others.values(), strict=True))


@dataclass(frozen=True)
class DomainResult:
    """What :func:`run_domains` returns.

    Attributes:
        rows: one a method.
        images: in each test set; ``""`` is the source's own.
        shots: training images of each class; None is all.
    """

    rows: list[DomainRow]
    images: dict[str, int]
    shots: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [
            {
                **vars(row),
                "point": dict(row.point.values),
                "source": None if row.source is None else list(row.source),
                "others": {name: list(values) for name, values in row.others.items()},
                "average": list(row.average),
            }
            for row in self.rows
        ]
        return {"shots": self.shots, "images": self.images, "rows": rows}


def load_other(data: str | Path, classes: Sequence[str], mapping: str | Path | None = None) -> Other:
    """A further test set, its labels counted as the source's; all of its images, or its test split if it has one.

    Args:
        data: as for :func:`refold.data.load_dataset`.
        classes: of the source.
        mapping: a CSV of two columns without a header: its class, and the source's. None is the same names.

    Raises:
        DataError: a class that the source has not, or a mapping that cannot be read.
    """
    splits = load_dataset(data, fractions=(1.0, 0.0, 0.0))
    if splits.task != "classify" or splits.classes is None:
        raise DataError(f"is made for {splits.task!r}, not for classes", where=str(data))
    chosen = splits.test or splits.train
    names = (
        {name: name for name in splits.classes} if mapping is None else read_pairs(Path(mapping), "CLASS,SOURCE_CLASS")
    )
    index = {name: k for k, name in enumerate(classes)}
    places = []
    for name in splits.classes:
        target = names.get(name)
        if target is None or target not in index:
            known = ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else "")
            mapped = "" if target in (None, name) else f" (mapped to {target!r})"
            raise DataError(
                f"its class {name!r} is none of the source's{mapped}",
                where=str(data),
                remedy=f"Map it with a CSV of lines CLASS,SOURCE_CLASS; the source has {known}",
            )
        places.append(index[target])
    outputs = torch.tensor(sorted(set(places)))
    images = chosen.subset(range(len(chosen)))  # with what it holds in memory, and its channels
    images.targets, images.classes = torch.tensor(places)[chosen.targets], list(classes)
    return Other(images, None if len(outputs) == len(classes) else outputs)


def run_domains(
    config: TrainConfig,
    methods: Sequence[Method],
    others: Mapping[str, str | Path],
    *,
    mappings: Mapping[str, str | Path] | None = None,
    shots: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    grid: Sequence[str] = (),
    progress: bool | None = False,
    on_row: Callable[[DomainRow], None] | None = None,
) -> DomainResult:
    """Train every method on one set and test it there and on others; finished trainings are kept and not repeated.

    Args:
        config: model, data and recipe; its ``method`` and seed are not used.
        methods: to compare.
        others: name -> data of a further set.
        mappings: name -> class mapping of a further set, see :func:`load_other`.
        shots: training images of each class; None is all of the training split. Candidates are compared on the data's
            validation split, or on images that the shots leave.
        seeds: of the draw and the training.
        grid: candidates, see :func:`refold.protocols.parse_grid`; each method takes those settings that it or the
            recipe has.
        progress: bars on standard error; None shows them on a terminal.
        on_row: called with each finished row.

    Raises:
        DataError: data whose classes do not align, or settings that do not go together.
        RefoldError: whatever training raises.
    """
    splits, classes = load_classes(config)
    require_different(seeds=seeds)
    if not others:
        raise DataError("there is none", where="others", remedy="Name at least one further test set")
    unknown = sorted(set(mappings or {}) - set(others))
    if unknown:
        raise DataError("is of no further test set", where=f"mapping of {unknown[0]}")
    plans = plan(config, methods, grid)
    apart = {name: load_other(data, classes, (mappings or {}).get(name)) for name, data in others.items()}
    several = any(len(candidates) > 1 for _, candidates in plans)
    parts = {
        seed: _parts(splits, shots, seed, validate=several and seed == seeds[0]) for seed in seeds
    }  # complains now of classes with few images
    rows = []
    for method, candidates in plans:
        folder, base = Path(config.output) / method_slug(method), config.replace(method=method)
        chosen = choose(base.replace(seed=seeds[0]), candidates, parts[seeds[0]][0], folder, progress=progress)
        records, seconds = finals(
            base, chosen, seeds, lambda seed: parts[seed][1], folder, others=apart, progress=progress
        )
        found = {name: Repeated(record["others"][name] for record in records) for name in apart}
        own = None if splits.test is None else Repeated(record["test"]["accuracy"] for record in records)
        rows.append(DomainRow(method.describe(), chosen.point, chosen.candidates, own, found, seconds))
        if on_row is not None:
            on_row(rows[-1])
    images = {name: len(other.images) for name, other in apart.items()}
    if splits.test is not None:
        images = {"": len(splits.test), **images}
    result = DomainResult(rows, images, shots)
    write_json(Path(config.output) / "results.json", {**result.to_json(), "environment": environment()})
    return result


def _parts(splits: Splits, shots: int | None, seed: int, *, validate: bool) -> tuple[Splits, Splits]:
    """What candidates are compared on, and what is reported."""
    if shots is not None:
        return shot_splits(splits, shots, seed, validate=validate)
    if validate and splits.val is None:
        raise DataError(
            "has no validation split to compare candidates on", where="grid", remedy="Give one, or use shots"
        )
    return replace(splits, test=None), replace(splits, val=None)
