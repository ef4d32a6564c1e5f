"""One run of a sweep: what it trains, where it stands, and how it goes on.

A trial is an ordinary run folder, and all that is known of it is in that folder: ``summary.json`` ends it, and a
checkpoint is what it goes on from. So nothing is lost with the process that ran it, whichever engine that was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.errors import DataError
from refold.protocols.trial import digest
from refold.training.config import DENSE_TASKS, TrainConfig
from refold.training.evaluation import load_splits
from refold.training.images import chosen_metric
from refold.training.job import train
from refold.training.metrics import lower_is_better
from refold.training.run import RunFolder
from refold.training.tasks import make_task
from refold.training.trainer import Paused

if TYPE_CHECKING:
    from refold.data import ImageSet
    from refold.detection import BoxSet
    from refold.segmentation import MaskSet
    from refold.video import VideoSet

__all__ = ["Row", "Trial", "advance", "look", "reached", "survey"]


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        name: of its folder.
        candidate: what it is a run of, for people: the method and what the grid sets.
        values: what the grid sets.
        config: of the run; ``output`` is its folder.
    """

    name: str
    candidate: str
    values: dict[str, Any]
    config: TrainConfig

    @property
    def method(self) -> str:
        """As a call."""
        return self.config.method.describe()


@dataclass(frozen=True)
class Row:
    """Where a trial stands.

    Attributes:
        trial: which.
        metric: on validation, that trials are compared by.
        status: ``"waiting"``, ``"running"``, ``"stopped"`` (before its last epoch, with a checkpoint), ``"finished"``
            or ``"failed"``.
        epochs: finished.
        value: the metric at the best epoch so far.
        loss: the validation loss of that epoch, which decides between equal values.
        seconds: of training.
        reason: why it failed.
    """

    trial: Trial
    metric: str
    status: str
    epochs: int = 0
    value: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def name(self) -> str:
        """The trial's."""
        return self.trial.name

    @property
    def planned(self) -> int:
        """Epochs of the whole run."""
        return self.trial.config.epochs

    @property
    def worth(self) -> tuple[float, float]:
        """The value such that more is better, and what decides between equal ones; nothing is worth the least."""
        if self.value is None:
            return -math.inf, 0.0
        return -self.value if lower_is_better(self.metric) else self.value, -(self.loss or 0.0)

    def after(self, record: Mapping[str, Any]) -> Row:
        """The row after one more line of ``metrics.jsonl``."""
        if record["split"] != "val":
            return self
        row = replace(self, epochs=record["epoch"])
        better = replace(row, value=record[self.metric], loss=record.get("loss"))
        return better if better.worth > row.worth else row

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        told = {name: getattr(self, name) for name in ("status", "epochs", "value", "loss", "seconds", "reason")}
        trial = self.trial
        return {
            "trial": trial.name, "method": trial.method, "settings": trial.values, "seed": trial.config.seed,
            **told, "folder": trial.config.output,
        }  # fmt: skip


def look(trial: Trial, metric: str) -> Row:
    """What a trial's folder says: waiting, stopped or finished.

    Args:
        trial: whose settings were checked against the folder's.
        metric: that trials are compared by.

    Raises:
        RefoldError: a file is damaged.
    """
    path = Path(trial.config.output) / "summary.json"
    if path.is_file():
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            values = summary["metrics"]["val"]
            return Row(
                trial, metric, "finished", summary["epochs"], values[metric], values.get("loss"), summary["seconds"]
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"cannot be read ({error!r})", where=str(path), remedy="Remove it to go on") from error
    return reached(trial, metric)


def reached(trial: Trial, metric: str, epochs: int | None = None) -> Row:
    """What a trial's checkpoint says: of all epochs it has, or of the first so many.

    Args:
        trial, metric: as for :func:`look`.
        epochs: None is all.

    Raises:
        RefoldError: the file is damaged.
    """
    saved = RunFolder(trial.config.output).read_checkpoint()
    if saved is None:
        return Row(trial, metric, "waiting")
    last = saved.epoch if epochs is None else min(saved.epoch, epochs)
    row = Row(trial, metric, "stopped", seconds=saved.seconds)
    for record in saved.history:
        if record["epoch"] <= last:
            row = row.after(record)
    return replace(row, epochs=last)


def advance(trial: Trial, metric: str, until: int | None = None, on_row: Callable[[Row], None] | None = None) -> Row:
    """Train a trial to its end, or for ``until`` epochs, from where it stands.

    Args:
        trial, metric: as for :func:`look`.
        until: epochs; None, or as many as it has, is to its end.
        on_row: called with the row after each validation.

    Raises:
        RefoldError: whatever training raises.
    """
    row = look(trial, metric)
    last = until is None or until >= trial.config.epochs
    if row.status == "finished" or (not last and row.epochs >= (until or 0)):
        return row
    running = replace(row, status="running")

    def tell(record: dict[str, Any]) -> None:
        nonlocal running
        running = running.after(record)
        if on_row is not None and record["split"] == "val":
            on_row(running)

    with suppress(Paused):
        train(trial.config, resume=True, until=None if last else until, on_epoch=tell, progress=False)
    return look(trial, metric)


def survey(config: TrainConfig) -> tuple[str, dict[str, str]]:
    """The metric that decides, and what tells the data from others: a digest of each split.

    Raises:
        DataError: data that cannot be used, or without a validation split; a metric that they do not have.
    """
    if config.task in DENSE_TASKS:
        from refold.dense.job import load_parts

        parts = load_parts(config)
        metric = config.select or ("miou" if config.task == "segment" else "ap")
    else:
        from refold.video.using import load_parts as load_videos

        parts = load_videos(config) if config.task == "video" else load_splits(config)
        task = make_task(parts.task, parts.classes, parts.train.targets, config)
        metric = chosen_metric(config, task, parts.val)
    if parts.val is None:
        raise DataError(
            "has no validation split, on which trials are compared", where=config.data, remedy="Give split sizes"
        )
    splits = {"train": parts.train, "val": parts.val, "test": parts.test}
    return metric, {name: _digest(part) for name, part in splits.items() if part is not None}


def _digest(part: ImageSet | VideoSet | MaskSet | BoxSet) -> str:
    from refold.detection import BoxSet
    from refold.segmentation import MaskSet

    if isinstance(part, MaskSet):
        content = [part.classes, part.images, part.masks]
    elif isinstance(part, BoxSet):
        content = [part.classes, part.paths, part.objects]
    else:
        return digest(part)
    return hashlib.blake2b(json.dumps(content, default=repr).encode(), digest_size=12).hexdigest()
