"""Hugging Face data sets as streams: ``hf-dataset:NAME``.

The column of images and the column of labels are found by their types. Labels are read once, by themselves, and kept in
:func:`refold.backbones.files.cache_dir`: how many images there are and their targets is all that is known beforehand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from refold.backbones.files import atomic_path, cache_dir
from refold.data.listing import SPLIT_NAMES, Label, Listing, class_names
from refold.data.parallel import counted
from refold.data.streams import Reading, StreamSet, Unlabelled, guarded
from refold.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import datasets

__all__ = ["PREFIX", "load_streams"]

PREFIX = "hf-dataset:"
_COLUMNS = ("label", "labels", "target", "cls")
_FORMAT = 1  # of what is kept


def load_streams(
    source: str, named: Mapping[str, str | Path | None], target: str | None = None
) -> tuple[dict[str, StreamSet], list[tuple[str, str]]]:
    """The splits of a data set, with the same classes.

    A validation or test split without labels, as some are published, is left out where it is not named.

    Args:
        source: ``hf-dataset:NAME`` or, of one of several configurations, ``hf-dataset:NAME:CONFIGURATION``; NAME is on
            the hub, or a folder that ``datasets.load_dataset`` understands.
        named: what ``train``, ``val`` and ``test`` are called there, where not by a usual name.
        target: column of labels, where types leave a choice.

    Returns:
        the splits, and (name, reason) of those left out.

    Raises:
        DataError: no such data set or split, no column of images or of labels, or an image without a label.
        MissingExtraError: datasets is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("datasets", "streams") from error
    name, _, configuration = source.removeprefix(PREFIX).partition(":")
    try:
        builder = datasets.load_dataset_builder(name, configuration or None)
        streams = cast("Mapping[str, datasets.IterableDataset]", builder.as_streaming_dataset())
    except Exception as error:  # of files, networks and formats of all kinds
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"cannot be opened ({reason})", where=source) from error
    usual = {SPLIT_NAMES[split.lower()]: split for split in streams if split.lower() in SPLIT_NAMES}
    chosen = usual | {split: str(own) for split, own in named.items() if own is not None}
    for own in {"train": "train", **chosen}.values():
        if own not in streams:
            raise DataError(f"has no split {own!r}", where=source, remedy=f"It has: {', '.join(streams)}")
    parts = {split: _Part.of(streams[own], f"{source}/{own}", target) for split, own in chosen.items()}
    found: dict[str, tuple[Listing, Tensor]] = {}
    skipped = []
    for split, part in parts.items():
        try:
            found[split] = part.labels(_identity(builder, chosen[split]))
        except Unlabelled as error:
            if split == "train" or named[split] is not None:
                raise
            skipped.append((part.name, error.reason))
    classes = class_names(found["train"][0], [labels for split, (labels, _) in found.items() if split != "train"])
    return {split: parts[split].stream_set(labels, codes, classes) for split, (labels, codes) in found.items()}, skipped


def _identity(builder: datasets.DatasetBuilder, split: str) -> list[Any]:
    """What tells a split of a data set, as it is now, from others."""
    files: Any = builder.config.data_files
    if not isinstance(files, dict):
        return [builder.hash, builder.config.name, split]
    return [builder.hash, builder.config.name, split, list(files[split]), files[split].origin_metadata]


@dataclass(frozen=True)
class _Part:
    """One split: its stream, what it is called, the columns of images and labels, and what a label means."""

    rows: datasets.IterableDataset
    name: str
    image: str
    label: str
    reading: Reading

    @classmethod
    def of(cls, rows: datasets.IterableDataset, name: str, target: str | None) -> _Part:
        import datasets

        columns = dict(rows.features or {})
        images = [column for column, kind in columns.items() if isinstance(kind, datasets.Image)]
        image = "image" if "image" in images else images[0] if len(images) == 1 else None
        if image is None:
            raise DataError(f"has {len(images)} columns of images", where=name, remedy=f"It has: {', '.join(columns)}")
        meant = {column: _reading(kind) for column, kind in columns.items()}
        classes = [column for column, reading in meant.items() if reading is not None and reading.names is not None]
        usual = [column for column in _COLUMNS if column in columns]
        label = target or next((found[0] for found in (classes, usual) if len(found) == 1), None)
        if label is None or label not in columns:
            what = "a column of labels" if label is None else f"the column {label!r}"
            remedy = f"Choose with target (--target). It has: {', '.join(columns)}"
            raise DataError(f"does not show {what}", where=name, remedy=remedy)
        reading = meant[label]
        if reading is None:
            raise DataError(f"the column {label!r} ({columns[label]}) holds no labels", where=name)
        rows = rows.cast_column(image, datasets.Image(decode=False)).select_columns([image, label])
        return cls(rows, name, image, label, reading)

    def labels(self, identity: list[Any]) -> tuple[Listing, Tensor]:
        """The labels that occur, and of each image which; read once and kept."""
        import numpy as np

        key = hashlib.sha256(json.dumps([_FORMAT, self.label, *identity], default=str).encode()).hexdigest()[:32]
        kept = cache_dir() / "data" / "streams" / f"{key}.npz"
        try:
            with np.load(kept, allow_pickle=False) as content:
                labels = [tuple(v) if isinstance(v, list) else v for v in json.loads(str(content["labels"]))]
                codes = content["codes"]
        except (OSError, ValueError, KeyError, EOFError):  # absent, cut short, or something else
            table: dict[Label, int] = {}
            labelled = guarded(self.rows.select_columns([self.label]), self.name)
            rows = counted(labelled, f"reading labels of {self.name}")
            values = (self.reading(row[self.label], f"{self.name}/{i}") for i, row in enumerate(rows))
            codes = np.fromiter((table.setdefault(value, len(table)) for value in values), np.int64)
            labels = list(table)
            try:
                with atomic_path(kept) as temporary:
                    np.savez(temporary, labels=np.array(json.dumps(labels)), codes=codes)
            except OSError:  # a read-only or full disk: read again next time, no worse
                pass
        if not labels:
            raise DataError("holds no image", where=self.name)
        names = None if self.reading.names is None else list(self.reading.names)
        if names is None and self.reading.task == "classify" and all(str(label).isdecimal() for label in labels):
            names = [str(k) for k in range(max(map(int, labels)) + 1)]  # type: ignore[arg-type]
        return Listing(
            self.reading.task, [""] * len(labels), labels, [self.name] * len(labels), names
        ), torch.from_numpy(codes)

    def stream_set(self, labels: Listing, codes: Tensor, classes: list[str] | None) -> StreamSet:
        return StreamSet(self.rows, self.name, self.image, self.label, self.reading, labels, codes, classes)


def _reading(kind: Any) -> Reading | None:
    """What values of a column of this type are as labels; None if they can be none."""
    import datasets

    if isinstance(kind, datasets.ClassLabel):
        return Reading("classify", tuple(kind.names))
    if isinstance(kind, datasets.List | datasets.LargeList):
        inner = _reading(kind.feature)
        return None if inner is None or inner.task != "classify" else Reading("multilabel", inner.names)
    if not isinstance(kind, datasets.Value):
        return None
    if kind.dtype.startswith("float"):
        return Reading("regress")
    return Reading("classify") if kind.dtype.startswith(("int", "uint", "string", "large_string")) else None
