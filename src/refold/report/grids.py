"""The tables of refold as plain text cells, made once and shown in the terminal or on the page.

The records come as dictionaries because they are read back from ``summary.json``, ``certificate.json`` and
``cost.json``; a number that was not recorded shows as a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from refold.report import formats

if TYPE_CHECKING:
    from refold.inspection import Row

__all__ = [
    "SPLITS",
    "Grid",
    "certificate_checks",
    "certificate_grid",
    "certificate_holds",
    "confused_pairs_grid",
    "confusion_grid",
    "cost_grid",
    "explain_grid",
    "metric_names",
    "metric_title",
    "metrics_grid",
    "per_class_grid",
    "results_grid",
]

TITLES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "mae": "MAE",
    "rmse": "RMSE",
    "mse": "MSE",
    "r2": "R²",
    "map": "mAP",
    "miou": "mIoU",
    "iou": "IoU",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
}
SPLITS = {"train": "training", "val": "validation", "test": "test"}
_NOT_METRICS = frozenset({"epoch", "step", "split", "lr", "seconds", "loss", "images", "count"})


_NO_ADAPTER = {"head": "trained", "in place": "trained", "-": "left out"}  # verdicts on rows without one


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        title: heading, may be empty.
        columns: column heads.
        rows: cells, one tuple a row, as many as there are columns.
        text_columns: the first so many columns are words (left aligned), the others numbers.
        marks: by (row, column): ``"good"`` or ``"bad"``.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    marks: Mapping[tuple[int, int], str] | None = None

    def mark(self, row: int, column: int) -> str:
        return (self.marks or {}).get((row, column), "")


def metric_title(name: str) -> str:
    """How a metric is written in a heading."""
    return TITLES.get(name, name.replace("_", " "))


def metric_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the metrics in records of any kind, in order of appearance; bookkeeping left out."""
    names = (name for row in rows for name, value in row.items() if isinstance(value, int | float))
    return [name for name in dict.fromkeys(names) if name not in _NOT_METRICS]


def results_grid(summaries: Mapping[str, Mapping[str, Any]], *, title: str = "Results") -> Grid:
    """Runs side by side, one column each: parameters, file size, metrics of each split, time and memory.

    Args:
        summaries: content of ``summary.json`` by the name of the run.
        title: heading.
    """
    found: dict[tuple[str, str], None] = {}
    for summary in summaries.values():
        for split, values in summary.get("metrics", {}).items():
            found.update(dict.fromkeys((split, name) for name in metric_names([values])))
    order = list(SPLITS)
    metrics = sorted(found, key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order))
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("trainable parameters", lambda summary: formats.count(summary.get("trainable_parameters"))),
        ("file", lambda summary: formats.size(summary.get("file_bytes"))),
        *((f"{split} {metric_title(name)}", partial(_metric, split, name)) for split, name in metrics),
        ("training", lambda summary: formats.duration(summary.get("seconds"))),
        ("peak memory", lambda summary: formats.size(summary.get("peak_memory"))),
    ]
    cells = tuple((head, *(cell(summary) for summary in summaries.values())) for head, cell in rows)
    return Grid(title, ("", *summaries), cells)


def _metric(split: str, name: str, summary: Mapping[str, Any]) -> str:
    return formats.metric(name, summary.get("metrics", {}).get(split, {}).get(name))


def metrics_grid(metrics: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Final metrics, one row a split."""
    names = [name for name in ("loss",) if any(name in values for values in metrics.values())]
    names += metric_names(metrics.values())
    rows = tuple(
        (SPLITS.get(split, split), *(formats.metric(name, values.get(name)) for name in names))
        for split, values in metrics.items()
    )
    return Grid("Final metrics", ("split", *map(metric_title, names)), rows)


def per_class_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """Per-class metrics: each row has ``class``, metrics such as precision or iou, and how many there are of it.

    That is ``support``, images, or objects where the metrics are average precisions; or ``pixels``.
    """
    counted = "pixels" if any("pixels" in row for row in rows) else "support"
    names = metric_names({k: v for k, v in row.items() if k != counted} for row in rows)
    cells = tuple(
        (
            str(row.get("class", "")),
            *(formats.metric(name, row.get(name)) for name in names),
            formats.count(row.get(counted)),
        )
        for row in rows
    )
    unit = counted if counted == "pixels" else "objects" if "ap" in names else "images"
    return Grid("Per class", ("class", *map(metric_title, names), unit), cells)


def confusion_grid(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Grid:
    """The confusion matrix, true classes down and predicted ones across."""
    rows = tuple((name, *map(formats.count, row)) for name, row in zip(classes, confusion, strict=True))
    return Grid("Confusion matrix", ("true \\ predicted", *classes), rows)


def confused_pairs_grid(confusion: Sequence[Sequence[int]], classes: Sequence[str], *, limit: int = 20) -> Grid:
    """The most frequent mistakes, for matrices too large to print."""
    pairs = [
        (number, classes[i], classes[j], number / sum(row))
        for i, row in enumerate(confusion)
        for j, number in enumerate(row)
        if i != j and number
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows = tuple((a, b, formats.count(n), formats.percent(share)) for n, a, b, share in pairs[:limit])
    columns = ("true class", "predicted as", "images", "of the class")
    return Grid("Most frequent mistakes", columns, rows, text_columns=2)


def cost_grid(cost: Mapping[str, Any]) -> Grid:
    """Latency by model and batch size: median, quartiles, and the ratio to the backbone."""
    rows = []
    for row in cost.get("rows", []):
        ratio = row.get("ratio")
        rows.append(
            (
                str(row.get("name", "")),
                formats.count(row.get("batch")),
                _milliseconds(row.get("median_ms")),
                f"{_milliseconds(row.get('low_ms'))} to {_milliseconds(row.get('high_ms'))}",
                formats.NONE if ratio is None else f"{ratio:.3f}",
            )
        )
    columns = ("model", "batch", "median ms", "quartiles", "ratio to backbone")
    return Grid("Latency", columns, tuple(rows))


def _milliseconds(value: float | None) -> str:
    if value is None:
        return formats.NONE
    return f"{value:.{2 if value < 10 else 1 if value < 1000 else 0}f}"


def _dtype_holds(values: Mapping[str, Any]) -> bool:
    error, limit = values.get("rel_l2"), values.get("limit")
    return error is not None and limit is not None and error <= limit


def certificate_grid(certificate: Mapping[str, Any]) -> Grid:
    """Differences between merged and unmerged outputs, one row a number format."""
    rows, marks = [], {}
    for index, (dtype, values) in enumerate(certificate.get("dtypes", {}).items()):
        holds = _dtype_holds(values)
        errors = (formats.scientific(values.get(name)) for name in ("max_abs", "max_rel", "rel_l2", "limit"))
        rows.append((dtype, *errors, "holds" if holds else "FAILS"))
        marks[index, 5] = "good" if holds else "bad"
    columns = ("precision", "max. absolute", "max. relative", "relative L2", "limit", "verdict")
    return Grid("Merged against unmerged output", columns, tuple(rows), marks=marks)


def certificate_checks(certificate: Mapping[str, Any]) -> Grid:
    """What else the merged model must share with the untouched backbone."""
    rows: list[tuple[str, str, str]] = []

    def add(name: str, value: str, holds: bool) -> None:
        rows.append((name, value, "holds" if holds else "FAILS"))

    for key, name in (("keys_unchanged", "state-dict keys"), ("shapes_unchanged", "shapes")):
        if key in certificate:
            add(name, "unchanged" if certificate[key] else "changed", bool(certificate[key]))
    for key, name in (("hooks_left", "hooks left"), ("extra_modules", "extra modules")):
        if key in certificate:
            add(name, formats.count(certificate[key]), certificate[key] == 0)
    for key, name in (("parameters", "parameters"), ("operations", "operations a forward pass")):
        values = certificate.get(key)
        if values:
            merged, backbone = values.get("merged"), values.get("backbone")
            same = merged == backbone
            text = formats.count(merged) + ("" if same else f" instead of {formats.count(backbone)}")
            add(name, text, same)
    marks = {(i, 2): "good" if row[2] == "holds" else "bad" for i, row in enumerate(rows)}
    columns = ("of the merged model", "value", "equals the backbone")
    return Grid("Same model as the backbone", columns, tuple(rows), marks=marks)


def certificate_holds(certificate: Mapping[str, Any]) -> bool:
    """Whether every difference is within its limit and every check passed, by its own numbers and word."""
    dtypes = certificate.get("dtypes", {})
    checks = certificate_checks(certificate).rows
    numbers = bool(dtypes) and all(map(_dtype_holds, dtypes.values()))
    return numbers and all(row[2] == "holds" for row in checks) and certificate.get("holds", True) is True


def explain_grid(rows: Sequence[Row]) -> Grid:
    """The rows of :func:`refold.explain`: where adapters sit, whether each folds, and what was left out."""
    cells, marks = [], {}
    for index, row in enumerate(rows):
        verdict = _NO_ADAPTER.get(row.slot)
        if verdict is None:
            verdict = "folds" if row.mergeable else "does not fold"
            marks[index, 3] = "good" if row.mergeable else "bad"
        words = (row.path, row.slot, row.role, verdict, row.shift, row.reason)
        cells.append((*(word or formats.NONE for word in words), *_counts(row.width, row.parameters)))
    columns = ("path", "slot", "role", "verdict", "shift goes to", "reason", "width", "parameters")
    return Grid("Sites", columns, tuple(cells), text_columns=6, marks=marks)


def _counts(*values: int) -> Iterator[str]:
    return (formats.count(value or None) for value in values)
