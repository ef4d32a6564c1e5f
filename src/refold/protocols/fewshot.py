"""Few-shot learning: accuracy against the number of training images of each class.

For each seed the images of a class are put in an order, whose first k train: the 1-shot set is a part of the 2-shot
set. Where candidates are compared, ``min(k, 4)`` further images of each class validate, as in CoOp's and NOAH's splits,
with the first seed; what is reported is the last epoch on the whole test set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refold.bench.environment import environment
from refold.data import ImageSet, Splits
from refold.data.randomness import generator
from refold.errors import DataError
from refold.methods import Method
from refold.protocols.points import Point, parse_grid, points
from refold.protocols.trial import Repeated, choose, finals, method_slug, write_json
from refold.training.config import TrainConfig
from refold.training.evaluation import load_splits

__all__ = [
    "PUBLISHED_RECIPE",
    "FewShotResult",
    "FewShotRow",
    "draw_shots",
    "load_classes",
    "plan",
    "require_different",
    "run_few_shot",
    "shot_splits",
]

#: Of NOAH's and RepAdapter's few-shot experiments, beside the VTAB recipe.
PUBLISHED_RECIPE = {"augment": "randaugment", "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
_VALIDATED = 4  # images of a class, at most


@dataclass(frozen=True)
class FewShotRow:
    """One method at one number of shots.

    Attributes:
        method: as a call.
        shots: training images of each class.
        point: what was chosen.
        candidates: validation accuracy of each candidate, where several were compared.
        accuracy: on test, one a seed.
        seconds: of all trainings.
    """

    method: str
    shots: int
    point: Point
    candidates: dict[str, float]
    accuracy: Repeated
    seconds: float


@dataclass(frozen=True)
class FewShotResult:
    """What :func:`run_few_shot` returns.

    Attributes:
        rows: methods in the order given, shots ascending.
        classes: how many.
        test_images: in the test set.
    """

    rows: list[FewShotRow]
    classes: int
    test_images: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rows = [{**vars(row), "point": dict(row.point.values), "accuracy": list(row.accuracy)} for row in self.rows]
        return {"classes": self.classes, "test_images": self.test_images, "rows": rows}


def draw_shots(
    targets: Tensor, classes: Sequence[str], shots: int, seed: int, *, validate: bool = False
) -> tuple[list[int], list[int]]:
    """Indices of the training images, and of the validation images if they are asked for; both sorted.

    Args:
        targets: (N,) class indices.
        classes: names, for errors.
        shots: training images of each class.
        seed: of the order.
        validate: whether to draw min(shots, 4) further images of each class.

    Raises:
        DataError: a class with too few images.
    """
    train: list[int] = []
    val: list[int] = []
    more = min(shots, _VALIDATED) if validate else 0
    for k, name in enumerate(classes):
        rows = (targets == k).nonzero().flatten()
        if len(rows) < shots + more:
            purpose = f" to train and {more} to validate" if more else ""
            raise DataError(
                f"class {name!r} has {len(rows)} training images; {shots}{purpose} are needed",
                where="shots",
                remedy="Use fewer shots, or compare no candidates" if more else "Use fewer shots",
            )
        order = rows[torch.randperm(len(rows), generator=generator(seed, k, "shots"))].tolist()
        train += order[:shots]
        val += order[shots : shots + more]
    return sorted(train), sorted(val)


def shot_splits(splits: Splits, shots: int, seed: int, *, validate: bool) -> tuple[Splits, Splits]:
    """What candidates are compared on, and what is reported.

    Validation images are drawn from the data's validation split if it has one, else from what training leaves.

    Raises:
        DataError: as :func:`draw_shots`.
    """
    classes = splits.classes or []
    apart = validate and splits.val is not None
    train, val = draw_shots(splits.train.targets, classes, shots, seed, validate=validate and not apart)
    pool: ImageSet = splits.train
    if apart:
        assert splits.val is not None
        pool = splits.val
        val, _ = draw_shots(pool.targets, classes, min(shots, _VALIDATED), seed)
    few = splits.train.subset(train)
    return (
        Splits(few, pool.subset(val) if val else None, None, splits.classes, splits.task),
        Splits(few, None, splits.test, splits.classes, splits.task),
    )


def run_few_shot(
    config: TrainConfig,
    methods: Sequence[Method],
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (0, 1, 2),
    grid: Sequence[str] = (),
    progress: bool | None = False,
    on_row: Callable[[FewShotRow], None] | None = None,
) -> FewShotResult:
    """Train every method on few images of each class, and test it; finished trainings are kept and not repeated.

    Args:
        config: model, data and recipe; its ``method`` and seed are not used. The data need a test set.
        methods: to compare.
        shots: training images of each class.
        seeds: of the draw and the training.
        grid: candidates, see :func:`refold.protocols.parse_grid`; each method takes those settings that it or the
            recipe has.
        progress: bars on standard error; None shows them on a terminal.
        on_row: called with each finished row.

    Raises:
        DataError: data without a test set or with too few images of a class, or settings that do not go together.
        RefoldError: whatever training raises.
    """
    splits, classes = load_classes(config)
    if splits.test is None:
        raise DataError("has no test split", where=config.data, remedy="Add test/, or give split sizes with one")
    require_different(shots=shots, seeds=seeds)
    if min(shots) < 1:
        raise DataError(f"must be 1 or more, not {min(shots)}", where="shots")
    plans = plan(config, methods, grid)
    several = any(len(candidates) > 1 for _, candidates in plans)
    for seed in seeds:  # complains now of classes with few images
        shot_splits(splits, max(shots), seed, validate=several and seed == seeds[0])
    rows = []
    for method, candidates in plans:
        for count in sorted(shots):
            base = config.replace(method=method)
            folder = Path(config.output) / method_slug(method) / f"{count}-shot"
            search, _ = shot_splits(splits, count, seeds[0], validate=len(candidates) > 1)
            chosen = choose(base.replace(seed=seeds[0]), candidates, search, folder, progress=progress)

            def final(seed: int, count: int = count) -> Splits:
                return shot_splits(splits, count, seed, validate=False)[1]

            records, seconds = finals(base, chosen, seeds, final, folder, progress=progress)
            accuracy = Repeated(record["test"]["accuracy"] for record in records)
            rows.append(FewShotRow(method.describe(), count, chosen.point, chosen.candidates, accuracy, seconds))
            if on_row is not None:
                on_row(rows[-1])
    result = FewShotResult(rows, len(classes), len(splits.test))
    write_json(Path(config.output) / "results.json", {**result.to_json(), "environment": environment()})
    return result


def plan(config: TrainConfig, methods: Sequence[Method], grid: Sequence[str]) -> list[tuple[Method, list[Point]]]:
    """The candidates of each method, every one of them sound.

    Raises:
        DataError, SiteError: no method, or a grid that cannot be read or has values out of range.
    """
    if not methods:
        raise DataError("there is none", where="methods")
    plans = [(method, points(own)) for method, own in zip(methods, parse_grid(grid, methods), strict=True)]
    for method, candidates in plans:
        for point in candidates:
            point.apply(config.replace(method=method))
    return plans


def require_different(**numbers: Sequence[int]) -> None:
    """Raise :class:`DataError` for an empty list, or one with a number twice."""
    for name, values in numbers.items():
        if not values or len(set(values)) != len(values):
            raise DataError("must be one or more different numbers", where=name)


def load_classes(config: TrainConfig) -> tuple[Splits, list[str]]:
    """Data of one class an image, and its classes.

    Raises:
        DataError: the data are of another kind.
    """
    if config.task is not None:
        raise DataError("is not for protocols of whole images", where="task", remedy="Leave it out")
    splits = load_splits(config)
    if splits.task != "classify" or splits.classes is None:
        raise DataError(f"are made for {splits.task!r}, not for classes", where=config.data)
    return splits, splits.classes
