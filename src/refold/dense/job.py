"""``refold.train`` of a dense task: data, encoder, decoder, adapter, training, evaluation and the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from refold.backbones import with_normalization
from refold.dense.building import attach_to, build, default_decoder
from refold.dense.encoder import load_encoder
from refold.detection import BoxSet, BoxSplits, load_boxes
from refold.detection.problem import DetectionProblem, detect, metrics_of
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.segmentation import MaskSet, MaskSplits, load_masks
from refold.segmentation.problem import SegmentationProblem, confusion_of
from refold.training.config import TrainConfig
from refold.training.problem import Problem

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Scored", "build_dense", "load_parts", "make_problem", "score"]

#: Settings that mean nothing where every pixel has a class, or every object a box: what they must be.
_NOT_HERE = {
    "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": None, "consistency": 0.0, "target": None,
    "train": None, "val": None, "test": None, "start": None, "skip_bad_images": False,
}  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """Results on one set.

    Attributes:
        metrics: mIoU and accuracies; or average precisions.
        per_class: a row a class.
        rows: detections as rows of a COCO results file; none of segmentation.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    rows: list[dict[str, Any]]


def load_parts(config: TrainConfig) -> MaskSplits | BoxSplits:
    """The config's data, all of it checked.

    Raises:
        DataError: as :func:`load_masks` and :func:`load_boxes`, or a setting that is not for dense tasks.
    """
    for name, neutral in _NOT_HERE.items():
        if getattr(config, name) != neutral:
            raise DataError(f"is not for task {config.task!r}", where=name, remedy="Leave it out")
    if config.task == "segment":
        return load_masks(config.data, fractions=config.fractions, seed=config.seed)
    return load_boxes(config.data, masks=config.task == "instance", fractions=config.fractions, seed=config.seed)


def build_dense(config: TrainConfig, classes: list[str]) -> tuple[nn.Module, Preprocessing]:
    """The config's model with its method attached; random weights are a function of the seed.

    Raises:
        BackboneError, SiteError, DataError: it cannot be built or adapted.
    """
    assert config.task is not None
    decoder = default_decoder(config.task, config.decoder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        loaded = load_encoder(
            config.model,
            image_size=config.image_size,
            pretrained=config.pretrained,
            in_chans=config.in_chans or 3,
            weights=config.weights,
        )
        preprocessing = with_normalization(loaded.preprocessing, config.normalize)
        loaded = replace(loaded, preprocessing=preprocessing)
        model = build(config.task, decoder, loaded, preprocessing, classes)
        attach_to(
            model, config.method, task=config.task, decoder=decoder, backbone=loaded.spec,
            preprocessing=preprocessing, classes=classes,
        )  # fmt: skip
    return model, preprocessing


def make_problem(
    model: Any, parts: MaskSplits | BoxSplits, preprocessing: Preprocessing, config: TrainConfig
) -> Callable[[Accelerator, str], Problem]:
    """What :func:`refold.training.loop.solve` trains."""

    def problem(accelerator: Accelerator, precision: str) -> Problem:
        if isinstance(parts, MaskSplits):
            return SegmentationProblem(model, parts.train, parts.val, preprocessing, config, accelerator, precision)
        return DetectionProblem(model, parts.train, parts.val, config, accelerator, precision)

    return problem


def score(
    model: Any, part: MaskSet | BoxSet, preprocessing: Preprocessing, accelerator: Accelerator, *, workers: int = 0
) -> Scored:
    """Metrics of a model on a set, in float32."""
    if isinstance(part, MaskSet):
        confusion = confusion_of(model, part, preprocessing, accelerator)
        return Scored(confusion.metrics(), confusion.per_class(), [])
    rows = detect(model, part, accelerator, workers=workers)
    metrics, per_class = metrics_of(model, part, rows)
    return Scored(metrics, per_class, rows)
