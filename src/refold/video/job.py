"""``refold.train`` of videos: data, model, adapter, training, multi-view testing and the run folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import refold
from refold.errors import DataError
from refold.training.config import TrainConfig
from refold.training.evaluation import assess
from refold.training.job import TrainResult, finish, summarize
from refold.training.loop import solve
from refold.training.problem import Problem
from refold.training.progress import showing
from refold.training.run import RunFolder
from refold.training.tasks import make_task, plain_task
from refold.video.building import build_attached
from refold.video.problem import VideoProblem
from refold.video.transforms import mirrors
from refold.video.using import load_parts, score_views

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["train_video"]

_PICTURE = 192  # pixels a side of the picture of a video in the report

#: Settings that mean nothing for videos: their defaults, which they keep.
_NOT_HERE = {"target": None, "cache": "auto", "in_chans": None, "crop": "squash"}


def train_video(
    config: TrainConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    *,
    resume: bool,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    until: int | None,
    progress: bool | None,
) -> TrainResult:
    """:func:`refold.train` of videos, in a folder that was checked."""
    for name, neutral in _NOT_HERE.items():
        if getattr(config, name) != neutral:
            raise DataError("is not for videos", where=name, remedy="Leave it out")
    parts = load_parts(config)
    if mirrors(config.augment) and not parts.mirrored:
        raise DataError(
            "mirrors clips, and these classes tell left from right",
            where="augment",
            remedy=f"Use {config.augment.removesuffix('+flip')!r}",
        )
    task = make_task("classify", parts.classes, parts.train.targets, config)
    model, preprocessing, views = build_attached(config, parts.classes)
    accelerator.wait_for_everyone()  # all have looked at the folder before the first one writes
    folder.open(config)

    def problem(accelerator: Accelerator, precision: str) -> Problem:
        return VideoProblem(
            model, parts.train, parts.val, preprocessing, views.sampling, config, task, accelerator, precision
        )

    solved = solve(
        model, problem, config, folder=folder, resume=resume, on_epoch=on_epoch, until=until, progress=progress
    )
    if folder.main:
        refold.save(model, folder.adapter_path)
    plain = plain_task("classify", parts.classes)
    wanted = {"val": parts.val, "test": parts.test if config.evaluate_test else None}
    evaluations = {}
    for split, part in wanted.items():
        if part is None:
            continue
        with showing(progress):
            logits = score_views(
                model, part, preprocessing, views, accelerator, batch_size=config.batch_size, workers=config.workers
            )
        evaluations[split] = assess(logits, part.paths, part.targets, plain)
    summary = summarize(
        config, parts, model, solved, evaluations, folder, accelerator.device,
        task="video", selected_by=config.select or plain.select, skipped=parts.skipped,
    )  # fmt: skip
    summary["frames"] = views.sampling.frames
    shown = "test" if "test" in evaluations else "val"
    part = wanted[shown]
    if part is not None:
        folder.write_predictions(evaluations[shown].rows)
        folder.write_thumbnails(part, evaluations[shown].thumbnail_rows(), size=_PICTURE)
    return finish(folder, accelerator, model, solved, evaluations, preprocessing, summary, parts.skipped)
