"""``refold.train`` of a dense task: data, encoder, decoder, adapter, training, evaluation and the run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

import refold
from refold.backbones import with_normalization
from refold.backbones.files import cache_dir
from refold.data.coco_files import BACKGROUND
from refold.dense.building import attach_to, build, default_decoder
from refold.dense.encoder import Encoder, LoadedEncoder, load_encoder
from refold.dense.features import Features
from refold.dense.packaged import PACKAGED, packaged
from refold.dense.replay import Replay
from refold.dense.shapes import shapes
from refold.detection import BoxSet, BoxSplits, load_boxes
from refold.detection.problem import DetectionProblem, detect, metrics_of
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.segmentation import Inference, MaskSet, MaskSplits, evaluation_pairs, load_masks
from refold.segmentation.pixel_text import text_of
from refold.segmentation.problem import SegmentationProblem, confusion_of
from refold.training.config import TrainConfig
from refold.training.inference import in_evaluation
from refold.training.job import TrainResult, finish, summarize
from refold.training.loop import solve
from refold.training.problem import Problem
from refold.training.progress import showing
from refold.training.recipe import Recipe
from refold.training.run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "Scored",
    "background_of",
    "build_dense",
    "build_plain",
    "load_labelled",
    "load_parts",
    "make_problem",
    "require_dense",
    "score",
    "train_dense",
]

#: Images in ``overlays.png``, and the score from which on a detection is always shown there.
_SHOWN, _SURE = 8, 0.5

#: Settings that mean nothing where every pixel has a class, or every object a box: their defaults, which they keep.
_NOT_HERE = {
    "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": None, "consistency": 0.0, "target": None,
    "train": None, "val": None, "test": None, "start": None, "skip_bad_images": False, "cache": "auto",
    "crop": "squash", "drop_path": 0.1,
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

    @property
    def details(self) -> dict[str, Any]:
        """``per_class``, as of :class:`refold.training.Evaluation`."""
        return {"per_class": self.per_class}


def train_dense(
    config: TrainConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    *,
    resume: bool,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    until: int | None,
    progress: bool | None,
) -> TrainResult:
    """:func:`refold.train` of a dense task, in a folder that was checked."""
    parts = load_parts(config)
    model, preprocessing = build_dense(config, parts.classes)
    features = None if config.features is None else Features(config.features, config.views)
    if features is not None:
        Replay(cast(Encoder, model.encoder))  # complains now of a method whose features cannot be cached
    accelerator.wait_for_everyone()  # all have looked at the folder before the first one writes
    folder.open(config)
    solved = solve(
        model,
        make_problem(model, parts, preprocessing, config, features),
        config,
        folder=folder,
        resume=resume,
        on_epoch=on_epoch,
        until=until,
        progress=progress,
    )
    if folder.main:
        refold.save(model, folder.adapter_path)
    wanted: dict[str, MaskSet | BoxSet | None]
    wanted = {"val": parts.val, "test": parts.test if config.evaluate_test else None}
    with showing(progress):
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
            draw(model, part, preprocessing, accelerator, folder.path / "overlays.png")
    task = config.task or ""
    summary = summarize(
        config, parts, model, solved, scored, folder, accelerator.device,
        task=task, selected_by=config.select or ("miou" if task == "segment" else "ap"),
    )  # fmt: skip
    summary["decoder"] = default_decoder(task, config.decoder)
    if features is not None:
        summary["features"] = features.facts
    return finish(folder, accelerator, model, solved, scored, preprocessing, summary, [])


def load_parts(config: TrainConfig) -> MaskSplits | BoxSplits:
    """The config's data, all of it checked.

    Raises:
        DataError: as :func:`load_masks` and :func:`load_boxes`, or a setting that is not for dense tasks.
    """
    require_dense(config, config.task or "")
    assert config.task is not None
    return load_labelled(config.task, config.data, fractions=config.fractions, seed=config.seed)


def load_labelled(
    task: str, data: str | Path, *, fractions: Sequence[float | None], seed: int = 0
) -> MaskSplits | BoxSplits:
    """A dense task's data: files, or one of :data:`refold.dense.packaged.PACKAGED` or ``shapes`` after ``packaged/``.

    Raises:
        DataError: as :func:`load_masks` and :func:`load_boxes`.
    """
    source, name = Path(data), str(data).removeprefix("packaged/")
    if name != str(data):
        cache = cache_dir() / "data"
        known = ("shapes", *PACKAGED)
        if name not in known:
            raise DataError("no such packaged data set", where=str(data), remedy=f"Known: {', '.join(known)}")
        source = (shapes(cache) if name == "shapes" else packaged(name, cache)).root
    if task == "segment":
        return load_masks(source, fractions=fractions, seed=seed)
    return load_boxes(source, masks=task == "instance", fractions=fractions, seed=seed)


def require_dense(recipe: Recipe, task: str) -> None:
    """Raise :class:`DataError` for a setting that means nothing where pixels have classes, or objects boxes."""
    for name, neutral in _NOT_HERE.items():
        if getattr(recipe, name, neutral) != neutral:
            raise DataError(f"is not for task {task!r}", where=name, remedy="Leave it out")


def build_dense(config: TrainConfig, classes: list[str]) -> tuple[nn.Module, Preprocessing]:
    """The config's model with its method attached; random weights are a function of the seed.

    Raises:
        BackboneError, SiteError, DataError: it cannot be built or adapted.
    """
    assert config.task is not None
    decoder = default_decoder(config.task, config.decoder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model, loaded = build_plain(config, classes)
        attach_to(
            model, config.method, task=config.task, decoder=decoder, backbone=loaded.spec,
            preprocessing=loaded.preprocessing, classes=classes,
        )  # fmt: skip
    return model, loaded.preprocessing


def build_plain(config: TrainConfig, classes: list[str]) -> tuple[nn.Module, LoadedEncoder]:
    """The config's model without its method; random weights are drawn from the global generator.

    Raises:
        BackboneError, DataError: it cannot be built.
    """
    assert config.task is not None
    loaded = load_encoder(
        config.model,
        image_size=config.image_size,
        pretrained=config.pretrained,
        in_chans=config.in_chans or 3,
        weights=config.weights,
    )
    preprocessing = with_normalization(loaded.preprocessing, config.normalize)
    loaded = replace(loaded, preprocessing=preprocessing)
    decoder = default_decoder(config.task, config.decoder)
    words = partial(text_of, pretrained=config.pretrained)
    return build(config.task, decoder, loaded, preprocessing, classes, words=words), loaded


def make_problem(
    model: Any,
    parts: MaskSplits | BoxSplits,
    preprocessing: Preprocessing,
    recipe: Recipe,
    features: Features | None = None,
) -> Callable[[Accelerator, str], Problem]:
    """What :func:`refold.training.loop.solve` trains."""

    def problem(accelerator: Accelerator, precision: str) -> Problem:
        if isinstance(parts, MaskSplits):
            return SegmentationProblem(
                model, parts.train, parts.val, preprocessing, recipe, accelerator, precision, features
            )
        return DetectionProblem(model, parts.train, parts.val, recipe, accelerator, precision, features)

    return problem


def score(
    model: Any,
    part: MaskSet | BoxSet,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    inference: Inference | None = None,
    short_side: int | None = None,
) -> Scored:
    """Metrics of a model on a set, in float32; the last two are of segmentation, see :func:`confusion_of`."""
    if isinstance(part, MaskSet):
        confusion = confusion_of(model, part, preprocessing, accelerator, inference=inference, short_side=short_side)
        return Scored(confusion.metrics(), confusion.per_class(), [])
    rows = detect(model, part, accelerator, workers=workers)
    metrics, per_class = metrics_of(model, part, rows)
    return Scored(metrics, per_class, rows)


def draw(
    model: Any, part: MaskSet | BoxSet, preprocessing: Preprocessing, accelerator: Accelerator, path: Path
) -> None:
    """A picture of the first images of a set, with their truths and predictions side by side."""
    from refold.report import figures
    from refold.report.overlays import contact_sheet

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
            shown = background_of(few.classes)
            sheet = contact_sheet(images, few.classes, truths=truths, predictions=predictions, background=shown)
            figures.save(sheet, path)
            return
        for k in range(len(few)):
            images.append(few.read(k))
            truths.append({name: value for name, value in few.target(k).items() if name != "image_id"})
            found = model([images[-1].to(accelerator.device).float() / 255])[0]
            predictions.append({name: value.cpu() for name, value in found.items()})
    scores = torch.cat([found["scores"] for found in predictions]).sort(descending=True).values
    objects = max(few.count(), 1)
    # As many as there are objects where the model is never sure, as it is after a short training.
    threshold = min(_SURE, float(scores[:objects][-1])) if len(scores) else _SURE
    classes = [BACKGROUND, *few.classes]
    figures.save(contact_sheet(images, classes, truths=truths, predictions=predictions, threshold=threshold), path)


def background_of(classes: Sequence[str]) -> int | None:
    """The class that pictures of masks leave unpainted; None where no class is called background."""
    return classes.index(BACKGROUND) if BACKGROUND in classes else None
