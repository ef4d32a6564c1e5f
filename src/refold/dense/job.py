"""``refold.train`` of a dense task: data, encoder, decoder, adapter, training, evaluation and the run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import refold
from refold.backbones import with_normalization
from refold.bench.measure import count_parameters, peak_memory
from refold.dense.building import attach_to, build, default_decoder
from refold.dense.encoder import load_encoder
from refold.detection import BoxSet, BoxSplits, load_boxes
from refold.detection.problem import DetectionProblem, detect, metrics_of
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.report.figures import save
from refold.report.overlays import contact_sheet
from refold.segmentation import Inference, MaskSet, MaskSplits, evaluation_pairs, load_masks
from refold.segmentation.problem import SegmentationProblem, confusion_of
from refold.training.config import TrainConfig
from refold.training.inference import in_evaluation
from refold.training.job import TrainResult
from refold.training.loop import Solved, solve
from refold.training.problem import Problem
from refold.training.run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator
    from matplotlib.figure import Figure

__all__ = ["Scored", "build_dense", "load_parts", "make_problem", "score", "train_dense"]

#: Images in ``overlays.png``, and the lowest score of a detection shown there.
_SHOWN, _SURE = 8, 0.5

#: Settings that mean nothing where every pixel has a class, or every object a box: their defaults, which they keep.
_NOT_HERE = {
    "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": None, "consistency": 0.0, "target": None,
    "train": None, "val": None, "test": None, "start": None, "skip_bad_images": False, "cache": "auto", "crop": "squash",
    "drop_path": 0.1,
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


def train_dense(
    config: TrainConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    *,
    resume: bool,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    progress: bool | None,
) -> TrainResult:
    """:func:`refold.train` of a dense task, in a folder that was checked."""
    parts = load_parts(config)
    model, preprocessing = build_dense(config, parts.classes)
    accelerator.wait_for_everyone()  # all have looked at the folder before the first one writes
    folder.open(config)
    solved = solve(
        model,
        make_problem(model, parts, preprocessing, config),
        config,
        folder=folder,
        resume=resume,
        on_epoch=on_epoch,
        progress=progress,
    )
    if folder.main:
        refold.save(model, folder.adapter_path)
    wanted: dict[str, MaskSet | BoxSet | None]
    wanted = {"val": parts.val, "test": parts.test if config.evaluate_test else None}
    scored = {
        split: score(model, part, preprocessing, accelerator, workers=config.workers)
        for split, part in wanted.items()
        if part is not None
    }
    shown = "test" if "test" in scored else "val"
    part = wanted[shown]
    if part is not None:
        if scored[shown].rows:
            folder.write_json("predictions.json", scored[shown].rows)
        if folder.main:
            save(draw(model, part, preprocessing, accelerator), folder.path / "overlays.png")
    summary = _summary(config, parts, model, solved, scored, folder, accelerator.device)
    folder.write_json("summary.json", summary)
    accelerator.wait_for_everyone()  # when any process returns, the folder is complete
    return TrainResult(
        model=model,
        output=folder.path,
        adapter=folder.adapter_path,
        fit=solved,
        evaluations=scored,
        preprocessing=preprocessing,
        summary=summary,
        skipped=[],
        main_process=folder.main,
    )


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


def draw(model: Any, part: MaskSet | BoxSet, preprocessing: Preprocessing, accelerator: Accelerator) -> Figure:
    """The first images of a set with their truths and predictions side by side."""
    few = part.subset(range(min(_SHOWN, len(part))))
    images, truths, predictions = [], [], []
    with torch.no_grad(), in_evaluation(model):
        if isinstance(few, MaskSet):
            inference = Inference()
            for k, (batch, mask) in enumerate(evaluation_pairs(few, preprocessing)):
                images.append(few.read(k)[0])
                truths.append(mask[0])
                size = (mask.shape[-2], mask.shape[-1])
                predictions.append(inference(model, batch.to(accelerator.device), size).argmax(1)[0].cpu())
            return contact_sheet(images, few.classes, truths=truths, predictions=predictions, background=None)
        for k in range(len(few)):
            images.append(few.read(k))
            truths.append({name: value for name, value in few.target(k).items() if name != "image_id"})
            found = model([images[-1].to(accelerator.device).float() / 255])[0]
            predictions.append({name: value.cpu() for name, value in found.items()})
    classes = ["background", *few.classes]
    return contact_sheet(images, classes, truths=truths, predictions=predictions, threshold=_SURE)


def _summary(
    config: TrainConfig,
    parts: MaskSplits | BoxSplits,
    model: nn.Module,
    solved: Solved,
    scored: dict[str, Scored],
    folder: RunFolder,
    device: torch.device,
) -> dict[str, Any]:
    parameters = count_parameters(model)
    shown = "test" if "test" in scored else "val"
    sets = {"train": parts.train, "val": parts.val, "test": parts.test}
    return {
        "method": config.method.describe(),
        "task": config.task,
        "decoder": default_decoder(config.task or "", config.decoder),
        "classes": parts.classes,
        "images": {name: 0 if part is None else len(part) for name, part in sets.items()},
        "skipped": [],
        "parameters": parameters.total,
        "trainable_parameters": parameters.trainable,
        "file_bytes": folder.adapter_path.stat().st_size if folder.main else None,
        "seconds": solved.seconds,
        "epochs": config.epochs,
        "best_epoch": solved.best_epoch,
        "selected_by": (config.select or ("miou" if config.task == "segment" else "ap")) if parts.val else None,
        "precision": solved.precision,
        "attention": solved.attention,
        "peak_memory": peak_memory(device),
        "metrics": {split: one.metrics for split, one in scored.items()},
        "evaluated_split": shown if scored else None,
        **({"per_class": scored[shown].per_class} if scored else {}),
    }
