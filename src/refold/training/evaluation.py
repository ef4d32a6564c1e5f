"""Scoring a trained model on labelled images, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.training.build import Ready, resolve
from refold.training.config import TrainConfig
from refold.training.inference import compute_logits, evaluation_loader, start_accelerator
from refold.training.progress import showing
from refold.training.tasks import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.data import ImageSet, Splits
    from refold.dense.job import Scored
    from refold.segmentation import Inference
    from refold.video import VideoSplits

__all__ = [
    "Evaluation",
    "aligned",
    "assess",
    "evaluate",
    "labelled",
    "load_splits",
    "prediction_rows",
    "read_split",
    "refuse_others",
    "score",
]


@dataclass(frozen=True)
class Evaluation:
    """Results on one image set.

    Attributes:
        metrics: ``loss`` and the task's metrics.
        details: ``confusion`` (rows are true classes) and ``per_class``, where the task has them.
        rows: one an image: ``path``, ``target``, ``prediction``, and a ``score ...`` column for each class.
        confidence: score of the predicted class, (N,); of a regression the negative absolute error.
        correct: whether target and prediction agree, one an image; None for a regression.
    """

    metrics: dict[str, float]
    details: dict[str, Any]
    rows: list[dict[str, Any]]
    confidence: list[float]
    correct: list[bool] | None

    def thumbnail_rows(self) -> list[dict[str, Any]]:
        """What :meth:`RunFolder.write_thumbnails` chooses from."""
        correct: Sequence[bool | None] = self.correct or [None] * len(self.rows)
        return [
            {**{k: row[k] for k in ("path", "target", "prediction")}, "score": confidence, "correct": hit}
            for row, confidence, hit in zip(self.rows, self.confidence, correct, strict=True)
        ]


def evaluate(
    source: nn.Module | str | Path,
    data: str | Path | None = None,
    *,
    split: str = "test",
    train: str | None = None,
    val: str | None = None,
    test: str | None = None,
    target: str | None = None,
    skip_bad_images: bool = False,
    weights: str | Path | None = None,
    force: bool = False,
    batch_size: int | None = None,
    workers: int = 0,
    inference: Inference | None = None,
    short_side: int | None = None,
    clips: int | None = None,
    crops: int | None = None,
    progress: bool | None = None,
) -> Evaluation | Scored:
    """Score a trained model on a split of a data set, in float32.

    Args:
        source: a model with an adapter, a run folder, an adapter file, or ``"hf-hub:user/repo"``.
        data: a data set as for training, whose split ``split`` is scored, or all of its images where it is not split;
            None takes the data and the splits of the run folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        train, val, test, target: as in :class:`TrainConfig`.
        skip_bad_images: leave out files that cannot be decoded instead of stopping.
        weights, force: as for :func:`resolve`.
        batch_size: images of a forward pass; None is 64. Dense tasks take images one by one.
        workers: processes that decode.
        inference: of segmentation: windows, scales and flips; None is the whole image at once.
        short_side: of segmentation: pixels that an image's shorter side is resized to; None is that of the model's
            input, 0 leaves the image's own size. Predictions are compared at the size of the mask.
        clips, crops: of a video, as in :class:`TrainConfig`; None is what the run had.
        progress: bars on standard error; None shows them on a terminal.

    Returns:
        of a dense task :class:`refold.dense.job.Scored`, which has ``metrics`` and ``details`` as well.

    Raises:
        DataError: no such split, other classes than the model's, another kind of target, or an argument that is not
            for the model's task.
        StoreError, BackboneError: the model cannot be loaded.
    """
    _require_split(split)
    ready = resolve(source, weights=weights, force=force)
    if ready.dense:
        from refold.dense.evaluating import evaluate_dense

        given = {"train": train, "val": val, "test": test, "target": target, "batch_size": batch_size}
        refuse_others(ready.kind, given | {"skip_bad_images": skip_bad_images or None})
        refuse_others(ready.kind, {"clips": clips, "crops": crops})
        with showing(progress):
            return evaluate_dense(ready, data, split, inference=inference, short_side=short_side, workers=workers)
    refuse_others(ready.kind, {"inference": inference, "short_side": short_side})
    if ready.kind == "video":
        from refold.video.using import evaluate_videos

        refuse_others(ready.kind, {"target": target})
        with showing(progress):
            return evaluate_videos(
                ready, data, split, train=train, val=val, test=test, skip_bad_images=skip_bad_images, clips=clips,
                crops=crops, batch_size=batch_size, workers=workers,
            )  # fmt: skip
    refuse_others(ready.kind, {"clips": clips, "crops": crops})
    chosen, targets = labelled(
        ready, data, split, train=train, val=val, test=test, target=target, skip_bad_images=skip_bad_images
    )
    accelerator = start_accelerator()
    with showing(progress):
        return score(
            ready.model.to(accelerator.device),
            chosen,
            targets,
            ready.preprocessing,
            ready.task,
            accelerator=accelerator,
            batch_size=batch_size or 64,
            workers=workers,
        )


def labelled(
    ready: Ready,
    data: str | Path | None,
    split: str,
    *,
    train: str | None = None,
    val: str | None = None,
    test: str | None = None,
    target: str | None = None,
    skip_bad_images: bool = False,
) -> tuple[ImageSet, Tensor]:
    """Labelled images for a model of whole images, and their targets counted as the model does.

    The arguments are those of :func:`evaluate`.

    Raises:
        DataError: no such split, other classes than the model's, or another kind of target.
    """
    if data is not None:
        splits, chosen = read_split(
            data, split, train=train, val=val, test=test, target=target, skip_bad_images=skip_bad_images
        )
    elif ready.config is not None:
        _require_split(split)
        splits = load_splits(ready.config)
        chosen = _existing(getattr(splits, split), split)
    else:
        raise DataError("is needed: only a run folder knows its data", where="data")
    return chosen, aligned(ready, splits, chosen.targets)


def read_split(
    data: str | Path,
    split: str,
    *,
    train: str | None = None,
    val: str | None = None,
    test: str | None = None,
    target: str | None = None,
    skip_bad_images: bool = False,
) -> tuple[Splits, ImageSet]:
    """A data set and the images of one of its splits, or all of them where it is not split.

    The arguments are those of :func:`evaluate`.

    Raises:
        DataError: no such split, or data that cannot be read.
    """
    from refold.data import load_dataset

    _require_split(split)
    splits = load_dataset(
        data, train=train, val=val, test=test, target=target, fractions=(1.0, 0.0, 0.0),
        skip_bad_images=skip_bad_images,
    )  # fmt: skip
    undivided = splits.val is None and splits.test is None
    return splits, splits.train if undivided else _existing(getattr(splits, split), split)


def _existing(images: ImageSet | None, split: str) -> ImageSet:
    if images is None:
        raise DataError(f"the data has no {split} split", where="split")
    return images


def _require_split(split: str) -> None:
    if split not in ("train", "val", "test"):
        raise DataError(f"must be train, val or test, not {split!r}", where="split")


def refuse_others(kind: str, given: dict[str, Any]) -> None:
    """Raise :class:`DataError` for the first argument that is given and means nothing for this kind of task."""
    for name, value in given.items():
        if value is not None:
            raise DataError(f"is not for task {kind!r}", where=name, remedy="Leave it out")


def load_splits(config: TrainConfig) -> Splits:
    """The data of a config."""
    from refold.data import load_dataset

    return load_dataset(
        config.data,
        train=config.train,
        val=config.val,
        test=config.test,
        target=config.target,
        fractions=config.fractions,
        seed=config.seed,
        skip_bad_images=config.skip_bad_images,
        cache=config.cache,
    )


def score(
    model: nn.Module,
    image_set: ImageSet,
    targets: Tensor,
    preprocessing: Preprocessing,
    task: Task,
    *,
    accelerator: Accelerator,
    batch_size: int,
    workers: int = 0,
    precision: str = "fp32",
) -> Evaluation:
    """Score ``model``, by default in float32, on images whose ``targets`` count classes as the model does."""
    loader = evaluation_loader(image_set, preprocessing, accelerator, batch_size=batch_size, workers=workers)
    logits = compute_logits(model, loader, len(image_set), accelerator, precision=precision)
    return assess(logits, image_set.paths, targets, task)


def assess(logits: Tensor, paths: Sequence[str], targets: Tensor, task: Task) -> Evaluation:
    """Results of outputs (N, K) for N files."""
    scores = task.scores(logits)
    rows = prediction_rows(paths, scores, task, targets)
    if task.kind == "regress":
        confidence, correct = (-(scores - targets).abs()).tolist(), None
    else:
        confidence = scores.amax(dim=1).tolist()
        correct = [row["target"] == row["prediction"] for row in rows]
    metrics = {"loss": float(task.loss(logits, targets)), **task.metrics(scores, targets)}
    return Evaluation(metrics, task.details(scores, targets), rows, confidence, correct)


def prediction_rows(
    paths: Sequence[str], scores: Tensor, task: Task, targets: Tensor | None = None
) -> list[dict[str, Any]]:
    """One row an image: ``path``, ``target`` where known, ``prediction``, and ``score CLASS`` for each class."""
    wanted = [{}] * len(paths) if targets is None else [{"target": t} for t in task.target_labels(targets)]
    names = [f"score {name}" for name in task.classes or ()]
    values = scores.tolist() if names else [()] * len(paths)
    return [
        {"path": path, **target, "prediction": label, **dict(zip(names, row, strict=True))}
        for path, target, label, row in zip(paths, wanted, task.labels(scores), values, strict=True)
    ]


def aligned(ready: Ready, splits: Splits | VideoSplits, targets: Tensor) -> Tensor:
    """Targets counted in the order of the model's classes.

    Raises:
        DataError: another kind of target, or a class the model does not know.
    """
    task = ready.task
    if splits.task != task.kind:
        raise DataError(f"is made for {splits.task!r}, and the model for {task.kind!r}", where="data")
    if task.classes is None or splits.classes is None:
        return targets
    unknown = [name for name in splits.classes if name not in task.classes]
    if unknown:
        known = f"It knows: {', '.join(task.classes)}"
        raise DataError(f"has classes the model does not know: {', '.join(unknown)}", where="data", remedy=known)
    places = torch.tensor([task.classes.index(name) for name in splits.classes])
    if task.kind == "classify":
        return places[targets]
    aligned = torch.zeros(len(targets), len(task.classes))
    aligned[:, places] = targets
    return aligned
