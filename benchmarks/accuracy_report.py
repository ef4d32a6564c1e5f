"""The results of the accuracy benchmark: one table, two plots, and what README.md shows of them.

Written from what is finished: ``results/accuracy.json``, ``results/accuracy.md`` (README's table),
``docs/methods/results.md``, ``docs/results/suite.md`` and two figures.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import accuracy_cost
import accuracy_data
import accuracy_runs
import common
import refold
from accuracy_entries import BACKBONES, LEFT_OUT, LITE, VIT, Entry, entries
from refold.bench import measure
from refold.report import figures

DOCS = Path(__file__).parent.parent / "docs"
PAGE, SUITE = DOCS / "methods" / "results.md", DOCS / "results" / "suite.md"
FIRST, *FURTHER = accuracy_data.EPOCHS
BEST = 6
Rows = dict[tuple[str, str], dict[str, Any]]  # (data set, entry's slug) -> row of accuracy_runs.suite


def finished() -> Rows:
    """The rows that need no run any more."""
    rows: Rows = {}
    for entry in entries():
        for dataset in accuracy_data.EPOCHS:
            try:
                rows[dataset, entry.slug] = accuracy_runs.suite(dataset, entry)
            except (accuracy_runs.Unfinished, refold.RefoldError):
                continue
    return rows


def best(rows: Rows) -> list[Entry]:
    """The entries on the ViT that go on to the further data sets: the best six by validation accuracy on the first."""
    known = [e for e in entries() if e.backbone == VIT and (FIRST, e.slug) in rows]
    return sorted(known, key=lambda e: -accuracy_runs.validation(rows[FIRST, e.slug]))[:BEST]


def paired(rows: Rows, dataset: str, a: str, b: str) -> dict[str, Any] | None:
    """Mean difference of test accuracy a - b over seeds, and its standard error."""
    pair = [next((r for (d, _), r in rows.items() if d == dataset and r["method"] == name), None) for name in (a, b)]
    if pair[0] is None or pair[1] is None:
        return None
    gaps = [x - y for x, y in zip(pair[0]["test_accuracy"], pair[1]["test_accuracy"], strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return {"dataset": dataset, "a": a, "b": b, "gap": statistics.mean(gaps), "standard_error": error}


# --- tables ---------------------------------------------------------------------------------------------


def spread(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    values = row["test_accuracy"]
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def ranked(rows: Rows, backbone: str) -> list[Entry]:
    """Finished entries of one backbone, by mean test accuracy on the first data set."""
    known = [e for e in entries() if e.backbone == backbone and (FIRST, e.slug) in rows]
    return sorted(known, key=lambda e: -statistics.mean(rows[FIRST, e.slug]["test_accuracy"]))


def folds(entry: Entry, cost: dict[str, Any] | None) -> bool:
    """Whether nothing is left at inference: as measured, or as the method says where nothing was measured yet."""
    return cost["inference"]["merged"] if cost else entry.build().mergeable


def table(rows: Rows, chosen: list[Entry], *, short: bool = False) -> str:
    """One line an entry, a column for each data set with results; ``short`` leaves out what README has no room for."""
    sets = [d for d in accuracy_data.EPOCHS if any((d, e.slug) in rows for e in chosen)]
    cells = []
    for entry in chosen:
        row, cost = rows[FIRST, entry.slug], accuracy_cost.read(entry)
        step = f"{cost['step']['ratio']:.2f}" if cost else "–"
        stored = f"{cost['step']['stored_ratio']:.2f}" if cost else "–"
        latency = f"{cost['inference']['batch_1']['ratio']:.2f}" if cost else "–"
        accuracy = [spread(rows.get((dataset, entry.slug))) for dataset in sets]
        line = [entry.label, f"{row['adapter_parameters']:,}", *accuracy, step, stored, latency]
        cells.append(line if short else [*line, "yes" if folds(entry, cost) else "no", row["point"]])
    heads = ["method", "parameters beside the head", *(f"{d}, accuracy %" for d in sets)]
    heads += ["step / full", "stored bytes / full", "inference / backbone"]
    heads += [] if short else ["adds nothing", "chosen rate"]
    kept = [k for k in range(len(heads)) if any(line[k] != "–" for line in cells)]  # columns with something in them
    return common.markdown([heads[k] for k in kept], [[line[k] for k in kept] for line in cells])


# --- the page -------------------------------------------------------------------------------------------


def missing(rows: Rows) -> dict[str, str]:
    """Methods that have no row, and why."""
    reasons = {name: reason for name, reason in LEFT_OUT.items() if name in refold.METHODS}
    for entry in entries():
        if (FIRST, entry.slug) not in rows:
            reasons[f"{entry.label} on {BACKBONES[entry.backbone]}"] = _why(entry)
    return reasons


def _why(entry: Entry) -> str:
    try:
        accuracy_runs.suite(FIRST, entry)
    except accuracy_runs.Unfinished:
        return accuracy_runs.refusal(entry) or "not run yet"
    except refold.RefoldError as error:
        return str(error)
    return "finished"


def plots(rows: Rows) -> None:
    points = []
    for entry in ranked(rows, VIT):
        row, cost = rows[FIRST, entry.slug], accuracy_cost.read(entry)
        points.append(
            {
                "name": entry.label,
                "parameters": row["trainable_parameters"],
                "step": cost["step"]["ratio"] if cost else None,
                "value": statistics.mean(row["test_accuracy"]),
                "error": statistics.stdev(row["test_accuracy"]),
                "group": "adds nothing at inference" if folds(entry, cost) else "stays at inference",
            }
        )
    common.FIGURES.mkdir(parents=True, exist_ok=True)
    for quantity, label, log in (
        ("parameters", "trainable parameters, head included", True),
        ("step", "time of a training step / full fine-tuning", False),
    ):
        known = [point for point in points if point[quantity] is not None]
        if known:
            figure = figures.accuracy_against(known, quantity, label, log=log)
            figures.save(figure, common.FIGURES / f"accuracy_{quantity}.png")


def page(rows: Rows) -> str:
    six = ", ".join(entry.label for entry in best(rows))
    absent = "\n".join(f"* {name}: {reason}" for name, reason in missing(rows).items())
    lite = ranked(rows, LITE)
    drawn = [q for q in ("parameters", "step") if (common.FIGURES / f"accuracy_{q}.png").exists()]
    parts = [
        "# Results",
        "<!-- written by `python benchmarks/accuracy.py report`; do not edit -->",
        f"{BACKBONES[VIT]} at {accuracy_runs.SIZE} px, AdamW, batch 32, flips, {len(accuracy_runs.SEEDS)} seeds. The "
        "learning rate, or the scale, comes from a grid of three by validation accuracy with seed 0; the head's is "
        "the one that the linear probe chose. Test is scored once: mean and standard deviation over seeds. "
        f"elpv: {accuracy_data.INSPECTION['elpv'][0]} training, {accuracy_data.INSPECTION['elpv'][1]} validation and "
        f"{accuracy_data.INSPECTION['elpv'][2]} test images, {accuracy_data.EPOCHS['elpv']} epochs, every method. The "
        f"best six of it by validation ({six}) also run on textile, the cut-outs and a part of Fashion-MNIST, as does "
        "the linear probe.",
        f"cut-outs: {accuracy_data.SHOTS} training and {accuracy_data.VALIDATION} validation images a class from the "
        "stamps of Tux Paint (Debian's tuxpaint-stamps-default, GPL-2, not part of refold), photographs and drawings "
        "cut out and put on plain white; the class is the category folder, mirrored and near-equal files are left out; "
        f"{accuracy_data.EPOCHS['cut-outs']} epochs.",
        "Step and stored bytes are ratios to full fine-tuning, inference (merged where the method folds away, batch 1) "
        "to the plain backbone, each timed side by side in one run.",
        table(rows, ranked(rows, VIT)),
        *(f"![accuracy against {q}](../figures/accuracy_{q}.png)" for q in drawn),
        *([f"## {BACKBONES[LITE]}", table(rows, lite)] if lite else []),
        *(["## Not in the tables", absent] if absent else []),
    ]
    return "\n\n".join(parts) + "\n"


def suite_page(rows: Rows) -> str | None:
    """The data sets as one suite, of the methods that are finished on all of them; None if there is none."""
    cells = []
    for entry in ranked(rows, VIT):
        mine = [rows.get((dataset, entry.slug)) for dataset in accuracy_data.EPOCHS]
        if all(mine):
            runs = zip(*(row["test_accuracy"] for row in mine if row), strict=True)
            means = [100 * statistics.mean(accuracies) for accuracies in runs]
            average = f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}"
            cells.append((statistics.mean(means), [entry.label, *map(spread, mine), average]))
    if not cells:
        return None
    train, val, test = accuracy_data.DRAWN
    return "\n\n".join(
        [
            "# Four tasks in the manner of VTAB-1k",
            "<!-- written by `python benchmarks/accuracy.py report`; do not edit -->",
            f"{BACKBONES[VIT]} at {accuracy_runs.SIZE} px. Two of inspection (electroluminescence of solar cells, "
            f"textiles), cut-outs of {accuracy_data.SHOTS} training images a class, and Fashion-MNIST with {train} "
            f"training, {val} validation and {test} test images. The methods are the best six on ELPV's validation "
            "images and the linear probe; for each task the rate, or the scale, comes from a grid of three on its "
            f"validation images, and test is scored once with each of {len(accuracy_runs.SEEDS)} seeds. The recipe is "
            "that of [the methods' results](../methods/results.md). Raw results: `benchmarks/results/accuracy`.",
            *common.remarks(SUITE),
            common.markdown(["method", *accuracy_data.EPOCHS, "mean"], [line for _, line in sorted(cells)[::-1]]),
        ]
    )


def write() -> None:
    rows = finished()
    comparisons = [paired(rows, dataset, "RepAdapter", "linear probe") for dataset in accuracy_data.EPOCHS]
    main = [row for row in rows.values() if row["backbone"] == VIT]
    common.write(
        "accuracy",
        main,
        command="python benchmarks/accuracy.py",
        environment=_environment(),
        best=[entry.label for entry in best(rows)],
        comparisons=[comparison for comparison in comparisons if comparison],
        other_backbones=[row for row in rows.values() if row["backbone"] != VIT],
    )
    ends = {"LinearProbe", "FullFineTune"}
    shown = [e for e in ranked(rows, VIT) if e in best(rows) or e.method in ends]
    (common.RESULTS / "accuracy.md").write_text(table(rows, shown, short=True) + "\n")
    plots(rows)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(rows))
    if suite := suite_page(rows):
        SUITE.parent.mkdir(parents=True, exist_ok=True)
        SUITE.write_text(suite + "\n")
    print(table(rows, ranked(rows, VIT)))


def _environment() -> dict[str, Any]:
    """That of the latest run that says its own."""
    records = (json.loads(path.read_text()) for path in accuracy_runs.RUNS.glob("*.json"))
    known = [record["environment"] for record in records if "environment" in record]
    return max(known, key=lambda e: e["date"], default=measure.environment())
