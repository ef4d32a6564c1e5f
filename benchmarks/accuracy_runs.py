"""Train and test one entry on one data set; each finished run is a file in ``results/accuracy`` and never repeated.

``DATA-ENTRY-POINT-SEED.json`` is a training run, with ``.test.json`` its score on test. A run whose method
has other settings by now does not count and is made again.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

import accuracy_data
import common
import refold
from accuracy_entries import Entry, Point, probe_of
from refold import backbones, data
from refold.bench import measure
from refold.methods import method_from_json
from refold.training import Recipe, fit
from refold.training.build import resolve
from refold.training.evaluation import score
from refold.training.inference import start_accelerator
from refold.training.tasks import plain_task

SIZE, SEEDS = 112, (0, 1, 2)
RUNS = common.RESULTS / "accuracy"
ADAPTERS = Path(__file__).parent.parent / "runs" / "benchmark-accuracy"  # not committed: needed until the test score


class Unfinished(Exception):
    """A result that is not there, and that nobody asked to make."""


def suite(dataset: str, entry: Entry, splits: data.Splits | None = None) -> dict[str, Any]:
    """The row of an entry: grid on validation with seed 0, then every seed on test.

    Args:
        splits: None reads what is on disk, and raises :class:`Unfinished` where a run is missing.

    Raises:
        SiteError: the method does not go with the backbone.
        RefoldError: training diverged at every point of the grid.
    """
    probe = probe_of(entry)
    head_lr = None if entry == probe else suite(dataset, probe, splits)["lr"]
    grid = {point: train(dataset, entry, point, SEEDS[0], head_lr, splits) for point in entry.grid}
    sound = {point: record for point, record in grid.items() if "diverged" not in record}
    if not sound:
        raise refold.RefoldError("training diverged at every point of the grid", where=entry.label)
    best = max(sound, key=lambda point: (sound[point]["val"]["accuracy"], -sound[point]["val"]["loss"]))
    finals = [train(dataset, entry, best, seed, head_lr, splits) for seed in SEEDS]
    broken = [record["diverged"] for record in finals if "diverged" in record]
    if broken:
        raise refold.RefoldError(broken[0], where=entry.label)
    tests = [test(dataset, entry, best, seed, splits) for seed in SEEDS]
    return {
        "dataset": dataset,
        "method": entry.label,
        "backbone": entry.backbone,
        "settings": finals[0]["settings"],
        "lr": best.lr,
        "point": str(best),
        "head_lr": head_lr or best.lr,
        "val_by_point": {str(point): record["val"]["accuracy"] for point, record in sound.items()},
        "adapter_parameters": finals[0]["adapter_parameters"],
        "trainable_parameters": finals[0]["trainable_parameters"],
        "val_accuracy": [record["val"]["accuracy"] for record in finals],
        "test_accuracy": [result["accuracy"] for result in tests],
        "test_f1": [result["f1"] for result in tests],
        "test_auroc": [result["auroc"] for result in tests],
        "seconds": [record["seconds"] for record in finals],
        "date": max(record.get("environment", {}).get("date", "") for record in finals),
    }


def attach(entry: Entry, point: Point | None, classes: int) -> tuple[torch.nn.Module, backbones.Loaded]:
    """A fresh backbone with the entry's method on it."""
    loaded = backbones.load(entry.backbone, num_classes=classes, image_size=SIZE, drop_path=0.1)
    return refold.attach(loaded.model, entry.build(point)), loaded


def refusal(entry: Entry) -> str | None:
    """Why the method does not go with the entry's backbone, None if it does."""
    try:
        attach(entry, None, 2)
    except refold.SiteError as error:
        return str(error)
    return None


def train(
    dataset: str, entry: Entry, point: Point, seed: int, head_lr: float | None, splits: data.Splits | None
) -> dict[str, Any]:
    """The record of one training run; its adapter is kept for :func:`test`."""
    key = f"{dataset}-{entry.slug}-{point.slug}-{seed}"
    path = RUNS / f"{key}.json"
    method = entry.build(point)
    if path.exists():
        record = json.loads(path.read_text())
        if same(record["settings"], method):
            return record
    if splits is None:
        raise Unfinished(key)
    _test_path(key).unlink(missing_ok=True)
    torch.manual_seed(seed)
    model, loaded = attach(entry, point, len(splits.classes or ()))
    refold.describe(
        model, backbone=loaded.spec, classes=splits.classes, preprocessing=loaded.preprocessing, task="classify"
    )
    lr = point.lr
    recipe = Recipe(
        epochs=accuracy_data.EPOCHS[dataset],
        batch_size=32,
        lr=lr,
        head_lr=head_lr,
        min_lr=lr / 100,
        warmup_lr=lr / 1000,
        augment="flip",
        seed=seed,
    )
    explained = refold.explain(model)
    record = {
        "dataset": dataset,
        "method": entry.label,
        "backbone": entry.backbone,
        "settings": method.to_json(),
        "lr": lr,
        "head_lr": head_lr or lr,
        "seed": seed,
        "adapter_parameters": explained.adapter_parameters,
        "trainable_parameters": explained.trainable,
        "images": len(splits.train),
        "environment": measure.environment(),
    }
    try:
        found = fit(model, splits.train, splits.val, loaded.preprocessing, recipe, classes=splits.classes)
    except refold.RefoldError as error:
        if type(error) is not refold.RefoldError:  # its subclasses tell of a wrong setting, not of a loss that is nan
            raise
        record["diverged"] = str(error)
        told = "diverged"
    else:
        record |= {
            "best_epoch": found.best_epoch,
            "val": found.metrics,
            "seconds": found.seconds,
            "precision": found.precision,
        }
        ADAPTERS.mkdir(parents=True, exist_ok=True)
        refold.save(model, ADAPTERS / f"{key}.safetensors")
        told = f"val {found.metrics['accuracy']:.4f} in {found.seconds:.0f} s"
    RUNS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{key}: {told}", flush=True)
    return record


def test(dataset: str, entry: Entry, point: Point, seed: int, splits: data.Splits | None) -> dict[str, float]:
    """Score a finished run on test, once; in the precision that validation ran in."""
    key = f"{dataset}-{entry.slug}-{point.slug}-{seed}"
    path = _test_path(key)
    if not path.exists():
        if splits is None:
            raise Unfinished(f"{key}, test")
        assert splits.test is not None
        ready = resolve(ADAPTERS / f"{key}.safetensors")
        task = plain_task("classify", splits.classes)
        precision = json.loads((RUNS / f"{key}.json").read_text())["precision"]
        result = score(
            ready.model, splits.test, splits.test.targets, ready.preprocessing, task,
            accelerator=start_accelerator(), batch_size=64, precision=precision,
        )  # fmt: skip
        path.write_text(json.dumps({**result.metrics, "precision": precision}, indent=1) + "\n")
        print(f"{key}: test {result.metrics['accuracy']:.4f}", flush=True)
    return json.loads(path.read_text())


def _test_path(key: str) -> Path:
    return RUNS / f"{key}.test.json"


def same(settings: dict[str, Any], method: refold.Method) -> bool:
    """Whether a record's settings make this method; hyper-parameters it does not name have their defaults."""
    try:
        return method_from_json(settings) == method
    except refold.SiteError:
        return False


def validation(row: dict[str, Any]) -> float:
    """What ranks the methods: mean validation accuracy of the final seeds."""
    return statistics.mean(row["val_accuracy"])
