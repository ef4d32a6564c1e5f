"""Metrics of whole evaluation sets, by torchmetrics; absent classes are left out instead of counted as wrong.

Every function takes all samples at once: metrics such as AUROC are no averages over batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "binary_metrics_of",
    "classification_metrics",
    "confusion_matrix",
    "lower_is_better",
    "multilabel_metrics",
    "per_class_table",
    "regression_metrics",
]


def lower_is_better(metric: str) -> bool:
    """Whether small values of ``metric`` are good."""
    return metric in ("loss", "mae", "rmse")


def classification_metrics(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy, balanced accuracy, macro F1 and AUROC of a single-label task.

    Balanced accuracy is the mean recall over the classes that occur. AUROC is that of class 1 for two
    classes, else the mean of one-versus-rest; it is left out when no class has both kinds of samples.

    Args:
        scores: probabilities, (N, K).
        targets: class indices, (N,).
    """
    from torchmetrics.functional import classification as f

    k, predictions = scores.shape[1], scores.argmax(dim=1)
    recalls = f.multiclass_recall(predictions, targets, num_classes=k, average="none", validate_args=False)
    result = {
        "accuracy": float((predictions == targets).double().mean()),
        "balanced_accuracy": float(recalls[targets.bincount(minlength=k) > 0].mean()),
        "f1": float(f.multiclass_f1_score(predictions, targets, num_classes=k, average="macro", validate_args=False)),
    }
    columns = [1] if k == 2 else range(k)
    areas = [area for c in columns if (area := _auroc(scores[:, c], targets == c)) is not None]
    if areas:
        result["auroc"] = sum(areas) / len(areas)
    return result


def multilabel_metrics(scores: Tensor, targets: Tensor) -> dict[str, float]:
    """Mean average precision, macro F1 at threshold 0.5, and macro AUROC over the labels.

    Labels without a positive sample do not count towards ``map``; those without both kinds not towards
    ``auroc``.

    Args:
        scores: probabilities, (N, K).
        targets: zeros and ones, (N, K).
    """
    rows = [binary_metrics_of(scores[:, c], targets[:, c] > 0.5) for c in range(scores.shape[1])]
    return {
        name: sum(values) / len(values)
        for name in ("map", "f1", "auroc")
        if (values := [row[name] for row in rows if name in row])
    }


def regression_metrics(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """Mean absolute error, root mean squared error and R2; (N,) each, in the target's unit."""
    error = predictions.double() - targets.double()
    result = {"mae": float(error.abs().mean()), "rmse": float(error.square().mean().sqrt())}
    spread = (targets.double() - targets.double().mean()).square().sum()
    if len(targets) > 1 and spread > 0:
        result["r2"] = float(1 - error.square().sum() / spread)
    return result


def binary_metrics_of(scores: Tensor, positive: Tensor) -> dict[str, float]:
    """``f1`` at threshold 0.5, ``map`` (average precision) and ``auroc`` of one label, where defined.

    Args:
        scores: probability of the label, (N,).
        positive: whether the label holds, boolean, (N,).
    """
    from torchmetrics.functional import classification as f

    hits = scores > 0.5
    result = {"f1": float(f.binary_f1_score(hits.int(), positive.int(), validate_args=False))}
    if positive.any():
        result["map"] = float(f.binary_average_precision(scores, positive.int(), validate_args=False))
    if (area := _auroc(scores, positive)) is not None:
        result["auroc"] = area
    return result


def confusion_matrix(predictions: Tensor, targets: Tensor, classes: int) -> list[list[int]]:
    """Counts; rows are true classes, columns predicted ones."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts = multiclass_confusion_matrix(predictions, targets, num_classes=classes, validate_args=False)
    return counts.tolist()


def per_class_table(scores: Tensor, targets: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """Rows of ``class``, ``support``, ``precision``, ``recall``, ``f1`` and, where defined, ``auroc``.

    Args:
        scores: probabilities, (N, K).
        targets: class indices (N,) of a single-label task, or zeros and ones (N, K) of a multi-label task.
        classes: the K names.
    """
    single = targets.ndim == 1
    predicted = scores.argmax(dim=1) if single else scores > 0.5
    rows = []
    for index, name in enumerate(classes):
        truth = targets == index if single else targets[:, index] > 0.5
        guess = predicted == index if single else predicted[:, index]
        hits, support, guesses = (int(t.sum()) for t in (truth & guess, truth, guess))
        row = {
            "class": name,
            "support": support,
            "precision": hits / guesses if guesses else 0.0,
            "recall": hits / support if support else 0.0,
            "f1": 2 * hits / (support + guesses) if support + guesses else 0.0,
        }
        if (area := _auroc(scores[:, index], truth)) is not None:
            row["auroc"] = area
        rows.append(row)
    return rows


def _auroc(scores: Tensor, positive: Tensor) -> float | None:
    from torchmetrics.functional.classification import binary_auroc

    if bool(positive.all()) or not bool(positive.any()):
        return None
    return float(binary_auroc(scores.float(), positive.to(torch.int32), validate_args=False))
