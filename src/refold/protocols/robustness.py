"""Robustness of trained adapters on one backbone: corruptions, calibration, whose mistakes differ, and ensembles.

All adapters are loaded onto one backbone and take turns; an ensemble is the mean of their probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import refold
from refold.bench.environment import environment
from refold.data import ImageSet
from refold.data.augmentation import make_augmentation
from refold.data.normalize import Normalize
from refold.errors import DataError
from refold.protocols.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from refold.protocols.trial import write_json
from refold.store import read_header
from refold.training.build import Ready, resolve
from refold.training.evaluation import labelled
from refold.training.inference import compute_logits, start_accelerator
from refold.training.progress import counting, showing

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Examined", "Pair", "RobustnessResult", "examine"]

_BINS = 15
_ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Examined:
    """One adapter, or the ensemble of all.

    Attributes:
        name: of the run folder or file.
        accuracy: on the images as they are.
        calibration_error: expected calibration error over 15 bins of confidence (arXiv 1706.04599).
        corrupted: corruption -> accuracy at each severity.
    """

    name: str
    accuracy: float
    calibration_error: float
    corrupted: dict[str, tuple[float, ...]]

    @property
    def corrupted_mean(self) -> float | None:
        """Mean over corruptions and severities; None where none was looked at."""
        values = [value for row in self.corrupted.values() for value in row]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Pair:
    """How the mistakes of two adapters differ; shares of all images.

    Attributes:
        names: of both.
        only_first, only_second: one alone is right.
        neither: both are wrong.
        either: at least one is right: what choosing between them could reach.
    """

    names: tuple[str, str]
    only_first: float
    only_second: float
    neither: float

    @property
    def either(self) -> float:
        return 1 - self.neither


@dataclass(frozen=True)
class RobustnessResult:
    """What :func:`examine` returns.

    Attributes:
        rows: one an adapter, the ensemble last if there are several.
        pairs: of all adapters.
        images: looked at.
    """

    rows: list[Examined]
    pairs: list[Pair]
    images: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "images": self.images,
            "rows": [{**vars(row), "corrupted_mean": row.corrupted_mean} for row in self.rows],
            "pairs": [{**vars(pair), "either": pair.either} for pair in self.pairs],
        }


def examine(
    sources: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    split: str = "test",
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    batch_size: int = 64,
    seed: int = 0,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool | None = None,
) -> RobustnessResult:
    """Score adapters of one backbone on clean and corrupted images, each alone and together, in float32.

    Args:
        sources: run folders or adapter files of single-label classification, with the same classes and preprocessing.
        data, split: as for :func:`refold.evaluate`; None takes those of the first run folder.
        corruptions: names of :data:`refold.protocols.CORRUPTIONS`; None is all, an empty list none.
        severities: 1 to 5.
        batch_size: images of a forward pass.
        seed: of the noise.
        weights: local checkpoint of the backbone.
        output: JSON file to write; None writes nothing.
        progress: bars on standard error; None shows them on a terminal.

    Raises:
        DataError: adapters of another kind, other classes or another backbone, or as :func:`refold.evaluate`.
        StoreError, BackboneError: a model cannot be loaded.
    """
    chosen = list(CORRUPTIONS) if corruptions is None else list(corruptions)
    blank = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for name in chosen:  # complain before anything is loaded
        for severity in severities:
            corrupt(blank, name, severity)
    names, ready = _load(sources, weights)
    images, targets = labelled(ready, data, split)
    accelerator = start_accelerator()
    ready.model.to(accelerator.device)
    look = _Look(ready, names, images, accelerator, batch_size, seed)
    total = len(images) * (1 + len(chosen) * len(severities))
    with showing(progress), counting("images", total=total, main=accelerator.is_main_process) as more:
        clean = look.probabilities(None, 0)
        more(len(images))
        corrupted: dict[str, dict[str, list[float]]] = {name: {} for name in clean}
        for corruption in chosen:
            for severity in severities:
                for name, scores in look.probabilities(corruption, severity).items():
                    corrupted[name].setdefault(corruption, []).append(_accuracy(scores, targets))
                more(len(images))
    rows = [
        Examined(
            name,
            _accuracy(scores, targets),
            _calibration_error(scores, targets),
            {key: tuple(values) for key, values in corrupted[name].items()},
        )
        for name, scores in clean.items()
    ]
    right = {name: clean[name].argmax(1) == targets for name in names}
    pairs = [
        Pair((a, b), _share(right[a] & ~right[b]), _share(right[b] & ~right[a]), _share(~right[a] & ~right[b]))
        for k, a in enumerate(names)
        for b in list(names)[k + 1 :]
    ]
    result = RobustnessResult(rows, pairs, len(images))
    if output is not None and accelerator.is_main_process:
        write_json(Path(output), {**result.to_json(), "environment": environment()})
    return result


@dataclass(frozen=True)
class _Look:
    """All adapters on a set of images.

    Attributes:
        names: shown name -> name of the adapter in the model.
    """

    ready: Ready
    names: dict[str, str]
    images: ImageSet
    accelerator: Accelerator
    batch_size: int
    seed: int

    def probabilities(self, corruption: str | None, severity: int) -> dict[str, Tensor]:
        """Shown name -> (N, K), the ensemble last where there are several."""
        found = {}
        for shown, name in self.names.items():
            refold.activate(self.ready.model, name)
            batches = self._batches(corruption, severity)
            logits = compute_logits(self.ready.model, batches, len(self.images), self.accelerator)
            found[shown] = logits.softmax(1)
        if len(found) > 1:
            found[_ENSEMBLE] = torch.stack(list(found.values())).mean(0)
        return found

    def _batches(self, corruption: str | None, severity: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images, normalised."""
        preprocessing = self.ready.preprocessing
        rendering = make_augmentation(None, preprocessing, min(self.images.channels, preprocessing.channels)).rendering
        normalize = Normalize(preprocessing)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for chunk in torch.arange(rank, len(self.images), world).split(self.batch_size):
            pixels = self.images.render(chunk, rendering)
            if corruption is not None:
                pixels = torch.cat(
                    [
                        corrupt(pixels[k : k + 1], corruption, severity, first=index, seed=self.seed)
                        for k, index in enumerate(chunk.tolist())
                    ]
                )
            yield normalize(pixels), self.images.targets[chunk]


def _load(sources: Sequence[str | Path], weights: str | Path | None) -> tuple[dict[str, str], Ready]:
    """All adapters on the backbone of the first: shown name -> name in the model."""
    if not sources:
        raise DataError("there is none", where="sources")
    ready = resolve(sources[0], weights=weights)
    if ready.kind != "classify":
        raise DataError(f"is of task {ready.kind!r}, not of classes", where=str(sources[0]))
    first = read_header(_file(sources[0]))
    shown = _names(sources)
    names = {shown[0]: "default"}
    for k, source in enumerate(sources[1:], start=1):
        header = read_header(_file(source))
        for what, ours, others in (
            ("backbone", first.backbone, header.backbone),
            ("classes", first.classes, header.classes),
            ("preprocessing", first.preprocessing, header.preprocessing),
        ):
            if ours != others:
                raise DataError(
                    f"its {what} are not those of {sources[0]}" if what == "classes"
                    else f"its {what} is not that of {sources[0]}",
                    where=str(source),
                    remedy="Examine it by itself",
                )  # fmt: skip
        names[shown[k]] = f"member{k}"
        refold.load(ready.model, _file(source), name=f"member{k}")
    return names, ready


def _file(source: str | Path) -> Path:
    return Path(source) / "adapter.safetensors" if Path(source).is_dir() else Path(source)


def _names(sources: Sequence[str | Path]) -> list[str]:
    """Short names where they differ, whole paths otherwise."""
    short = [Path(source).stem for source in sources]
    names = short if len(set(short)) == len(short) else [str(source) for source in sources]
    if len(set(names)) < len(names):
        raise DataError("names one adapter twice", where="sources")
    return names


def _accuracy(scores: Tensor, targets: Tensor) -> float:
    return _share(scores.argmax(1) == targets)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _calibration_error(scores: Tensor, targets: Tensor) -> float:
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(multiclass_calibration_error(scores, targets, num_classes=scores.shape[1], n_bins=_BINS, norm="l1"))
