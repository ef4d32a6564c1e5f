"""Write docs/methods: a page and a picture for each method, and an index, from the docstrings, plans and results.

python benchmarks/method_pages.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
from method_pictures import draw, places
from refold.bench.shelf import BACKBONES, Cost, Shelf
from refold.methods import METHODS, Method
from refold.report import methods as texts

PAGES = Path(__file__).parent.parent / "docs" / "methods"
#: What every file written here begins with, or has in its second line; others in the folder are left alone.
MARK = "<!-- written by `make docs`; do not edit -->"
RESULTS = "\n## Results\n"


def render() -> dict[str, str]:
    """File name -> content of everything in the folder that is written here."""
    shelf, rows = Shelf(), _rows()
    costs = {name: shelf.cost(method(), operations=not method().mergeable) for name, method in METHODS.items()}
    files = {"README.md": index(costs)}
    for name, method in METHODS.items():
        cost = costs[name]
        survey = shelf.survey(cost.backbone)
        files[f"{name}.svg"] = draw(survey, cost.plan, name)
        results = _results(name, rows)
        files[f"{name}.md"] = page(method, cost, places(survey, cost.plan)) + (
            f"{RESULTS}\n{results}\n" if results else ""
        )
    return files


def page(method: type[Method], cost: Cost, sites: str) -> str:
    """A method's page without its results."""
    name, found = method.__name__, texts.page(method)
    backbone = BACKBONES[cost.backbone]
    where = f"On {backbone}: {sites}." if sites else f"On {backbone}; it adds nothing."
    parts = [
        f"# {name}\n{MARK}",
        *map(_markdown, found.about),
        f"**When.** {_markdown(found.use)}" if found.use else "",
    ]
    parts += [f"![where {name} sits in a block]({name}.svg)", where, "## Formula", *map(_markdown, found.header)]
    if found.parameters:
        cells = [(f"`{p.name}`", f"`{p.default}`", _cell(_markdown(p.meaning))) for p in found.parameters]
        parts += ["## Hyper-parameters", common.markdown(("name", "default", "meaning"), cells)]
    heads = (
        "with defaults on",
        "parameters beside the head",
        "of the backbone's",
        "merges",
        "extra compute at inference",
    )
    share = f"{100 * cost.share:.3g} %"
    cost_row = (backbone, f"{cost.parameters:,}", share, texts.merges(method()), texts.extra(method(), cost))
    parts += [
        "## Cost",
        common.markdown(heads, [cost_row]),
        f"Shown on, by its paper or on images since: {method.tasks}.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def index(costs: dict[str, Cost]) -> str:
    cells = []
    for name, method in METHODS.items():
        cost, address = costs[name], texts.link(method.paper)
        paper = f"[{method.paper}]({address})" if address else method.paper
        counted = (texts.parameters(cost), texts.merges(method()), texts.extra(method(), cost))
        cells.append((f"[{name}]({name}.md)", method.summary, *counted, method.tasks, paper))
    heads = ("method", "what it does", "parameters", "merges", "extra compute", "tasks", "paper")
    uses = [f"* [{name}]({name}.md). {_markdown(use)}" for name, m in METHODS.items() if (use := texts.page(m).use)]
    parts = [
        f"# Methods\n{MARK}",
        "Parameters beside the head and operations added at inference, both with default settings on "
        f"{next(iter(BACKBONES.values()))} at 224 px, or where it says so; `refold methods` prints the same. Nothing "
        "is added where a method merges or trains in place; elementwise work is not counted. Accuracy, step time and "
        "memory by our own benchmark: [results.md](results.md).",
        common.markdown(heads, cells),
        "## When to use which",
        "\n".join(uses),
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(paragraph: str) -> str:
    """A docstring's paragraph; a formula, whose lines are all indented, as a block of code."""
    if all(line.startswith("    ") for line in paragraph.splitlines()) and paragraph:
        lines = [line.removeprefix("    ") for line in paragraph.splitlines()]
        return "\n".join(["```text", *lines, "```"])
    return paragraph.replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# -- results ------------------------------------------------------------------------------------------------------


def _rows() -> list[dict[str, Any]]:
    path = common.RESULTS / "accuracy.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    return [*content["rows"], *content.get("other_backbones", [])]


def _results(name: str, rows: list[dict[str, Any]]) -> str:
    """The method's rows of the accuracy benchmark, the linear probe's accuracy beside them; "" if there are none."""

    def by(kind: str) -> Callable[[dict[str, Any]], bool]:
        return lambda row: row["settings"]["name"] == kind

    probes = {(r["dataset"], r["backbone"]): r for r in filter(by("LinearProbe"), rows)}
    cells = []
    for row in filter(by(name), rows):
        probe = probes.get((row["dataset"], row["backbone"]))
        point = row.get("point", f"{row['lr']:g}").replace("-", " ")
        spread = [_spread(row), _spread(probe) if probe else "-"]
        cells.append((row["dataset"], row["backbone"], row["method"], f"{row['adapter_parameters']:,}", point, *spread))
    heads = ("data", "backbone", "method", "parameters", "chosen", "accuracy %", "linear probe %")
    told = "Mean and standard deviation over seeds; how it was made: [results.md](results.md)."
    return f"{told}\n\n{common.markdown(heads, cells)}" if cells else ""


def _spread(row: dict[str, Any]) -> str:
    values = row["test_accuracy"]
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def main() -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    files = render()
    for path in PAGES.iterdir():
        ours = path.suffix == ".svg" or MARK in path.read_text()
        if ours and path.name not in files:
            path.unlink()  # of a method that is no more
    for name, content in files.items():
        (PAGES / name).write_text(content)
    print(f"{len(files)} files in {PAGES}")


if __name__ == "__main__":
    main()
