"""An image-text model on labelled images without training, and on the way from there to the adapted one (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import refold
from refold.errors import DataError
from refold.inspection import description
from refold.interpolation import interpolate
from refold.training.build import Ready, build_backbone, resolve
from refold.training.evaluation import Evaluation, aligned, labelled, load_splits, read_split, score
from refold.training.inference import start_accelerator
from refold.training.metrics import lower_is_better
from refold.training.progress import More, counting, showing

if TYPE_CHECKING:
    from refold.data import Splits

__all__ = ["ALPHAS", "Interpolated", "interpolate_run", "zeroshot"]

ALPHAS = tuple(k / 10 for k in range(11))


def zeroshot(
    model: str,
    data: str | Path,
    *,
    templates: Sequence[str] | None = None,
    class_names: Mapping[str, str] | None = None,
    split: str = "test",
    train: str | None = None,
    val: str | None = None,
    test: str | None = None,
    target: str | None = None,
    skip_bad_images: bool = False,
    weights: str | Path | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    crop: str = "center",
    batch_size: int = 64,
    workers: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Score an image-text model on labelled images by its text embeddings of the class names, in float32.

    Args:
        model: ``open_clip/NAME/PRETRAINED``.
        data, split, train, val, test, target, skip_bad_images, workers: as for :func:`refold.training.evaluate`.
        templates, class_names: as for :meth:`refold.backbones.Prompts.of`.
        weights, pretrained, image_size: as for :func:`refold.backbones.load`.
        crop: ``"center"``, CLIP's own, or ``"squash"``, SigLIP's own and what training does unless told otherwise.
        batch_size: images of a forward pass.
        progress: bars on standard error; None shows them on a terminal.

    Raises:
        DataError: no classes of which each image has one, no such split, or prompts that are none.
        BackboneError: the model cannot be loaded, or has no text tower.
    """
    from refold import backbones

    splits, images = read_split(
        data, split, train=train, val=val, test=test, target=target, skip_bad_images=skip_bad_images
    )
    if splits.task != "classify" or splits.classes is None:
        raise DataError(f"is made for {splits.task!r}, and class names are for classes", where=str(data))
    prompts = backbones.Prompts.of(splits.classes, templates, class_names)
    loaded = backbones.load(
        model, head=prompts, in_chans=images.channels, image_size=image_size, weights=weights, pretrained=pretrained
    )
    ready = Ready(loaded.model, replace(loaded.preprocessing, crop=crop), "classify", splits.classes)
    accelerator = start_accelerator()
    with showing(progress):
        return score(
            ready.model.to(accelerator.device), images, images.targets, ready.preprocessing, ready.task,
            accelerator=accelerator, batch_size=batch_size, workers=workers,
        )  # fmt: skip


@dataclass(frozen=True)
class Interpolated:
    """What :func:`interpolate_run` returns.

    Attributes:
        model: the one at ``alpha``, of the plain architecture, in eval mode; what the run was told about classes and
            preprocessing is known of it.
        preprocessing: how images become its input.
        alpha: what was given or chosen; 0 is the zero-shot model, 1 the adapted one.
        select: validation metric that chose it; None where it was given.
        validation: alpha -> metrics on the validation set; empty where ``alpha`` was given.
        metrics: set -> alpha -> metrics, of ``alpha`` and of both ends.
    """

    model: nn.Module
    preprocessing: refold.Preprocessing
    alpha: float
    select: str | None
    validation: dict[float, dict[str, float]]
    metrics: dict[str, dict[float, dict[str, float]]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, the model left out."""
        fields = ("alpha", "select", "validation", "metrics")
        return {name: getattr(self, name) for name in fields}


def interpolate_run(
    source: str | Path,
    alpha: float | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    data: str | Path | None = None,
    others: Mapping[str, str | Path] | None = None,
    weights: str | Path | None = None,
    force: bool = False,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool | None = None,
) -> Interpolated:
    """WiSE-FT: the model between the zero-shot one that a run began with and the adapted one, see
    :func:`refold.interpolate`.

    Args:
        source: a run folder or adapter file with a zero-shot head or text tower, of a method that merges.
        alpha: how far from the zero-shot model; None is the one of ``alphas`` with the best validation metric.
        alphas: candidates.
        data: as for :func:`refold.training.evaluate`; its validation split chooses, its test split, if it has one, is
            scored at the chosen alpha and the two ends alone.
        others: name -> further test set with classes of the model, scored likewise: its test split, or all of it
            where it is not split.
        weights, force: as for :func:`refold.training.resolve`.
        batch_size, workers: of evaluation.
        progress: bars on standard error; None shows them on a terminal.

    Raises:
        DataError: the run's head was no zero-shot one, no validation split to choose by, or other classes.
        MergeError: the method does not merge, or an alpha is not between 0 and 1.
        StoreError, BackboneError: the model cannot be loaded.
    """
    from refold.backbones import fold_text

    ready = resolve(source, weights=weights, force=force)
    told = {} if ready.dense else description(ready.model)
    if "prompts" not in told:
        raise DataError(
            "its head did not start from class names, so there is no zero-shot model at the other end",
            where=str(source),
            remedy="Train with head='zeroshot' or 'text' (--head)",
        )
    if alpha is not None:
        alphas = (alpha,)
    for value in alphas:
        if not 0 <= value <= 1:
            raise DataError(f"must be between 0 and 1, not {value}", where="alpha")
    splits = _splits(ready, data)
    if alpha is None and splits.val is None:
        raise DataError("has no validation split to choose alpha by", where="data", remedy="Give one, or alpha")
    own = {"val": splits.val if alpha is None else None, "test": splits.test}
    sets = {name: (part, aligned(ready, splits, part.targets)) for name, part in own.items() if part is not None}
    sets |= {name: labelled(ready, where, "test") for name, where in (others or {}).items()}
    refold.merge(ready.model)
    model = fold_text(ready.model).eval()
    start, end = _zeroshot_state(ready, told, weights), {k: v.clone() for k, v in model.state_dict().items()}
    accelerator = start_accelerator()
    model.to(accelerator.device)

    def metrics(name: str, at: float, more: More) -> dict[str, float]:
        model.load_state_dict(interpolate(start, end, at))
        images, targets = sets[name]
        found = score(
            model, images, targets, ready.preprocessing, ready.task,
            accelerator=accelerator, batch_size=batch_size, workers=workers,
        )  # fmt: skip
        more(len(images))
        return found.metrics

    select, validation, main = None, {}, accelerator.is_main_process
    with showing(progress):
        if alpha is None:
            select = ready.task.select
            with counting("validation images", total=len(alphas) * len(sets["val"][0]), main=main) as more:
                validation = {at: metrics("val", at, more) for at in alphas}
            sign = -1 if lower_is_better(select) else 1
            alpha = max(alphas, key=lambda at: (sign * validation[at][select], -validation[at]["loss"]))
        shown = sorted({0.0, float(alpha), 1.0})
        tests = [name for name in sets if name != "val"]
        total = len(shown) * sum(len(sets[name][0]) for name in tests)
        with counting("test images", total=total, main=main) as more:
            scored = {name: {at: metrics(name, at, more) for at in shown} for name in tests}
    model.load_state_dict(interpolate(start, end, alpha))
    return Interpolated(model, ready.preprocessing, alpha, select, validation, scored)


def _splits(ready: Ready, data: str | Path | None) -> Splits:
    from refold.data import load_dataset

    if data is not None:  # its own splits alone: to choose on all of it and test on the same would be no test
        return load_dataset(data, fractions=(1.0, 0.0, 0.0))
    if ready.config is None:
        raise DataError("is needed: only a run folder knows its data", where="data")
    return load_splits(ready.config)


def _zeroshot_state(ready: Ready, told: Mapping[str, Any], weights: str | Path | None) -> Mapping[str, torch.Tensor]:
    """The state dict of the zero-shot model that a run began with."""
    from refold import backbones

    config = ready.config
    prompts = replace(backbones.Prompts.from_json(told["prompts"]), tower=False)
    if config is not None and not config.pretrained:
        return build_backbone(config, len(prompts.names), prompts)[0].state_dict()
    loaded = backbones.load(
        told["backbone"],
        head=prompts,
        in_chans=ready.preprocessing.channels,
        image_size=ready.preprocessing.size,
        weights=weights or (None if config is None else config.weights),
    )
    return loaded.model.state_dict()
