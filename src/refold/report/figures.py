"""The figures of the report and of the benchmarks, drawn without pyplot, so without global state.

Every function returns a :class:`matplotlib.figure.Figure`; :func:`to_svg` makes it part of a page, following
the page's light or dark colours, and :func:`save` writes a file of its own.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.report import formats
from refold.report.grids import SPLITS, metric_names, metric_title
from refold.report.labels import name_dots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_against",
    "blank_figure",
    "confusion_matrix",
    "drawing_style",
    "learning_curves",
    "ratio_bars",
    "regression_scatter",
    "save",
    "seed_panels",
    "to_svg",
]

INK, RULE = "#1c2530", "#d5dbe2"  # replaced by the page's own colours in `to_svg`
BLUE, ORANGE, GREEN, PURPLE, RED = "#3b7dd8", "#e07b39", "#2c9f75", "#8b67d1", "#d5504c"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, "#c79a1b", "#3aa3b8", "#b55a9b")
MARKERS = "osD^vPX"
SPLIT_STYLE = {"train": (ORANGE, "--"), "val": (BLUE, "-"), "test": (GREEN, "-")}
READABLE_CLASSES = 30  # more cannot be labelled legibly
MAX_POINTS = 5000  # dots of a scatter beyond which the page only grows


@contextmanager
def drawing_style() -> Iterator[None]:
    """What every figure is made and written in: one look, whatever the caller's matplotlib is set to."""
    import matplotlib

    settings: Any = {
        "axes.axisbelow": True,
        "axes.edgecolor": RULE,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": INK,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "figure.facecolor": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; no search for fonts, no warning
        "font.size": 9.0,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "svg.fonttype": "none",  # text stays text: small, searchable, in the fonts of the reader
        "svg.hashsalt": "refold",
        "text.color": INK,
        "text.parse_math": False,  # a class may be called "$5"
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Class names in scripts that DejaVu lacks: as SVG text the reader's own fonts show them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that pyplot does not know of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_svg(figure: Figure, *, label: str) -> str:
    """The figure as an ``<svg>`` element that scales with the page and takes its colours.

    Args:
        figure: what to draw.
        label: description for readers who cannot see it.
    """
    from html import escape

    buffer = io.StringIO()
    with drawing_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    body = buffer.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    opening, rest = body.split(">", 1)
    opening = re.sub(r'\s(?:width|height)="[^"]*"', "", opening)
    body = f'{opening} role="img" aria-label="{escape(label)}">{rest}'
    return body.replace(INK, "currentColor").replace(RULE, "var(--rule)").strip()


def save(figure: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Write the figure on white to ``path``; the suffix chooses the format (.png, .svg, .pdf)."""
    path = Path(path)
    with drawing_style():
        figure.savefig(path, dpi=dpi, facecolor="white")
    return path


# --- training -------------------------------------------------------------------------------------------


def learning_curves(rows: Sequence[Mapping[str, Any]], *, best_epoch: int | None = None) -> dict[str, Figure]:
    """Loss, each metric and the learning rate over epochs: one small figure each, by title.

    Args:
        rows: lines of ``metrics.jsonl``.
        best_epoch: marked by a vertical line.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figures = {}
    with drawing_style():
        for quantity in ("loss", *metric_names(rows), "lr"):
            series = {split: _series(rows, split, quantity) for split in SPLIT_STYLE}
            if not any(series.values()):
                continue
            figure = blank_figure(3.6, 2.5)
            axes = figure.add_subplot()
            for split, points in series.items():
                if points:
                    color, dash = SPLIT_STYLE[split]
                    alone = {"marker": "o", "markersize": 5} if len(points) == 1 else {}
                    epochs, values = zip(*points, strict=True)
                    axes.plot(epochs, values, color=color, linestyle=dash, label=SPLITS[split], **alone)
            if best_epoch is not None:
                axes.axvline(best_epoch, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
            title = "learning rate" if quantity == "lr" else metric_title(quantity)
            axes.set_title(title, loc="left")
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if quantity == "lr":
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
            else:
                axes.legend(fontsize=8)
            figures[title] = figure
    return figures


def _series(rows: Sequence[Mapping[str, Any]], split: str, name: str) -> list[tuple[float, float]]:
    points = {}
    for row in rows:
        value = row.get(name)
        if row.get("split") == split and isinstance(value, int | float) and row.get("epoch") is not None:
            points[row["epoch"]] = value
    return sorted(points.items())


# --- results --------------------------------------------------------------------------------------------


def confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """The confusion matrix, coloured by the share of the true class; counts are written where they fit.

    Args:
        confusion: (classes, classes) counts, true classes down.
        classes: their names.
    """
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    counts = np.asarray(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    n = len(classes)
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name in classes]
    with drawing_style():
        side = 2.6 + min(5.0, 0.42 * n)
        figure = blank_figure(side + 0.9, side)
        axes = figure.add_subplot()
        axes.grid(visible=False)
        clear_to_blue = LinearSegmentedColormap.from_list("refold", [f"{BLUE}00", f"{BLUE}ff"])
        # Cells as vectors stay sharp at any zoom; hundreds of classes as vectors would bloat the page.
        many = n > 60
        axes.pcolormesh(
            shares,
            cmap=clear_to_blue,
            vmin=0,
            vmax=1,
            edgecolors="none" if many else RULE,
            linewidth=0.4,
            rasterized=many,
        )
        axes.invert_yaxis()
        axes.set_aspect("equal")
        if n <= READABLE_CLASSES:
            centers = np.arange(n) + 0.5
            flat = n <= 3 and max(map(len, names)) <= 12
            axes.set_xticks(centers, names, rotation=0 if flat else 45, ha="center" if flat else "right")
            axes.set_yticks(centers, names)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        if n <= 15:
            for i in range(n):
                for j in range(n):
                    color = "white" if shares[i, j] > 0.6 else INK
                    axes.text(j + 0.5, i + 0.5, f"{counts[i, j]:.0f}", ha="center", va="center", color=color)
        axes.spines[:].set_visible(True)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        return figure


def regression_scatter(targets: Sequence[float], predictions: Sequence[float]) -> Figure:
    """Predicted against true values, with the line on which a perfect model's dots lie."""
    import numpy as np

    true, predicted = np.asarray(targets, dtype=float), np.asarray(predictions, dtype=float)
    if len(true) > MAX_POINTS:
        keep = np.random.default_rng(0).choice(len(true), MAX_POINTS, replace=False)
        true, predicted = true[keep], predicted[keep]
    with drawing_style():
        figure = blank_figure(4.6, 4.4)
        axes = figure.add_subplot()
        ends = (min(true.min(), predicted.min()), max(true.max(), predicted.max()))
        axes.plot(ends, ends, color=INK, linewidth=0.9, linestyle="--", alpha=0.6)
        axes.scatter(true, predicted, s=14, color=BLUE, alpha=0.55, linewidths=0)
        axes.set_xlabel("true")
        axes.set_ylabel("predicted")
        axes.set_aspect("equal", adjustable="datalim")
        return figure


# --- benchmarks -----------------------------------------------------------------------------------------


def accuracy_against(
    points: Sequence[Mapping[str, Any]], quantity: str, label: str, *, metric: str = "accuracy", log: bool = True
) -> Figure:
    """Metric against a cost, one dot a method, its name beside it, its group in colour.

    Args:
        points: records with ``name``, ``value``, the cost under ``quantity`` and, optionally, ``error`` (plus or
            minus) and ``group``.
        quantity: key of the cost.
        label: what the cost is, for the axis.
        metric: what ``value`` is.
        log: whether the cost's axis is logarithmic.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    groups = list(dict.fromkeys(point.get("group") for point in points))
    with drawing_style():
        figure = blank_figure(7.6, 5.2)
        axes = figure.add_subplot()
        for index, group in enumerate(groups):
            members = [point for point in points if point.get("group") == group]
            axes.errorbar(
                [point[quantity] for point in members],
                [point["value"] for point in members],
                yerr=[point.get("error") or 0.0 for point in members],
                fmt=MARKERS[index % len(MARKERS)],
                markersize=6,
                elinewidth=0.7,
                color=CYCLE[index % len(CYCLE)],
                label=group,
            )
        if groups != [None]:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(groups))
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.08, y=0.08)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.compact(value)))
        if metric == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_xlabel(label)
        axes.set_ylabel(metric_title(metric))
        figure.draw_without_rendering()  # the layout is fixed before names are placed in it
        figure.set_layout_engine("none")
        name_dots(axes, [(point["name"], point[quantity], point["value"]) for point in points])
        return figure


def seed_panels(
    panels: Mapping[str, Mapping[str, Sequence[float]]], *, label: str, columns: int = 2, shared: bool = True
) -> Figure:
    """Scores of several seeds: a panel a comparison, a line a candidate, a small dot a seed, a large one their mean.

    Args:
        panels: title -> name of the candidate -> its score with each seed, 0 to 1.
        label: what the scores are, for the axis.
        columns: panels side by side.
        shared: whether all panels have one axis; otherwise each has its own.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rows = math.ceil(len(panels) / columns)
    tallest = max(len(candidates) for candidates in panels.values())
    with drawing_style():
        figure = blank_figure(3.7 * columns, rows * (0.95 + 0.25 * tallest))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=shared)
        for index, (axes, (title, candidates)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            for height, scores in enumerate(candidates.values()):
                colour = CYCLE[index % len(CYCLE)]
                axes.plot(scores, [height] * len(scores), "o", color=colour, alpha=0.4, markersize=4)
                axes.plot([sum(scores) / len(scores)], [height], "o", color=colour, markersize=7)
            axes.set_yticks(range(len(candidates)), list(candidates))
            axes.set_ylim(len(candidates) - 0.5, -0.5)
            axes.set_title(title)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            axes.tick_params(labelbottom=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(label, fontsize=9)
        return figure


def ratio_bars(rows: Sequence[Mapping[str, Any]], *, label: str, reference: str) -> Figure:
    """Horizontal bars of ratios to a reference, which is the line at 1.

    Args:
        rows: records with ``name``, ``ratio`` and, optionally, ``ratio_low`` and ``ratio_high``.
        label: what the ratio compares, for the axis.
        reference: name of what the ratios divide by.
    """
    with drawing_style():
        figure = blank_figure(6.4, 0.9 + 0.38 * len(rows))
        axes: Axes = figure.add_subplot()
        axes.grid(visible=False, axis="y")
        widest = max([1.0, *(row.get("ratio_high") or row["ratio"] for row in rows)])
        for index, row in enumerate(rows):
            ratio = row["ratio"]
            low, high = row.get("ratio_low"), row.get("ratio_high")
            spread = None if low is None or high is None else [[ratio - low], [high - ratio]]
            axes.barh(index, ratio, color=BLUE, height=0.62, xerr=spread, ecolor=INK, capsize=3)
            beside = axes.get_yaxis_transform()
            axes.text(1.02, index, f"{ratio:.2f}", va="center", weight="bold", transform=beside)
        axes.axvline(1, color=INK, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.04 * widest)
        axes.set_xlabel(f"{label} ({reference} = 1)")
        return figure
