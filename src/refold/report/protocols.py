"""Tables and figures of protocols."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from refold.report.formats import NONE, count, duration
from refold.report.grids import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from refold.protocols import DomainResult, FewShotResult, RobustnessResult, SuiteResult, VtabResult

__all__ = [
    "domain_grid",
    "few_shot_curves",
    "few_shot_grid",
    "pairs_grid",
    "robustness_grid",
    "suite_grid",
    "vtab_grid",
]


def vtab_grid(result: VtabResult) -> Grid:
    """A row a task, then the means of groups and both averages; accuracies in percent."""
    from refold.protocols.vtab import GROUPS, TASKS

    seeds = len(result.rows[0].accuracy) if result.rows else 0
    how = "best epoch and candidate ON TEST, as published" if result.published_protocol else "last epoch"
    title = f"VTAB-1k, {result.method}: test accuracy, {how}; {_seeds(seeds)}; inputs normalised: {result.normalize}"

    def rows() -> Iterator[tuple[str, ...]]:
        for row in result.rows:
            task = TASKS[row.name]
            images = count(row.images) + ("" if row.images == task.test else f" of {count(task.test)}")
            yield task.title, task.group, str(row.point), row.accuracy.percent(), images, duration(row.seconds)
        for name in GROUPS:
            yield f"mean of {name}", "", "", _share(result.group(name)), "", ""
        yield "mean of the three groups", "", "", _share(result.group_average), "", ""
        yield "mean of the 19 tasks", "", "", _share(result.task_average), "", ""

    return Grid(title, ("task", "group", "chosen", "accuracy %", "test images", "training"), tuple(rows()), 3)


def few_shot_grid(result: FewShotResult) -> Grid:
    """A row a method, a column a number of shots; accuracies in percent."""
    methods = list(dict.fromkeys(row.method for row in result.rows))
    shots = sorted({row.shots for row in result.rows})
    found = {(row.method, row.shots): row for row in result.rows}
    seeds = len(result.rows[0].accuracy)
    title = (
        f"Few shots of {result.classes} classes: accuracy % on {count(result.test_images)} test images, last epoch; "
        f"{_seeds(seeds)}"
    )
    searched = any(row.candidates for row in result.rows)

    def cell(method: str, number: int) -> str:
        row = found[method, number]
        return row.accuracy.percent() + (f" ({row.point})" if searched else "")

    rows = tuple((method, *(cell(method, number) for number in shots)) for method in methods)
    return Grid(title, ("method", *(f"{number} shot{'s' * (number > 1)}" for number in shots)), rows)


def few_shot_curves(result: FewShotResult) -> Figure:
    """Test accuracy against shots, one line a method, with standard deviations over the seeds."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

    from refold.report.figures import CYCLE, MARKERS, blank_figure, drawing_style

    with drawing_style():
        figure = blank_figure(6.4, 4.4)
        axes = figure.add_subplot()
        for index, method in enumerate(dict.fromkeys(row.method for row in result.rows)):
            rows = [row for row in result.rows if row.method == method]
            axes.errorbar(
                [row.shots for row in rows],
                [row.accuracy.mean for row in rows],
                yerr=[row.accuracy.spread for row in rows],
                marker=MARKERS[index % len(MARKERS)],
                color=CYCLE[index % len(CYCLE)],
                elinewidth=0.8,
                capsize=2,
                label=method,
            )
        shots = sorted({row.shots for row in result.rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.set_xlabel("training images of each class")
        axes.set_ylabel("test accuracy")
        axes.legend(fontsize=8)
        return figure


def domain_grid(result: DomainResult) -> Grid:
    """A row a method: the source's own test set, every further set, and their mean; accuracies in percent."""
    names = [name for name in result.images if name]
    trained = "all training images" if result.shots is None else f"{result.shots} images of each class"
    seeds = len(result.rows[0].average)
    title = f"Trained on {trained}: test accuracy %, last epoch; {_seeds(seeds)}"
    columns = (f"{name or 'source'}, {count(images)} images" for name, images in result.images.items())

    rows = []
    for row in result.rows:
        own = [row.source.percent()] if row.source is not None else []
        apart = [row.others[name].percent() for name in names]
        rows.append((row.method, str(row.point), *own, *apart, row.average.percent()))
    return Grid(title, ("method", "chosen", *columns, "mean of the others"), tuple(rows), 2)


def suite_grid(result: SuiteResult) -> Grid:
    """A row a method, a column a data set, and the mean; accuracies in percent."""
    found = {(row.method, row.data): row for row in result.rows}
    searched = any(row.candidates for row in result.rows)

    def cell(method: str, data: str) -> str:
        row = found[method, data]
        return row.accuracy.percent() + (f" ({row.point})" if searched else "")

    title = f"Test accuracy %, last epoch; {_seeds(len(result.rows[0].accuracy))}"
    columns = ("method", *(f"{name}, {count(images)} images" for name, images in result.images.items()), "mean")
    methods = dict.fromkeys(row.method for row in result.rows)
    rows = ((m, *(cell(m, name) for name in result.images), result.average(m).percent()) for m in methods)
    return Grid(title, columns, tuple(rows))


def robustness_grid(result: RobustnessResult) -> Grid:
    """A column an adapter: clean accuracy, calibration error, and the mean over severities of each corruption."""
    adapters, corruptions = result.rows, list(result.rows[0].corrupted)
    rows = [
        ("clean", *(f"{100 * one.accuracy:.1f}" for one in adapters)),
        ("calibration error", *(f"{100 * one.calibration_error:.1f}" for one in adapters)),
    ]
    for name in corruptions:
        means = (statistics.mean(one.corrupted[name]) for one in adapters)
        rows.append((name.replace("_", " "), *(f"{100 * mean:.1f}" for mean in means)))
    if corruptions:
        rows.append(("mean of corruptions", *(_share(one.corrupted_mean) for one in adapters)))
    title = f"Accuracy % on {count(result.images)} images"
    return Grid(title, ("", *(one.name for one in adapters)), tuple(rows))


def pairs_grid(result: RobustnessResult) -> Grid:
    """A row a pair of adapters: how their mistakes differ, in percent of all images."""
    rows = tuple(
        (
            *pair.names,
            *(f"{100 * value:.1f}" for value in (pair.only_first, pair.only_second, pair.neither, pair.either)),
        )
        for pair in result.pairs
    )
    columns = ("first", "second", "only the first right", "only the second", "neither", "at least one")
    return Grid("Mistakes, % of the images", columns, rows, 2)


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"
