"""Train an attached model on image sets: the part of a run that needs neither spec nor folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from refold.preprocessing import Preprocessing
from refold.state import require_state
from refold.training.images import ImageProblem
from refold.training.inference import start_accelerator
from refold.training.memory import keep_freed_memory
from refold.training.precision import flush_denormals, reduced_precision, resolve_precision
from refold.training.problem import Problem
from refold.training.recipe import Recipe
from refold.training.run import RunFolder
from refold.training.tasks import Task, make_task, plain_task
from refold.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.data import ImageSet
    from refold.dense.features import Features

__all__ = ["Fit", "Solved", "fit", "solve"]


@dataclass(frozen=True)
class Solved:
    """What :func:`solve` returns; the model itself is left at its best epoch.

    Attributes:
        best_epoch: the chosen epoch, from 1; the last one without a validation set.
        metrics: validation loss and metrics of that epoch as measured during training, in its precision; empty
            without a validation set.
        history: one record an epoch and split, the lines of ``metrics.jsonl``.
        seconds: wall time of all epochs, validation included.
        precision: ``"fp32"`` or ``"bf16"``.
        attention: the attention kernel of training steps, see :mod:`refold.training.attention`.
    """

    best_epoch: int
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    seconds: float
    precision: str
    attention: str


@dataclass(frozen=True)
class Fit(Solved):
    """What :func:`fit` returns.

    Attributes:
        task: what the model's outputs mean now.
    """

    task: Task


def fit(
    model: nn.Module,
    train_set: ImageSet,
    val_set: ImageSet | None,
    preprocessing: Preprocessing,
    recipe: Recipe,
    *,
    task: str = "classify",
    classes: list[str] | None = None,
    folder: RunFolder | None = None,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    before_step: Callable[[int], None] | None = None,
    until: int | None = None,
    progress: bool | None = False,
    features: Features | None = None,
) -> Fit:
    """Train what :func:`refold.attach` left trainable, and leave the model at its best epoch, in eval mode.

    See :func:`solve`, which does it.

    Args:
        model: attached; moved to the training device.
        train_set, val_set: images with targets.
        preprocessing: of evaluation; augmentation comes on top of it.
        recipe: how to optimise.
        task: ``"classify"``, ``"multilabel"`` or ``"regress"``.
        classes: names in the order of the head's outputs; None for a regression.
        folder, resume, on_epoch, before_step, until, progress: as for :func:`solve`.
        features: where what the frozen backbone gives is kept; None computes it at every step.

    Raises:
        DataError: a setting that does not suit the data, or a resumed run with other settings.
        SiteError, StoreError: as :meth:`refold.dense.features.Features.prepare`.
        RefoldError: the loss became infinite or not a number; the last checkpoint stays.
        Paused: as :func:`solve`.
        KeyboardInterrupt: with a note that says how to resume.
    """
    built = make_task(task, classes, train_set.targets, recipe)

    def problem(accelerator: Accelerator, precision: str) -> ImageProblem:
        return ImageProblem(model, train_set, val_set, preprocessing, recipe, built, accelerator, precision, features)

    solved = solve(
        model, problem, recipe, folder=folder, resume=resume, on_epoch=on_epoch, before_step=before_step, until=until,
        progress=progress,
    )  # fmt: skip
    built.finish(model, require_state(model, "fit").record().head)
    return Fit(**vars(solved), task=plain_task(task, classes))


def solve(
    model: nn.Module,
    build: Callable[[Accelerator, str], Problem],
    recipe: Recipe,
    *,
    folder: RunFolder | None = None,
    resume: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    before_step: Callable[[int], None] | None = None,
    until: int | None = None,
    progress: bool | None = False,
) -> Solved:
    """Train what is left trainable on a problem, and leave the model at its best epoch, in eval mode.

    The best epoch is the one that the validation set prefers (never the test set; without a validation set
    it is the last); equal values are decided by the validation loss. During training the model runs in the
    recipe's precision, validation included; afterwards every frozen weight is the float32 original, bit for
    bit. Runs on the processes and the device of ``accelerate launch``; a batch is split over the processes.
    The global random state and the denormal mode are left as they were.

    Args:
        model: attached, or a part of it is; moved to the training device.
        build: makes the problem, given the accelerator and the precision, when the model is where it trains.
        recipe: how to optimise.
        folder: where checkpoints and metrics go; None keeps nothing on disk.
        resume: go on from the checkpoint in ``folder`` if there is one.
        on_epoch: called on the main process with every record of ``history`` as it appears.
        before_step: called on every process with the number of each training step, from 0, before its forward; a
            resumed run goes on counting.
        until: epochs, fewer than the recipe's, after which to pause: the schedule stays that of all of them, and
            ``resume`` goes on.
        progress: bars on standard error; None shows them on a terminal.

    Raises:
        DataError: a setting that does not suit the data, or a resumed run with other settings.
        RefoldError: the loss became infinite or not a number; the last checkpoint stays.
        Paused: after ``until`` epochs.
        KeyboardInterrupt: with a note that says how to resume.
    """
    accelerator = start_accelerator()
    device = accelerator.device
    precision = resolve_precision(recipe.precision, device)
    model.to(device)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(flush_denormals())
        if device.type == "cpu":
            stack.enter_context(keep_freed_memory())
        if precision == "bf16":
            stack.enter_context(reduced_precision(model))
        trainer = Trainer(
            model, build(accelerator, precision), recipe, accelerator, folder, on_epoch, before_step, until
        )
        if resume and folder is not None:
            trainer.resume(folder)
        try:
            trainer.run(progress)
        except KeyboardInterrupt as error:
            if folder is not None:
                error.add_note(_how_to_resume(trainer, folder))
            raise
        finally:
            if folder is not None:
                folder.close()
        trainer.restore_best()
    model.eval()
    epoch = trainer.epoch if trainer.best is None else trainer.best.epoch
    chosen = (row for row in trainer.history if row["split"] == "val" and row["epoch"] == epoch)
    return Solved(
        best_epoch=epoch,
        metrics={k: v for k, v in next(chosen, {}).items() if k not in ("epoch", "step", "split", "seconds")},
        history=trainer.history,
        seconds=trainer.seconds,
        precision=precision,
        attention=trainer.attention,
    )


def _how_to_resume(trainer: Trainer, folder: RunFolder) -> str:
    again = "The same command with --resume (in Python resume=True)"
    epochs, steps = divmod(trainer.saved, trainer.steps)
    if trainer.saved:
        within = f" and {steps} of {trainer.steps} steps" if steps else ""
        done = f"Stopped after {epochs} of {trainer.recipe.epochs} epochs{within}"
        return f"{done}. {again} goes on from {folder.checkpoint_path}"
    return f"Stopped before the first checkpoint. {again} starts anew in {folder.path}"
