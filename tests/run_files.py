"""Run folders of small models trained here, their files written as training writes them."""

from __future__ import annotations

import csv
import json
import time

import numpy as np
import torch
from torch import nn

from refold.bench.measure import environment, peak_memory
from refold.training.metrics import (
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    per_class_table,
    regression_metrics,
)

__all__ = ["CLASSES", "HOSTILE", "SIDE", "write_merge_files", "write_run"]

HOSTILE = "<script>alert('x')</script>"
CLASSES = ["good & fine", HOSTILE, "$5 off_the_rack$"]
SIDE = 24


def make_images(task, count, seed):
    """Noisy stripes, lying, standing or both: uint8 (N, H, W, 3) and the targets of the task."""
    rng = np.random.default_rng(seed)
    kind, strength = rng.integers(0, 3, count), rng.uniform(0.2, 1.0, count)
    wave = np.sin(np.arange(SIDE) * 1.6)
    lying, standing = np.broadcast_to(wave[:, None], (SIDE, SIDE)), np.broadcast_to(wave, (SIDE, SIDE))
    patterns = np.stack([lying, standing, (lying + standing) / 2])[kind] * strength[:, None, None]
    grey = 128 + 60 * patterns + rng.normal(0, 60, patterns.shape)
    images = np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=3)
    if task == "classify":
        return images, torch.from_numpy(kind)
    if task == "regress":
        return images, torch.from_numpy(strength * (kind == 0)).float()
    return images, torch.from_numpy(np.stack([kind != 1, kind != 0, strength > 0.6], 1)).float()


def scores_of(task, outputs):
    return {"classify": lambda o: o.softmax(1), "multilabel": torch.sigmoid, "regress": lambda o: o[:, 0]}[task](
        outputs
    )


def metrics_of(task, outputs, targets):
    functions = {
        "classify": classification_metrics,
        "multilabel": multilabel_metrics,
        "regress": regression_metrics,
    }
    return functions[task](scores_of(task, outputs), targets)


def loss_of(task, outputs, targets):
    if task == "classify":
        return nn.functional.cross_entropy(outputs, targets)
    if task == "multilabel":
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)
    return nn.functional.mse_loss(outputs[:, 0], targets)


def write_run(folder, task, *, epochs=4):
    """Train a small network on made-up stripes and leave the files of a run."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    sets = {split: make_images(task, n, seed) for seed, (split, n) in enumerate([("train", 240), ("val", 90)])}
    tensors = {s: (torch.from_numpy(i[..., 0].copy()).float() / 128 - 1, t) for s, (i, t) in sets.items()}
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, 16), nn.Tanh(), nn.Linear(16, 1 if task == "regress" else 3)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    lines, start = [], time.perf_counter()
    for epoch in range(epochs):
        lr = optimizer.param_groups[0]["lr"]
        for rows in torch.randperm(240).split(40):
            optimizer.zero_grad()
            loss_of(task, model(tensors["train"][0][rows]), tensors["train"][1][rows]).backward()
            optimizer.step()
        schedule.step()
        for split, (images, targets) in tensors.items():
            with torch.no_grad():
                outputs = model(images)
            line = {
                "epoch": epoch + 1,
                "step": 6 * (epoch + 1),
                "split": split,
                "seconds": time.perf_counter() - start,
            }
            line["loss"] = float(loss_of(task, outputs, targets))
            lines.append(line | ({"lr": lr} if split == "train" else metrics_of(task, outputs, targets)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    with torch.no_grad():
        outputs = model(tensors["val"][0])
    targets, scores = tensors["val"][1], scores_of(task, outputs)
    summary = {
        "method": "RepAdapter(rank=8)",
        "task": task,
        "classes": None if task == "regress" else CLASSES,
        "images": {"train": 240, "val": 90, "test": 0},
        "skipped": [{"path": "stripes/broken.png", "reason": HOSTILE}],
        "parameters": 21_704_450 + sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "seconds": time.perf_counter() - start,
        "epochs": epochs,
        "best_epoch": epochs,
        "selected_by": {"classify": "accuracy", "multilabel": "map", "regress": "mae"}[task],
        "precision": "fp32",
        "attention": "math",
        "peak_memory": peak_memory("cpu"),
        "metrics": {"val": {"loss": lines[-1]["loss"], **metrics_of(task, outputs, targets)}},
        "evaluated_split": "val",
    }
    if task != "regress":
        summary["per_class"] = per_class_table(scores, targets, CLASSES)
    if task == "classify":
        summary["confusion"] = confusion_matrix(scores.argmax(1), targets, 3)
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {
        "data": "/somewhere/private/stripes",
        "model": "timm/test_vit",
        "method": {"name": "RepAdapter", "rank": 8, "groups": 2, "scale": 1.0, "sites": None},
        "epochs": epochs,
        "lr": 3e-3,
        "pretrained": True,
        "seed": 0,
        "output": HOSTILE,
        "environment": environment(),
        "command": "refold train stripes --model timm/test_vit",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_predictions(folder, task, sets["val"][0], scores, targets)
    return summary


def write_predictions(folder, task, images, scores, targets):
    named = {
        "classify": lambda v: CLASSES[int(v)],
        "multilabel": lambda v: [c for c, on in zip(CLASSES, v, strict=True) if on > 0.5],
        "regress": float,
    }[task]
    predictions = scores.argmax(1) if task == "classify" else scores
    rows = []
    for i in range(len(images)):
        truth, guess = named(targets[i]), named(predictions[i])
        score = float(scores[i].max()) if task == "classify" else None
        correct = None if task == "regress" else truth == guess
        path = f"/somewhere/private/stripes/val/{i:03}.png"
        rows.append({"path": path, "target": truth, "prediction": guess, "score": score, "correct": correct})
    with (folder / "predictions.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "target", "prediction"])
        writer.writerows((r["path"], r["target"], r["prediction"]) for r in rows)
    (folder / "thumbnails").mkdir()
    shown = rows[:30]
    np.savez(folder / "thumbnails" / "thumbnails.npz", images=images[:30])
    (folder / "thumbnails" / "thumbnails.json").write_text(
        json.dumps([{"index": i, **row} for i, row in enumerate(shown)])
    )


def write_merge_files(folder, *, rel_l2=2.2e-15):
    dtypes = {
        "float64": {"max_abs": 3.1e-15, "max_rel": 4.0e-13, "rel_l2": rel_l2, "limit": 1e-10},
        "float32": {"max_abs": 1.7e-6, "max_rel": 2.0e-4, "rel_l2": 8.4e-7, "limit": 1e-5},
        "bfloat16": {"max_abs": 2.1e-2, "max_rel": 0.9, "rel_l2": 6.4e-3, "limit": 7.1e-3},
    }
    certificate = {
        "dtypes": dtypes,
        "probe": {"inputs": 4, "shape": [3, 224, 224]},
        "keys_unchanged": True,
        "shapes_unchanged": True,
        "hooks_left": 0,
        "extra_modules": 0,
        "parameters": {"backbone": 21_704_450, "merged": 21_704_450},
        "operations": {"backbone": 12_200_000_000, "merged": 12_200_000_000},
        "folded_layers": 24,
        "refold": "0.1.0",
        "torch": torch.__version__,
    }
    (folder / "certificate.json").write_text(json.dumps(certificate))
    rows = [
        {
            "name": name,
            "batch": batch,
            "median_ms": batch * ms,
            "low_ms": batch * ms * 0.98,
            "high_ms": batch * ms * 1.03,
            "ratio": ms / 30.0,
        }
        for batch in (1, 16)
        for name, ms in (("backbone", 30.0), ("unmerged", 34.5), ("merged", 30.1))
    ]
    (folder / "cost.json").write_text(json.dumps({"rows": rows, "environment": environment()}))
