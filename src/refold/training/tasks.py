"""What a data set asks for: the loss that trains a head, what its outputs mean, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.errors import DataError
from refold.training import metrics
from refold.training.recipe import Recipe

__all__ = ["Classification", "MultiLabel", "Regression", "Task", "make_task", "plain_task"]

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Task(Protocol):
    """Loss, scores and metrics of one kind of target. Logits are (B, ``outputs``) in float32."""

    kind: ClassVar[str]
    select: ClassVar[str]

    @property
    def classes(self) -> list[str] | None: ...

    @property
    def outputs(self) -> int: ...

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss that is minimised: with label smoothing, class weights, and mixed targets."""
        ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The plain loss, reported for evaluation sets."""
        ...

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities (N, K), or predicted values (N,) in the target's unit."""
        ...

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]: ...

    def details(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        """Confusion matrix and per-class table, where the task has them."""
        ...

    def labels(self, scores: Tensor) -> list[Any]:
        """What is predicted for each sample: a class name, a list of names, or a number."""
        ...

    def target_labels(self, targets: Tensor) -> list[Any]:
        """The targets in the form of :meth:`labels`."""
        ...

    def to(self, device: torch.device) -> Task:
        """The same with its tensors on ``device``."""
        ...

    def begin(self, model: nn.Module, head: tuple[str, ...]) -> None:
        """Make a finished ``model`` fit for more training; the inverse of :meth:`finish`."""
        ...

    def finish(self, model: nn.Module, head: tuple[str, ...]) -> None:
        """Make the trained ``model`` speak the user's unit; called once, after training."""
        ...


@dataclass(frozen=True)
class Classification:
    """One of K classes: cross-entropy on softmax.

    Attributes:
        classes: names in the order of the outputs.
        weights: weight of each class in the training loss, (K,).
        smoothing: label smoothing of the training loss.
    """

    classes: list[str]
    weights: Tensor | None = None
    smoothing: float = 0.0

    kind: ClassVar[str] = "classify"
    select: ClassVar[str] = "accuracy"

    @property
    def outputs(self) -> int:
        return len(self.classes)

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, weight=self.weights, label_smoothing=self.smoothing)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        return metrics.classification_metrics(scores, targets)

    def details(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        return {
            "confusion": metrics.confusion_matrix(scores.argmax(dim=1), targets, len(self.classes)),
            "per_class": metrics.per_class_table(scores, targets, self.classes),
        }

    def labels(self, scores: Tensor) -> list[Any]:
        return self.target_labels(scores.argmax(dim=1))

    def target_labels(self, targets: Tensor) -> list[Any]:
        return [self.classes[index] for index in targets.tolist()]

    def to(self, device: torch.device) -> Classification:
        return replace(self, weights=None if self.weights is None else self.weights.to(device))

    def begin(self, model: nn.Module, head: tuple[str, ...]) -> None:
        pass

    def finish(self, model: nn.Module, head: tuple[str, ...]) -> None:
        pass


@dataclass(frozen=True)
class MultiLabel:
    """Any of K labels: binary cross-entropy on sigmoids.

    Attributes:
        classes: names in the order of the outputs.
        weights: weight of each label's positive samples in the training loss, (K,).
        smoothing: share of a target moved towards 1/2 in the training loss.
    """

    classes: list[str]
    weights: Tensor | None = None
    smoothing: float = 0.0

    kind: ClassVar[str] = "multilabel"
    select: ClassVar[str] = "map"

    @property
    def outputs(self) -> int:
        return len(self.classes)

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        targets = targets * (1 - self.smoothing) + 0.5 * self.smoothing
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.weights)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        return metrics.multilabel_metrics(scores, targets)

    def details(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"per_class": metrics.per_class_table(scores, targets, self.classes)}

    def labels(self, scores: Tensor) -> list[Any]:
        return [[name for name, hit in zip(self.classes, row, strict=True) if hit] for row in (scores > 0.5).tolist()]

    def target_labels(self, targets: Tensor) -> list[Any]:
        return self.labels(targets)

    def to(self, device: torch.device) -> MultiLabel:
        return replace(self, weights=None if self.weights is None else self.weights.to(device))

    def begin(self, model: nn.Module, head: tuple[str, ...]) -> None:
        pass

    def finish(self, model: nn.Module, head: tuple[str, ...]) -> None:
        pass


@dataclass(frozen=True)
class Regression:
    """One number: smooth L1 on the target standardised by the training set's mean and spread.

    While it trains, the model speaks standardised units. :meth:`finish` folds mean and spread into the head,
    so that saved, merged and exported models need no record of them.
    """

    mean: float = 0.0
    std: float = 1.0

    kind: ClassVar[str] = "regress"
    select: ClassVar[str] = "mae"
    classes = None
    outputs = 1

    def training_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(logits[:, 0], (targets - self.mean) / self.std)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.smooth_l1_loss(self.scores(logits), targets)

    def scores(self, logits: Tensor) -> Tensor:
        return logits[:, 0] * self.std + self.mean

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        return metrics.regression_metrics(scores, targets)

    def details(self, scores: Tensor, targets: Tensor) -> dict[str, Any]:
        return {}

    def labels(self, scores: Tensor) -> list[Any]:
        return scores.tolist()

    def target_labels(self, targets: Tensor) -> list[Any]:
        return targets.tolist()

    def to(self, device: torch.device) -> Regression:
        return self

    def begin(self, model: nn.Module, head: tuple[str, ...]) -> None:
        """Standardised units again, as :meth:`finish` found them."""
        _scale_outputs(model, head, 1 / self.std, -self.mean / self.std)

    def finish(self, model: nn.Module, head: tuple[str, ...]) -> None:
        """Fold ``std * y + mean`` into every output layer of the head.

        Raises:
            DataError: the head does not end in a layer with one output and a bias.
        """
        _scale_outputs(model, head, self.std, self.mean)


@torch.no_grad()
def _scale_outputs(model: nn.Module, head: tuple[str, ...], scale: float, shift: float) -> None:
    """Make every output layer of the head give ``scale * y + shift``."""
    for path in head:
        layers = [m for m in model.get_submodule(path).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if not layers or layers[-1].bias is None or layers[-1].weight.shape[0] != 1:
            raise DataError("regression needs a head that ends in a layer with one output and a bias", where=path)
        layers[-1].weight.mul_(scale)
        layers[-1].bias.mul_(scale).add_(shift)


def plain_task(kind: str, classes: list[str] | None) -> Task:
    """The task of a trained model, without anything that concerns training.

    Raises:
        DataError: an unknown kind, or no classes where it needs some.
    """
    if kind == "regress":
        return Regression()
    if kind not in ("classify", "multilabel"):
        raise DataError(f"unknown task {kind!r}", where="task", remedy="Known: classify, multilabel, regress")
    if not classes or (kind == "classify" and len(classes) < 2):
        raise DataError(f"{kind} needs classes (two at least to tell apart), found {classes}", where="classes")
    return MultiLabel(classes) if kind == "multilabel" else Classification(classes)


def make_task(kind: str, classes: list[str] | None, targets: Tensor, recipe: Recipe) -> Task:
    """The task of a training set.

    Args:
        kind: ``"classify"``, ``"multilabel"`` or ``"regress"``.
        classes: names, None for a regression.
        targets: of the training set: (N,) long, (N, K) float, or (N,) float.
        recipe: its class weights and label smoothing.

    Raises:
        DataError: a setting that makes no sense for this kind, fewer than two classes, or a constant target.
    """
    if kind == "regress":
        for name in ("label_smoothing", "mixup", "cutmix", "class_weights"):
            if getattr(recipe, name):
                raise DataError("needs classes, but the target is a number", where=name, remedy="Leave it off")
        values = targets.double()
        std = float(values.std(correction=0))
        if not std > 0:
            raise DataError("is the same for every training image", where="target")
        return Regression(float(values.mean()), std)
    task = plain_task(kind, classes)
    weights = _class_weights(task, targets) if recipe.class_weights else None
    return replace(task, weights=weights, smoothing=recipe.label_smoothing)  # type: ignore[type-var]


def _class_weights(task: Task, targets: Tensor) -> Tensor:
    """Inverse frequencies with mean 1 over the samples, or negatives per positive of each label; (K,)."""
    if task.kind == "multilabel":
        positive = targets.sum(dim=0)
        return (len(targets) - positive) / positive.clamp(min=1)
    return len(targets) / (task.outputs * targets.bincount(minlength=task.outputs).clamp(min=1))
