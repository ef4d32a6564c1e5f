"""Figures: what was drawn is read back from the artists, and the page's SVG from its XML."""

from __future__ import annotations

import math
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from refold.report import figures

ROWS = [
    {"epoch": e, "step": 5 * e, "split": s, "loss": 1 / e, "accuracy": 1 - 0.5 / e, "seconds": 1.0}
    | ({"lr": 1e-3 / e} if s == "train" else {})
    for e in (1, 2, 3)
    for s in ("train", "val")
]


def texts(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_learning_curves_draw_the_rows():
    panels = figures.learning_curves(ROWS, best_epoch=2)
    assert list(panels) == ["loss", "accuracy", "learning rate"]
    axes = panels["accuracy"].axes[0]
    train, val, best = axes.lines
    assert train.get_label() == "training"
    assert val.get_xydata().tolist() == [[1, 0.5], [2, 0.75], [3, 1 - 0.5 / 3]]
    assert best.get_xdata() == [2, 2]
    assert len(panels["learning rate"].axes[0].lines) == 2  # no learning rate on validation


def test_learning_curves_of_one_epoch_and_of_none():
    one = figures.learning_curves(ROWS[:2])["loss"].axes[0]
    assert [line.get_marker() for line in one.lines] == ["o", "o"]  # a line through one point is invisible
    assert figures.learning_curves([]) == {}
    nothing = figures.learning_curves([{"split": "val", "epoch": 1, "loss": math.nan}])
    figures.to_svg(nothing["loss"], label="not a number")


def test_confusion_matrix_is_coloured_by_row_and_labelled():
    figure = figures.confusion_matrix([[8, 2], [0, 1]], ["ok", "<b>$bad$</b>"])
    axes = figure.axes[0]
    assert axes.collections[0].get_array().tolist() == [[0.8, 0.2], [0.0, 1.0]]
    assert [t.get_text() for t in axes.texts] == ["8", "2", "0", "1"]
    svg = figures.to_svg(figure, label='a "quoted" & <marked> label')
    assert texts(svg).count("<b>$bad$</b>") == 2
    assert ElementTree.fromstring(svg).attrib["aria-label"] == 'a "quoted" & <marked> label'


def test_confusion_matrix_of_many_classes_stays_small():
    rng = np.random.default_rng(0)
    figure = figures.confusion_matrix(rng.integers(0, 9, (300, 300)).tolist(), [f"c{i}" for i in range(300)])
    svg = figures.to_svg(figure, label="many")
    assert texts(svg) == ["predicted", "true"]
    assert len(svg) < 1_000_000


def test_a_class_without_images_is_no_division_by_zero():
    figure = figures.confusion_matrix([[0, 0], [1, 3]], ["absent", "present"])
    assert figure.axes[0].collections[0].get_array()[0].tolist() == [0, 0]


def test_regression_scatter_shows_every_point_up_to_a_limit():
    rng = np.random.default_rng(0)
    true = rng.normal(size=20)
    axes = figures.regression_scatter(true, true + 0.1).axes[0]
    assert np.allclose(axes.collections[0].get_offsets(), np.stack([true, true + 0.1], 1))
    many = rng.normal(size=figures.MAX_POINTS + 1000)
    assert len(figures.regression_scatter(many, many).axes[0].collections[0].get_offsets()) == figures.MAX_POINTS


def test_svg_follows_the_page_and_needs_no_font():
    svg = figures.to_svg(figures.learning_curves(ROWS)["loss"], label="loss")
    root = ElementTree.fromstring(svg)
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "currentColor" in svg
    assert figures.INK not in svg
    assert {"loss", "epoch", "training", "validation"} <= set(texts(svg))
    assert "http" not in svg.replace("http://www.w3.org/", "")
    again = figures.to_svg(figures.learning_curves(ROWS)["loss"], label="loss")
    assert again == svg  # the same run gives the same page


def test_scripts_without_a_glyph_warn_nobody():
    svg = figures.to_svg(figures.confusion_matrix([[1, 0], [0, 1]], ["猫", "犬"]), label="cats and dogs")
    assert texts(svg).count("猫") == 2


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_benchmark_figures_are_saved(tmp_path, suffix):
    points = [
        {"name": "LinearProbe", "parameters": 770, "value": 0.784, "error": 0.004},
        {"name": "RepAdapter", "parameters": 222_000, "value": 0.855, "error": 0.006},
        {"name": "FullFineTune", "parameters": 21_700_000, "value": 0.857},
    ]
    path = figures.save(figures.accuracy_against(points, "parameters", "parameters"), tmp_path / f"a.{suffix}")
    assert path.stat().st_size > 1000
    if suffix == "png":
        with Image.open(path) as picture:
            assert picture.convert("RGB").getpixel((1, 1)) == (255, 255, 255)


def test_accuracy_against_places_points_names_and_groups():
    points = [
        {"name": "a", "parameters": 1000, "value": 0.5, "error": 0.1, "group": "folds"},
        {"name": "b", "parameters": 1e6, "value": 0.75, "group": "stays"},
    ]
    figure = figures.accuracy_against(points, "parameters", "trainable", metric="auroc")
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["folds", "stays"]
    assert axes.containers[0].lines[0].get_xydata().tolist() == [[1000, 0.5]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("trainable", "AUROC")
    assert [(t.get_text(), t.xy) for t in axes.texts] == [("a", (1000, 0.5)), ("b", (1e6, 0.75))]
    assert "1 k" in texts(figures.to_svg(figure, label="x"))
    plain = figures.accuracy_against([{"name": "a", "seconds": 2.0, "value": 0.5}], "seconds", "time", log=False)
    assert plain.axes[0].get_legend() is None
    assert plain.axes[0].get_xscale() == "linear"


def test_names_of_close_dots_do_not_cover_each_other():
    points = [{"name": f"method {k}", "parameters": 1e5 + 500 * k, "value": 0.8 + 1e-4 * k} for k in range(8)]
    figure = figures.accuracy_against(points, "parameters", "parameters")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_ratio_bars_have_their_length_and_interval():
    rows = [
        {"name": "merged", "ratio": 1.0, "ratio_low": 0.99, "ratio_high": 1.01},
        {"name": "unmerged", "ratio": 1.2},
    ]
    axes = figures.ratio_bars(rows, label="latency", reference="backbone").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.2]
    assert [t.get_text() for t in axes.texts] == ["1.00", "1.20"]
    assert axes.get_xlabel() == "latency (backbone = 1)"
    assert axes.get_xlim()[0] == 0


def test_seed_panels_show_every_seed_and_their_mean():
    panels = {"groups": {"1": [0.5, 0.7], "2": [0.6]}, "scale": {"10": [0.2, 0.4]}, "width": {"8": [0.9]}}
    figure = figures.seed_panels(panels, label="accuracy")
    first, second, third, empty = figure.axes
    assert [axes.get_title() for axes in (first, second, third)] == list(panels)
    assert not empty.get_visible()
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["1", "2"]
    seeds, mean, *others = first.lines
    assert list(seeds.get_xdata()) == [0.5, 0.7]
    assert list(mean.get_xdata()) == [pytest.approx(0.6)]
    assert [list(line.get_ydata()) for line in (seeds, mean, *others)] == [[0, 0], [0], [1], [1]]
    assert first.get_ylim()[0] > first.get_ylim()[1]  # the first candidate is on top
    assert first.get_xlim() == second.get_xlim()
    apart = figures.seed_panels(panels, label="accuracy", shared=False).axes
    assert apart[0].get_xlim() != apart[1].get_xlim()


def test_no_global_state_is_left():
    before = dict(matplotlib.rcParams)
    figures.to_svg(figures.confusion_matrix([[1]], ["only"]), label="one")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
