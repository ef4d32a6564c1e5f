"""Reading a run folder: what training, evaluation, merging and measuring left there.

Only ``config.json`` and one of ``metrics.jsonl`` and ``summary.json`` make a folder a run; every other file
may be missing, because the run was killed early or because nobody merged or timed the model yet.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.errors import DataError
from refold.training.config import RUN_FACTS

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Prediction", "Run", "Thumbnail", "read_run"]

REMEDY = "Delete the file, or run the command that wrote it again"


@dataclass(frozen=True)
class Prediction:
    """One line of ``predictions.csv``, as text."""

    path: str
    target: str
    prediction: str


@dataclass(frozen=True)
class Thumbnail:
    """One shown image, (H, W, 3) uint8; ``correct`` is None where right and wrong make no sense."""

    image: np.ndarray
    path: str
    target: str
    prediction: str
    score: float | None
    correct: bool | None


@dataclass(frozen=True)
class Run:
    """The readable content of a run folder.

    Attributes:
        path: the folder.
        config: ``config.json``.
        metrics: rows of ``metrics.jsonl`` in order, one a (split, epoch, step), the last written one.
        unreadable: lines of ``metrics.jsonl`` that are no JSON object, as a killed run leaves them.
        summary: ``summary.json``, empty while the run is not finished.
        certificate, cost: ``certificate.json`` and ``cost.json``, None where missing.
        predictions: rows of ``predictions.csv``.
        thumbnails: the images kept in ``thumbnails.npz`` with their row of ``thumbnails.json``.
        overlays: ``overlays.png`` of a dense task, (H, W, 3) uint8; None where missing.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    unreadable: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    predictions: list[Prediction] = field(default_factory=list)
    thumbnails: list[Thumbnail] = field(default_factory=list)
    overlays: np.ndarray | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for: ``config.json`` without the machine and the command."""
        return {k: v for k, v in self.config.items() if k not in RUN_FACTS}

    def values(self) -> tuple[list[float], list[float]]:
        """Targets and predictions of a regression.

        Raises:
            DataError: ``predictions.csv`` holds something else than numbers.
        """
        try:
            return [float(p.target) for p in self.predictions], [float(p.prediction) for p in self.predictions]
        except ValueError as error:
            raise _broken(self.path / "predictions.csv", error) from error


def read_run(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: the folder is no run, or one of its files is broken (the last line of ``metrics.jsonl``
            aside, which a killed run may leave half written).
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError("no such folder", where=str(path), remedy="Give the folder that `refold train` wrote")
    metrics_file, summary_file = path / "metrics.jsonl", path / "summary.json"
    if not (path / "config.json").is_file() or not (metrics_file.is_file() or summary_file.is_file()):
        raise DataError(
            "this folder is no run: it needs config.json and metrics.jsonl or summary.json",
            where=str(path),
            remedy="Give the folder that `refold train` wrote",
        )
    metrics, unreadable = _read_lines(metrics_file) if metrics_file.is_file() else ([], 0)
    summary = _read_object(summary_file) or {}
    return Run(
        path=path,
        config=_read_object(path / "config.json") or {},
        metrics=metrics,
        unreadable=unreadable,
        summary=summary,
        certificate=_read_object(path / "certificate.json"),
        cost=_read_object(path / "cost.json"),
        predictions=_read_predictions(path / "predictions.csv"),
        thumbnails=_read_thumbnails(path, summary.get("classes")),
        overlays=_read_picture(path / "overlays.png"),
    )


def _broken(file: Path, reason: object) -> DataError:
    return DataError(f"cannot be read ({reason})", where=str(file), remedy=REMEDY)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(file, error) from error


def _read_object(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content = _read_json(file)
    if not isinstance(content, dict):
        raise _broken(file, f"a JSON object was expected, not {type(content).__name__}")
    return content


def _read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    unreadable = 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            unreadable += 1
            continue
        key = (row.get("split"), row.get("epoch"), row.get("step"))
        rows[key] = row  # a resumed run writes the rows of a repeated epoch again
    return list(rows.values()), unreadable


def _read_predictions(file: Path) -> list[Prediction]:
    if not file.is_file():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [Prediction(r["path"], r["target"], r["prediction"]) for r in csv.DictReader(stream)]
    except KeyError as error:
        raise _broken(file, f"it has no column {error}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise _broken(file, error) from error


def _read_thumbnails(folder: Path, classes: list[str] | None) -> list[Thumbnail]:
    arrays, index = folder / "thumbnails" / "thumbnails.npz", folder / "thumbnails" / "thumbnails.json"
    if not (arrays.is_file() and index.is_file()):
        return []
    import numpy as np

    try:
        with np.load(arrays, allow_pickle=False) as archive:
            images = archive["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _broken(arrays, error) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise _broken(arrays, f"uint8 (N, H, W, 3) was expected, not {images.dtype} {images.shape}")
    rows = _read_json(index)
    try:
        return [_thumbnail(images, row, classes) for row in rows]
    except (TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise _broken(index, f"{type(error).__name__}: {error}") from error


def _read_picture(file: Path) -> np.ndarray | None:
    if not file.is_file():
        return None
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow's PNG parser raises
        raise _broken(file, error) from error


def _thumbnail(images: np.ndarray, row: Mapping[str, Any], classes: list[str] | None) -> Thumbnail:
    score, correct = row.get("score"), row.get("correct")
    return Thumbnail(
        image=images[int(row["index"])],
        path=str(row.get("path") or ""),
        target=_label(row["target"], classes),
        prediction=_label(row["prediction"], classes),
        score=None if score is None else float(score),
        correct=None if correct is None else bool(correct),
    )


def _label(value: object, classes: list[str] | None) -> str:
    """A class name, given as itself, its number, or a list of either; without classes a number stays one."""
    if isinstance(value, list):
        return ", ".join(_label(item, classes) for item in value) or "none"
    if isinstance(value, int) and classes:
        return classes[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)
