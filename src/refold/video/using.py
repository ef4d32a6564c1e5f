"""Scoring a trained model on labelled videos, and asking it about others: several views of each, averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.errors import DataError
from refold.inspection import description
from refold.preprocessing import Preprocessing
from refold.training.build import Ready
from refold.training.config import TrainConfig
from refold.training.evaluation import Evaluation, aligned, assess, prediction_rows
from refold.training.inference import compute_logits, start_accelerator
from refold.video.building import views_of
from refold.video.problem import view_batches
from refold.video.sampling import Views
from refold.video.sources import find_videos, load_videos
from refold.video.videos import VideoSet, VideoSplits

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["evaluate_videos", "load_parts", "predict_videos", "score_views"]

_BATCH = 16  # views of a forward pass


class _Averaged(nn.Module):
    """A model of clips (B * views, T, C, H, W) whose outputs (B, K) are logarithms of the views' mean probabilities."""

    def __init__(self, model: nn.Module, views: int, most: int) -> None:
        super().__init__()
        self.model, self.views, self.most = model, views, most

    def forward(self, clips: Tensor) -> Tensor:
        scores = torch.cat([self.model(part).float() for part in clips.split(self.most)])
        each = scores.log_softmax(dim=1).unflatten(0, (-1, self.views))
        return each.logsumexp(dim=1) - math.log(self.views)


def score_views(
    model: nn.Module,
    video_set: VideoSet,
    preprocessing: Preprocessing,
    views: Views,
    accelerator: Accelerator,
    *,
    batch_size: int | None = None,
    workers: int = 0,
) -> Tensor:
    """Logarithm of the mean probability over the views of every video, (N, K), in float32.

    The same on every process; each video is seen by one.

    Args:
        model: on the accelerator's device; its mode is restored.
        video_set, preprocessing, views: what is seen, and how.
        accelerator: of :func:`refold.training.inference.start_accelerator`.
        batch_size: views of a forward pass; None is 16.
        workers: processes that decode.
    """
    size = batch_size or _BATCH
    batches = view_batches(video_set, views, preprocessing, accelerator, batch_size=size, workers=workers)
    averaged = _Averaged(model, views.count, size)
    return compute_logits(averaged, batches, len(video_set), accelerator, what="videos")


def load_parts(config: TrainConfig) -> VideoSplits:
    """The data of a config."""
    return load_videos(
        config.data,
        train=config.train,
        val=config.val,
        test=config.test,
        fractions=config.fractions,
        seed=config.seed,
        fold=config.fold,
        skip_bad_images=config.skip_bad_images,
    )


def evaluate_videos(
    ready: Ready,
    data: str | Path | None,
    split: str,
    *,
    skip_bad_images: bool,
    clips: int | None,
    crops: int | None,
    batch_size: int | None,
    workers: int,
    **named: Any,
) -> Evaluation:
    """:func:`refold.training.evaluate` of a model of videos; the arguments are described there.

    Raises:
        DataError: no such split, or a class that the model does not know.
    """
    if data is not None:
        fold = 1 if ready.config is None else ready.config.fold
        parts = load_videos(
            data, fractions=(1.0, 0.0, 0.0), fold=fold, skip_bad_images=skip_bad_images, **named
        )  # fmt: skip
        undivided = parts.val is None and parts.test is None
        chosen = parts.train if undivided else getattr(parts, split)
    elif ready.config is not None:
        parts = load_parts(ready.config)
        chosen = getattr(parts, split)
    else:
        raise DataError("is needed: only a run folder knows its data", where="data")
    if chosen is None:
        raise DataError(f"the data has no {split} split", where="split")
    targets = aligned(ready, parts, chosen.targets)
    logits = _logits(ready, chosen, clips, crops, batch_size, workers)
    return assess(logits, chosen.paths, targets, ready.task)


def predict_videos(
    ready: Ready,
    videos: str | Path | Iterable[str | Path],
    *,
    skip_bad_images: bool,
    clips: int | None,
    crops: int | None,
    batch_size: int | None,
    workers: int,
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """:func:`refold.predict` of a model of videos: rows, and what was left out."""
    paths, skipped = find_videos(videos, skip_bad_images=skip_bad_images)
    unknown = VideoSet(paths, torch.full((len(paths),), -1), ready.classes)
    logits = _logits(ready, unknown, clips, crops, batch_size, workers)
    return prediction_rows(paths, ready.task.scores(logits), ready.task), skipped


def _logits(
    ready: Ready, videos: VideoSet, clips: int | None, crops: int | None, batch_size: int | None, workers: int
) -> Tensor:
    views = views_of(description(ready.model))
    given = {name: value for name, value in (("clips", clips), ("crops", crops)) if value is not None}
    views = replace(views, **given)
    accelerator = start_accelerator()
    model = ready.model.to(accelerator.device)
    return score_views(model, videos, ready.preprocessing, views, accelerator, batch_size=batch_size, workers=workers)
