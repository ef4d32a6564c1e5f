"""One training of a protocol: from settings and data to a record that is kept, and never made twice; and the choice
between several.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from refold.data import ImageSet, Splits
from refold.errors import DataError
from refold.methods import Method
from refold.preprocessing import Preprocessing
from refold.protocols.points import Point
from refold.training.build import build_attached
from refold.training.checkpoint import check_same, write_atomically
from refold.training.config import FREE_SETTINGS, TrainConfig
from refold.training.evaluation import score
from refold.training.inference import compute_logits, evaluation_loader, start_accelerator
from refold.training.loop import fit
from refold.training.progress import showing

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.video import VideoSet

__all__ = [
    "Choice",
    "Engine",
    "Job",
    "Other",
    "Repeated",
    "Standing",
    "choose",
    "digest",
    "final_jobs",
    "finals",
    "method_slug",
    "search_jobs",
    "trial",
    "write_json",
]


class Repeated(tuple[float, ...]):
    """A score for each seed."""

    @property
    def mean(self) -> float:
        return statistics.mean(self)

    @property
    def spread(self) -> float:
        """Standard deviation; 0 of one seed."""
        return statistics.stdev(self) if len(self) > 1 else 0.0

    def percent(self) -> str:
        """``81.2 ± 0.4``; the mean alone of one seed."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.spread:.1f}" if len(self) > 1 else "")


@dataclass(frozen=True)
class Other:
    """A further test set.

    Attributes:
        images: with targets among the model's outputs.
        outputs: (K,) which of the model's outputs compete; None is all of them.
    """

    images: ImageSet
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Job:
    """A training to be made: arguments of :func:`trial`."""

    config: TrainConfig
    splits: Splits
    path: Path
    others: Mapping[str, Other] | None = None

    def make(
        self, progress: bool | None = False, on_epoch: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Its record, made or read."""
        return trial(self.config, self.splits, self.path, others=self.others, progress=progress, on_epoch=on_epoch)


@dataclass(frozen=True)
class Standing:
    """Where one of many trainings stands.

    Attributes:
        job: which.
        status: ``"waiting"``, ``"running"``, ``"finished"`` or ``"failed"``.
        epochs: finished.
    """

    job: Job
    status: str
    epochs: int = 0

    @property
    def name(self) -> str:
        """The record's folder and file."""
        return f"{self.job.path.parent.name}/{self.job.path.stem}"

    @property
    def planned(self) -> int:
        """Epochs of the whole training."""
        return self.job.config.epochs


class Engine(Protocol):
    """What makes many records at once, such as :class:`refold.sweeps.RayEngine`."""

    def records(self, jobs: Sequence[Job], folder: Path, on_job: Callable[[Standing], None] | None = None) -> None:
        """Make those that are not there yet; files beside them go to ``folder``.

        ``on_job`` is called with each of them at the start, and whenever it stands elsewhere.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` found.

    Attributes:
        point: the best.
        candidates: validation accuracy of each; empty where there was one.
        seconds: of training.
    """

    point: Point
    candidates: dict[str, float]
    seconds: float


def choose(
    config: TrainConfig, candidates: Sequence[Point], splits: Splits, folder: Path, *, progress: bool | None = False
) -> Choice:
    """The candidate with the best accuracy, then the least loss, on ``splits.val`` after the last epoch.

    Args:
        config: what candidates change.
        candidates: one is taken without training.
        splits: to train and validate on.
        folder: of the records, ``val-POINT-SEED.json``.
        progress: as for :func:`trial`.

    Raises:
        DataError, RefoldError: as :func:`trial`.
    """
    if len(candidates) == 1:
        return Choice(candidates[0], {}, 0.0)
    last: dict[Point, dict[str, float]] = {}
    seconds = 0.0
    for point, job in zip(candidates, search_jobs(config, candidates, splits, folder), strict=True):
        record = job.make(progress)
        last[point] = record["val"][-1]
        seconds += record["seconds"]
    best = max(candidates, key=lambda point: (last[point]["accuracy"], -last[point]["loss"]))
    return Choice(best, {str(point): row["accuracy"] for point, row in last.items()}, seconds)


def search_jobs(config: TrainConfig, candidates: Sequence[Point], splits: Splits, folder: Path) -> list[Job]:
    """What :func:`choose` trains; nothing where there is one candidate."""
    if len(candidates) == 1:
        return []
    return [
        Job(
            point.apply(config).replace(validate_every=config.epochs),
            splits,
            folder / f"val-{point.slug}-{config.seed}.json",
        )
        for point in candidates
    ]


def finals(
    config: TrainConfig,
    chosen: Choice,
    seeds: Sequence[int],
    splits: Callable[[int], Splits],
    folder: Path,
    *,
    others: Mapping[str, Other] | None = None,
    progress: bool | None = False,
) -> tuple[list[dict[str, Any]], float]:
    """What was chosen, trained and tested with every seed: the records, ``test-POINT-SEED.json``, and all seconds.

    Args:
        config: what the choice changes.
        chosen: of :func:`choose`.
        seeds: of the trainings.
        splits: seed -> data.
        folder: of the records.
        others, progress: as for :func:`trial`.
    """
    records = [job.make(progress) for job in final_jobs(config, chosen.point, seeds, splits, folder, others)]
    return records, chosen.seconds + sum(record["seconds"] for record in records)


def final_jobs(
    config: TrainConfig,
    point: Point,
    seeds: Sequence[int],
    splits: Callable[[int], Splits],
    folder: Path,
    others: Mapping[str, Other] | None = None,
) -> list[Job]:
    """What :func:`finals` trains."""
    return [
        Job(point.apply(config).replace(seed=seed), splits(seed), folder / f"test-{point.slug}-{seed}.json", others)
        for seed in seeds
    ]


def trial(
    config: TrainConfig,
    splits: Splits,
    path: Path,
    *,
    others: Mapping[str, Other] | None = None,
    progress: bool | None = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train on ``splits.train`` to the last epoch, and score what else is there.

    Args:
        config: of the model and the training; its ``data`` and ``output`` are not used.
        splits: with a validation set, metrics are taken on it every ``validate_every`` epochs; with a test set, the
            model of the last epoch is scored on it, in float32, once.
        path: of the record, a JSON file; read instead of training again where it is there.
        others: name -> a further test set, for classes alone.
        progress: bars on standard error; None shows them on a terminal.
        on_epoch: as for :func:`refold.training.fit`.

    Returns:
        ``settings``; ``val``, a row for each validation; ``test``, metrics; ``others``, accuracy of each; ``seconds``.

    Raises:
        DataError: a record of other settings or data.
        RefoldError: whatever training raises.
    """
    settings, accelerator = config.to_json(), start_accelerator()
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    data = {name: digest(part) for name, part in parts.items() if part is not None}
    data |= {f"others {name}": digest(other.images, other.outputs) for name, other in (others or {}).items()}
    finished = path.is_file()
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if finished:
        record = _read(path)
        # Settings that came later than the record have their defaults.
        check_same(TrainConfig.from_json(record["settings"]).to_json(), settings, ignore=FREE_SETTINGS)
        if record["data"] != data:
            raise DataError(
                "was trained or tested on other images or labels",
                where=str(path),
                remedy="Use another output folder, or remove this file",
            )
        return record
    model, preprocessing = build_attached(config, splits.task, splits.classes)
    fitted = fit(
        model, splits.train, splits.val, preprocessing, config, task=splits.task, classes=splits.classes,
        progress=progress, on_epoch=on_epoch,
    )  # fmt: skip
    record: dict[str, Any] = {
        "settings": settings,
        "data": data,
        "images": {name: len(part) for name, part in parts.items() if part is not None},
        "seconds": fitted.seconds,
        "precision": fitted.precision,
    }
    if splits.val is not None:
        record["val"] = [row for row in fitted.history if row["split"] == "val"]
    with showing(progress):
        if splits.test is not None:
            assert splits.val is None, "the test set is for the last epoch"
            result = score(
                model, splits.test, splits.test.targets, preprocessing, fitted.task,
                accelerator=accelerator, batch_size=config.batch_size, workers=config.workers,
            )  # fmt: skip
            record["test"] = result.metrics
        if others:
            record["others"] = {
                name: _accuracy(model, other, preprocessing, config, accelerator) for name, other in others.items()
            }
    if accelerator.is_main_process:
        write_json(path, record)
    return record


def _accuracy(
    model: nn.Module, other: Other, preprocessing: Preprocessing, config: TrainConfig, accelerator: Accelerator
) -> float:
    loader = evaluation_loader(
        other.images, preprocessing, accelerator, batch_size=config.batch_size, workers=config.workers
    )
    logits = compute_logits(model, loader, len(other.images), accelerator)
    competing = torch.arange(logits.shape[1]) if other.outputs is None else other.outputs
    predicted = competing[logits[:, competing].argmax(1)]
    return float((predicted == other.images.targets).float().mean())


def digest(images: ImageSet | VideoSet, outputs: Tensor | None = None) -> str:
    """What tells sets apart: their paths and targets."""
    found = hashlib.blake2b(digest_size=12)
    found.update("\n".join(images.paths).encode())
    found.update(json.dumps([images.targets.tolist(), None if outputs is None else outputs.tolist()]).encode())
    return found.hexdigest()


def method_slug(method: Method) -> str:
    """A method's part of file names."""
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in method.describe())


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(record[name], dict) for name in ("settings", "data")):
            raise TypeError("it is no record of a training")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path), remedy="Remove it to train again") from error
    return record
