"""How a model is optimised: plain settings, frozen, checked where they are made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from refold.errors import DataError

__all__ = ["Recipe"]

PRECISIONS = ("auto", "fp32", "bf16")
ATTENTIONS = ("auto", "default", "math", "math-bf16")
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an attached model is optimised: all that :func:`refold.training.fit` needs beside model and data.

    The defaults are the recipe that the VTAB-1k literature shares (NOAH, Convpass, FacT, RepAdapter): AdamW,
    learning rate 1e-3, weight decay 1e-4, 100 epochs, a tenth of them warm-up, cosine decay to 1e-5, batch
    64, plain resize, nothing else.

    Attributes:
        epochs: passes over the training set.
        batch_size: images a step, over all processes together.
        accumulate: equal batches that a step is divided into, one after the other, to need less memory: their gradients
            add up to those of the whole batch. What looks at a whole batch (mixup, batch statistics, the mean of losses
            with class weights) sees the parts.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9, RepAdapter's and AdaptFormer's for videos.
        lr: peak learning rate of the adapters.
        head_lr: peak learning rate of the head; None means ``lr``.
        weight_decay: on everything but biases and one-dimensional parameters: decoupled from the gradient in AdamW, a
            part of it in SGD.
        warmup_epochs: epochs of linear warm-up, fractions allowed; None means a tenth of ``epochs``.
        warmup_lr: learning rate of the first warm-up step.
        min_lr: learning rate at the end of the cosine.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of mixup's Beta distribution; 0 means off.
        cutmix: alpha of cutmix's; with both on, each batch draws one of the two.
        augment: name of an augmentation of :class:`refold.data.Loader`; ``"none"`` is the plain resize.
        class_weights: ``"balanced"`` weighs classes by inverse frequency in the training set.
        clip_grad: largest allowed norm of the gradient; None means no clipping.
        consistency: lambda of PACE's consistency regularisation, the weight of the squared distance between the outputs
            of two passes with noise on what the adapters add; 0 means off. It costs two passes a step.
        consistency_noise: standard deviation of that noise, which multiplies by 1 on average.
        precision: ``"bf16"`` (autocast, frozen weights held in bfloat16), ``"fp32"``, or ``"auto"``: bf16
            where the device has instructions for it.
        attention: kernel of scaled dot-product attention in training steps: ``"default"`` (what PyTorch
            picks), ``"math"``, ``"math-bf16"`` (see :mod:`refold.training.attention`), or ``"auto"``: the fastest,
            measured on this device and size.
        select: validation metric that chooses the best epoch; None means the task's own (accuracy, mean
            average precision, or mean absolute error).
        validate_every: epochs between two validations; the last epoch is always validated.
        checkpoint_every: steps between two checkpoints within an epoch; None writes them at its end alone.
        seed: of order, augmentation, dropout and initialisation.
        workers: processes that decode images of data sets too large for memory.
    """

    epochs: int = 100
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 1e-4
    warmup_epochs: float | None = None
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = "none"
    class_weights: str | None = None
    clip_grad: float | None = None
    consistency: float = 0.0
    consistency_noise: float = 0.0
    precision: str = "auto"
    attention: str = "auto"
    select: str | None = None
    validate_every: int = 1
    checkpoint_every: int | None = None
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        self._integer("epochs", least=1)
        self._integer("batch_size", least=1)
        self._integer("accumulate", least=1)
        self._integer("validate_every", least=1)
        self._integer("checkpoint_every", least=1, optional=True)
        self._integer("seed", least=0)
        self._integer("workers", least=0)
        self._number("lr", lambda v: v > 0, "positive")
        self._number("head_lr", lambda v: v > 0, "positive", optional=True)
        self._number("weight_decay", lambda v: v >= 0, "0 or more")
        self._number(
            "warmup_epochs", lambda v: 0 <= v < self.epochs, f"at least 0 and under epochs ({self.epochs})",
            optional=True,
        )  # fmt: skip
        lowest = min(self.lr, self.head_lr or self.lr)
        for name in ("warmup_lr", "min_lr"):
            self._number(name, lambda v: 0 <= v <= lowest, f"between 0 and the learning rate {lowest:g}")
        self._number("label_smoothing", lambda v: 0 <= v < 1, "at least 0 and under 1")
        self._number("mixup", lambda v: v >= 0, "0 or more")
        self._number("cutmix", lambda v: v >= 0, "0 or more")
        self._number("clip_grad", lambda v: v > 0, "positive", optional=True)
        self._number("consistency", lambda v: v >= 0, "0 or more")
        self._number("consistency_noise", lambda v: v >= 0, "0 or more")
        for name, other in (("consistency_noise", "consistency"), ("consistency", "consistency_noise")):
            self._number(name, lambda v, other=other: v > 0 or not getattr(self, other), f"positive beside {other}")
        self._choice("optimizer", OPTIMIZERS)
        self._choice("class_weights", (None, "balanced"))
        self._choice("precision", PRECISIONS)
        self._choice("attention", ATTENTIONS)
        self._text("augment")
        self._text("select", optional=True)

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of warm-up, given the steps of an epoch; always fewer than the run has."""
        epochs = self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs
        return min(round(epochs * steps_per_epoch), self.epochs * steps_per_epoch - 1)

    def to_json(self) -> dict[str, Any]:
        """Plain data by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`to_json`; a field that is not there yet has its default.

        Raises:
            DataError: naming the field that is unknown or out of range.
        """
        cls._known(data, where="settings")
        return cls(**data)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again.

        Raises:
            DataError: a field that does not exist, or a value out of range.
        """
        self._known(changes, where="settings")
        return dataclasses.replace(self, **changes)

    @classmethod
    def _known(cls, names: Any, *, where: str) -> None:
        fields = [item.name for item in dataclasses.fields(cls)]
        for name in names:
            if name not in fields:
                raise DataError(f"unknown setting {name!r}", where=where, remedy=f"Known: {', '.join(fields)}")

    def _number(self, name: str, valid: Callable[[float], bool], rule: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"must be a number, not {value!r}", where=name)
        if not math.isfinite(value) or not valid(value):
            raise DataError(f"must be {rule}, not {value!r}", where=name)

    def _integer(self, name: str, *, least: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DataError(f"must be a whole number of at least {least}, not {value!r}", where=name)

    def _choice(self, name: str, choices: tuple[str | int | None, ...]) -> None:
        if getattr(self, name) not in choices:
            raise DataError(
                f"must be one of {', '.join(str(c) for c in choices)}, not {getattr(self, name)!r}",
                where=name,
            )

    def _text(self, name: str, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, str) or not value:
            raise DataError(f"must be a non-empty text, not {value!r}", where=name)
