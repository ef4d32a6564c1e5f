"""Tables: the cells are computed by hand, the terminal's text is read back."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from refold.inspection import Row
from refold.report import formats, grids, tables

CERTIFICATE = {
    "dtypes": {
        "float64": {"max_abs": 3e-15, "max_rel": 1e-12, "rel_l2": 2e-15, "limit": 1e-10},
        "float32": {"max_abs": 2e-6, "max_rel": 1e-4, "rel_l2": 9e-7, "limit": 1e-5},
    },
    "keys_unchanged": True,
    "shapes_unchanged": True,
    "hooks_left": 0,
    "extra_modules": 0,
    "parameters": {"backbone": 1000, "merged": 1000},
    "operations": {"backbone": 5_000_000, "merged": 5_000_000},
}


def shown(renderable, width=200):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable)
    return stream.getvalue()


def words(line):
    return line.split()


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formats.count, 221184, "221,184"),
        (formats.compact, 221184, "221 k"),
        (formats.compact, 21_704_450, "21.7 M"),
        (formats.compact, 999_700, "1 M"),
        (formats.compact, 12, "12"),
        (formats.size, 0, "0 B"),
        (formats.size, 959_232, "959 kB"),
        (formats.size, 88_320_000, "88.3 MB"),
        (formats.duration, 0.14, "0.1 s"),
        (formats.duration, 9.97, "10 s"),
        (formats.duration, 59.7, "1 min 00 s"),
        (formats.duration, 192, "3 min 12 s"),
        (formats.duration, 3599.8, "1 h 00 min"),
        (formats.duration, 7380, "2 h 03 min"),
        (formats.duration, float("nan"), "–"),
        (formats.percent, 0.8531, "85.3 %"),
        (formats.scientific, 2.13e-15, "2.1e-15"),
        (formats.scientific, 0.0, "0"),
        (formats.plain, None, "–"),
        (formats.plain, True, "yes"),
        (formats.plain, 0.001, "0.001"),
        (formats.plain, [0.8, 0.2, 0.0], "0.8, 0.2, 0"),
        (formats.plain, {"name": "LoRA", "rank": 8}, "name=LoRA, rank=8"),
    ],
)
def test_numbers_as_people_read_them(function, value, text):
    assert function(value) == text


def test_metrics_are_written_by_their_kind():
    assert formats.metric("accuracy", 0.8554) == "85.5 %"
    assert formats.metric("auroc", 0.8554) == "0.855"
    assert formats.metric("mae", 1234.5) == "1234"
    assert formats.metric("f1", float("nan")) == "–"


def test_results_table_puts_runs_side_by_side():
    summaries = {
        "LinearProbe": {
            "trainable_parameters": 770,
            "file_bytes": 3_400,
            "metrics": {"test": {"accuracy": 0.784}, "val": {"loss": 0.4, "accuracy": 0.79, "auroc": 0.83}},
            "seconds": 12.2,
            "peak_memory": 900_000_000,
        },
        "RepAdapter": {"trainable_parameters": 111_000, "metrics": {"val": {"accuracy": 0.86}}},
    }
    grid = grids.results_grid(summaries)
    assert grid.columns == ("", "LinearProbe", "RepAdapter")
    assert grid.rows == (
        ("trainable parameters", "770", "111,000"),
        ("file", "3.4 kB", "–"),
        ("val accuracy", "79.0 %", "86.0 %"),
        ("val AUROC", "0.830", "–"),
        ("test accuracy", "78.4 %", "–"),
        ("training", "12 s", "–"),
        ("peak memory", "900 MB", "–"),
    )
    text = shown(tables.results_table(summaries, title="ELPV"))
    assert "ELPV" in text
    assert "79.0 %" in text


def test_certificate_that_holds():
    assert grids.certificate_holds(CERTIFICATE)
    text = shown(tables.certificate_table(CERTIFICATE))
    assert "Exactness certificate: holds" in text
    assert "FAILS" not in text
    assert words(next(line for line in text.splitlines() if "float64" in line)) == [
        "float64", "3.0e-15", "1.0e-12", "2.0e-15", "1.0e-10", "holds"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"dtypes": {"float64": {"rel_l2": 2e-10, "limit": 1e-10}}},
        {"dtypes": {"float64": {"rel_l2": float("nan"), "limit": 1e-10}}},
        {"dtypes": {"float64": {"rel_l2": 0.0}}},
        {"dtypes": {}},
        {"keys_unchanged": False},
        {"shapes_unchanged": False},
        {"hooks_left": 1},
        {"holds": False},
        {"extra_modules": 2},
        {"parameters": {"backbone": 1000, "merged": 1001}},
        {"operations": {"backbone": 5_000_000, "merged": 5_100_000}},
    ],
)
def test_certificate_fails_on_any_single_breach(change):
    broken = CERTIFICATE | change
    assert not grids.certificate_holds(broken)
    assert "Exactness certificate: FAILS" in shown(tables.certificate_table(broken))


def test_certificate_shows_both_numbers_that_differ():
    checks = grids.certificate_checks(CERTIFICATE | {"parameters": {"backbone": 1000, "merged": 1001}})
    assert checks.rows[4] == ("parameters", "1,001 instead of 1,000", "FAILS")
    assert checks.mark(4, 2) == "bad"


def test_cost_table():
    cost = {
        "rows": [
            {"name": "backbone", "batch": 1, "median_ms": 9.875, "low_ms": 9.5, "high_ms": 10.25, "ratio": 1.0},
            {"name": "merged", "batch": 16, "median_ms": 1234.5, "low_ms": 999.94, "high_ms": 1300, "ratio": 0.9995},
        ]
    }
    assert grids.cost_grid(cost).rows == (
        ("backbone", "1", "9.88", "9.50 to 10.2", "1.000"),
        ("merged", "16", "1234", "999.9 to 1300", "1.000"),
    )
    assert "Latency" in shown(tables.cost_table(cost))


def test_explain_table_shows_verdict_and_reason():
    rows = (
        Row("blocks.0.attn.qkv", "input", "attention", 384, 9216, True, "folds exactly", "the layer's bias"),
        Row("stages.0.[dw]", "input", "", 96, 1920, False, "depthwise", ""),
        Row("head", "head", "", 0, 770, True, "trained in the backbone's own tensors", ""),
        Row("norm", "-", "", 0, 0, False, "left out: not reached", ""),
    )
    grid = grids.explain_grid(rows)
    assert grid.rows[0][3:] == ("folds", "the layer's bias", "folds exactly", "384", "9,216")
    assert grid.rows[1] == ("stages.0.[dw]", "input", "–", "does not fold", "–", "depthwise", "96", "1,920")
    assert [row[3] for row in grid.rows[2:]] == ["trained", "left out"]
    assert [grid.mark(i, 3) for i in range(4)] == ["good", "bad", "", ""]
    assert "stages.0.[dw]" in shown(tables.explain_table(rows))  # brackets are no markup


def test_confused_pairs_are_the_most_frequent_mistakes():
    grid = grids.confused_pairs_grid([[5, 3, 0], [1, 9, 0], [4, 0, 4]], ["a", "b", "c"], limit=2)
    assert grid.rows == (("c", "a", "4", "50.0 %"), ("a", "b", "3", "37.5 %"))


def test_every_row_has_a_cell_for_every_column():
    row = {"class": "x", "support": 4, "precision": 0.5, "recall": 0.25, "f1": 1 / 3}
    for grid in (
        grids.per_class_grid([row, {**row, "auroc": 0.7}]),
        grids.metrics_grid({"val": {"loss": 0.1, "accuracy": 1.0}, "test": {"accuracy": 0.5}}),
        grids.confusion_grid([[1, 2], [3, 4]], ["a", "b"]),
        grids.certificate_grid(CERTIFICATE),
        grids.certificate_checks(CERTIFICATE),
    ):
        assert grid.rows
        assert all(len(cells) == len(grid.columns) for cells in grid.rows)
