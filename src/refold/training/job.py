"""``refold.train``: data, backbone, adapter, training, evaluation and the run folder, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import refold
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.state import require_state
from refold.training.build import build_attached
from refold.training.config import TrainConfig
from refold.training.evaluation import Evaluation, load_splits, score
from refold.training.inference import start_accelerator
from refold.training.loop import Solved, fit
from refold.training.progress import showing
from refold.training.run import RunFolder
from refold.training.sharding import read_launch
from refold.training.tasks import make_task

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.data import Splits
    from refold.dense.features import Features
    from refold.dense.job import Scored
    from refold.detection import BoxSplits
    from refold.segmentation import MaskSplits
    from refold.video import VideoSplits

__all__ = ["TrainResult", "finish", "summarize", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` returns.

    Attributes:
        model: attached, in eval mode, at its best epoch, with the backbone's float32 originals.
        output: the run folder.
        adapter: the adapter file in it.
        fit: history, best epoch, time.
        evaluations: by split (``"val"``, ``"test"``), in float32; of a dense task :class:`refold.dense.Scored`.
        preprocessing: how images become the model's input.
        summary: content of ``summary.json``.
        skipped: (path, reason) of the images left out.
        main_process: whether this process wrote the folder; only that one should print.
    """

    model: nn.Module
    output: Path
    adapter: Path
    fit: Solved
    evaluations: Mapping[str, Evaluation | Scored]
    preprocessing: Preprocessing
    summary: dict[str, Any]
    skipped: list[tuple[str, str]]
    main_process: bool

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of the best epoch by split."""
        return {split: evaluation.metrics for split, evaluation in self.evaluations.items()}


def train(
    config: TrainConfig | None = None,
    /,
    *,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    until: int | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> TrainResult:
    """Adapt a backbone to a data set and write a run folder.

    The best epoch is chosen on the validation split alone, then scored in float32 on the validation and the
    test split. Under ``accelerate launch`` or ``torchrun`` every process calls this with the same arguments; the
    first one writes and reads ``output``, which other hosts need not see. (On CPUs ``accelerate launch --cpu`` starts
    one process whatever ``--num_processes`` says; ``--multi_gpu`` in its place starts all, GPUs or not.) With
    ``--use_fsdp --fsdp_version 2`` the frozen weights are divided between the processes while they train, see
    :mod:`refold.training.sharding`.

    The folder holds ``config.json``, ``metrics.jsonl``, ``adapter.safetensors`` (best epoch), ``checkpoint.pt``
    (last epoch), ``tensorboard/``, ``predictions.csv`` and ``thumbnails/`` (of the test split, else of the
    validation split), and ``summary.json``. In place of ``predictions.csv`` and ``thumbnails/`` a dense task writes
    ``overlays.png``, and of detection ``predictions.json``, a COCO results file.

    Args:
        config: all settings; or give them by keyword.
        resume: go on with a run that was stopped: same settings, same folder; in the middle of an epoch, where
            ``checkpoint_every`` is set, as many processes. On the CPU the result is the uninterrupted run's, bit for
            bit. Starts anew where there is no checkpoint yet.
        on_epoch: called on the first process with each record of ``metrics.jsonl`` as it appears.
        until: epochs, fewer than the config's, after which to pause: the schedule stays that of all of them, and
            ``resume`` goes on.
        progress: bars on standard error; None shows them on a terminal.
        settings: fields of :class:`TrainConfig`; beside a ``config`` they replace its values.

    Raises:
        DataError: a bad setting, bad data, an output folder in use, or a resumed run with other settings.
        BackboneError, SiteError: the backbone cannot be loaded or adapted.
        RefoldError: the loss diverged, or the disk is full; the last checkpoint stays.
        Paused: after ``until`` epochs (:class:`refold.training.trainer.Paused`).
        KeyboardInterrupt: with a note that says how to resume.
    """
    config = TrainConfig.of(**settings) if config is None else config.replace(**settings)
    accelerator = start_accelerator()
    if config.features is not None and read_launch() is not None:
        raise DataError(
            "no training step runs the backbone, whose weights FSDP2 would divide",
            where="features",
            remedy="Leave it out, or launch without FSDP",
        )
    folder = RunFolder(config.output, main=accelerator.is_main_process)
    folder.check(config, resume=resume)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    if config.task == "video":
        from refold.video.job import train_video

        return train_video(
            config, accelerator, folder, resume=resume, on_epoch=on_epoch, until=until, progress=progress
        )
    if config.task is not None:
        from refold.dense.job import train_dense

        return train_dense(
            config, accelerator, folder, resume=resume, on_epoch=on_epoch, until=until, progress=progress
        )
    splits = load_splits(config)
    model, preprocessing = build_attached(config, splits.task, splits.classes)
    if config.start is not None:
        task = make_task(splits.task, splits.classes, splits.train.targets, config)
        task.begin(model, require_state(model, "train").record().head)
    features = None if config.features is None else _features(config, model)
    accelerator.wait_for_everyone()  # all have looked at the folder before the first one writes
    folder.open(config)
    fitted = fit(
        model,
        splits.train,
        splits.val,
        preprocessing,
        config,
        task=splits.task,
        classes=splits.classes,
        folder=folder,
        resume=resume,
        on_epoch=on_epoch,
        until=until,
        progress=progress,
        features=features,
    )
    if folder.main:
        refold.save(model, folder.adapter_path)
    wanted = {"val": splits.val, "test": splits.test if config.evaluate_test else None}
    with showing(progress):
        evaluations = {
            split: score(
                model,
                image_set,
                image_set.targets,
                preprocessing,
                fitted.task,
                accelerator=accelerator,
                batch_size=config.batch_size,
                workers=config.workers,
            )
            for split, image_set in wanted.items()
            if image_set is not None
        }
    summary = summarize(
        config, splits, model, fitted, evaluations, folder, accelerator.device,
        task=splits.task, selected_by=config.select or fitted.task.select, skipped=splits.skipped,
    )  # fmt: skip
    if features is not None:
        summary["features"] = features.facts
    if evaluations:
        shown = "test" if "test" in evaluations else "val"
        image_set = wanted[shown]
        assert image_set is not None
        folder.write_predictions(evaluations[shown].rows)
        folder.write_thumbnails(image_set, evaluations[shown].thumbnail_rows())
    return finish(folder, accelerator, model, fitted, evaluations, preprocessing, summary, splits.skipped)


def _features(config: TrainConfig, model: nn.Module) -> Features:
    """Where the config's features are.

    Raises:
        SiteError: the method's cannot be cached.
    """
    from refold.dense.features import Features
    from refold.dense.halves import Halves
    from refold.dense.replay import Replay

    assert config.features is not None
    Replay(Halves(model).encoder)  # complains now
    return Features(config.features, config.views)


def finish(
    folder: RunFolder,
    accelerator: Accelerator,
    model: nn.Module,
    solved: Solved,
    evaluations: Mapping[str, Evaluation | Scored],
    preprocessing: Preprocessing,
    summary: dict[str, Any],
    skipped: list[tuple[str, str]],
) -> TrainResult:
    """Write ``summary.json``, the last file of a run folder, and wait for all processes: the folder is complete."""
    folder.write_json("summary.json", summary)
    accelerator.wait_for_everyone()
    return TrainResult(
        model=model,
        output=folder.path,
        adapter=folder.adapter_path,
        fit=solved,
        evaluations=evaluations,
        preprocessing=preprocessing,
        summary=summary,
        skipped=skipped,
        main_process=folder.main,
    )


def summarize(
    config: TrainConfig,
    parts: Splits | MaskSplits | BoxSplits | VideoSplits,
    model: nn.Module,
    solved: Solved,
    evaluations: Mapping[str, Evaluation | Scored],
    folder: RunFolder,
    device: torch.device,
    *,
    task: str,
    selected_by: str,
    skipped: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Content of ``summary.json``.

    Args:
        config, parts, model, solved, evaluations, folder: of the run, which is finished.
        device: that it trained on.
        task: of the data.
        selected_by: the metric that chose the best epoch, if there is a validation split.
        skipped: (path, reason) of the images left out.
    """
    from refold.bench.measure import count_parameters, peak_memory

    parameters = count_parameters(model)
    shown = "test" if "test" in evaluations else "val"
    sets = {"train": parts.train, "val": parts.val, "test": parts.test}
    return {
        "method": config.method.describe(),
        "task": task,
        "classes": parts.classes,
        "images": {name: 0 if part is None else len(part) for name, part in sets.items()},
        "skipped": [{"path": str(path), "reason": reason} for path, reason in skipped],
        "parameters": parameters.total,
        "trainable_parameters": parameters.trainable,
        "file_bytes": folder.adapter_path.stat().st_size if folder.main else None,
        "seconds": solved.seconds,
        "epochs": config.epochs,
        "best_epoch": solved.best_epoch,
        "selected_by": selected_by if parts.val is not None else None,
        "precision": solved.precision,
        "attention": solved.attention,
        "peak_memory": peak_memory(device),
        "metrics": {split: evaluation.metrics for split, evaluation in evaluations.items()},
        "evaluated_split": shown if evaluations else None,
        **(evaluations[shown].details if evaluations else {}),
    }
