"""The annotation files of Kinetics, Something-Something v2 and HMDB51."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refold.data.listing import SPLIT_NAMES, WHOLE, Listing
from refold.errors import DataError
from refold.video.found import Found, Wanted

__all__ = ["find_annotations", "find_hmdb", "find_something", "is_kinetics", "read_kinetics"]

_KINETICS = ("label", "youtube_id", "time_start", "time_end")
_SPLIT_FILES = {**SPLIT_NAMES, "validate": "val"}
_SOMETHING = {"train": "train", "validation": "val"}
_PREFIX = "something-something-v2-"
#: What the digit behind a video of HMDB51's lists means; 0 is unused.
_HMDB_SPLITS = {"1": "train", "2": "test", "0": None}


def find_annotations(root: Path) -> dict[str, Path]:
    """Files called ``train``, ``val`` (``valid``, ``validation``, ``validate``) and ``test``, with the training one.

    Raises:
        DataError: two files of a split.
    """
    for folder in (root, root / "annotations"):
        files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.csv")) + sorted(folder.glob("*.txt")):
            split = _SPLIT_FILES.get(path.stem.lower())
            if split in files:
                raise DataError(f"there are two {split} files", where=f"{files[split]}, {path}", remedy="Remove one")
            if split is not None:
                files[split] = path
        if "train" in files:
            return files
    return {}


# -- Kinetics -----------------------------------------------------------------------------------------------------


def is_kinetics(path: Path) -> bool:
    """Whether a file is a CSV with the columns of Kinetics."""
    if path.suffix.lower() != ".csv":
        return False
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return set(_KINETICS[1:]) <= set(next(csv.reader(file), []))


def read_kinetics(path: Path, found: Found) -> dict[str, Listing]:
    """The splits of a CSV of Kinetics, or one undivided listing without a column ``split``.

    Raises:
        DataError: a malformed row, an unknown split, or videos that are missing.
    """
    splits: dict[str, list[Wanted]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the table cannot be read ({error})", where=str(path)) from error
    for number, row in enumerate(rows, start=2):
        place = f"{path}, row {number}"
        label, name, *times = (row.get(column) or "" for column in _KINETICS)
        if not label or not name or not all(time.replace(".", "", 1).isdigit() for time in times):
            raise DataError("has no label, id, start and end of a video", where=place)
        split = (row.get("split") or "").lower()
        if split and split not in _SPLIT_FILES:
            raise DataError(f"unknown split {split!r}", where=place, remedy="Use train, val or test")
        start, end = (round(float(time)) for time in times)
        wanted = (f"{name}_{start:06d}_{end:06d}", label, place)
        splits[_SPLIT_FILES[split] if split else WHOLE].append(wanted)
    if not splits:
        raise DataError("lists no video", where=str(path))
    return {split: found.listing(wanted, path) for split, wanted in splits.items()}


# -- Something-Something v2 --------------------------------------------------------------------------------------


def find_something(root: Path) -> Something | None:
    """The annotations of Something-Something v2 in a folder, None if there are none.

    Raises:
        DataError: labels without a training split.
    """
    for folder in (root, root / "labels", root / "annotations"):
        for prefix in ("", _PREFIX):
            if (folder / f"{prefix}labels.json").is_file():
                files = {split: folder / f"{prefix}{name}.json" for name, split in _SOMETHING.items()}
                there = {split: path for split, path in files.items() if path.is_file()}
                if "train" not in there:
                    raise DataError("is missing", where=str(files["train"]), remedy="It comes with labels.json")
                return Something(folder / f"{prefix}labels.json", there)
    return None


@dataclass(frozen=True)
class Something:
    """Annotations of Something-Something v2; the test split has no labels, and is left alone.

    Attributes:
        labels: the JSON of classes: template without brackets -> index.
        splits: the JSON of each split.
    """

    labels: Path
    splits: dict[str, Path]

    def read(self, found: Found) -> dict[str, Listing]:
        """The splits, with the classes in the order of their indices.

        Raises:
            DataError: a malformed file, a label that is no class, or videos that are missing.
        """
        content = _read_json(self.labels, dict)
        try:
            indices = {name: int(index) for name, index in content.items()}
        except (TypeError, ValueError) as error:
            raise DataError("has a class without an index", where=str(self.labels)) from error
        if sorted(indices.values()) != list(range(len(indices))):
            raise DataError(f"its indices are not 0 to {len(indices) - 1}", where=str(self.labels))
        classes = sorted(indices, key=lambda name: indices[name])
        return {
            split: found.listing(list(self._wanted(path, indices)), path, classes)
            for split, path in self.splits.items()
        }

    def _wanted(self, path: Path, indices: dict[str, int]) -> Iterator[Wanted]:
        for number, entry in enumerate(_read_json(path, list), start=1):
            place = f"{path}, entry {number}"
            if not isinstance(entry, dict) or not entry.get("id") or not isinstance(entry.get("template"), str):
                raise DataError("has no id and template", where=place)
            name = entry["template"].replace("[", "").replace("]", "")
            if name not in indices:
                raise DataError(f"the label {name!r} is not in {self.labels.name}", where=place)
            yield str(entry["id"]), name, place


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from error
    if not isinstance(content, kind) or not content:
        raise DataError(f"should be a JSON {'object' if kind is dict else 'list'} that is not empty", where=str(path))
    return content


# -- HMDB51 -------------------------------------------------------------------------------------------------------


def find_hmdb(root: Path) -> Hmdb | None:
    """HMDB51's official splits in a folder, or in a folder below it; None if there are none."""
    for folder in (root, *sorted(path for path in root.iterdir() if path.is_dir())):
        files = sorted(folder.glob("*_test_split[123].txt"))
        if files:
            names = [path.stem.rpartition("_test_split") for path in files]
            return Hmdb(root, [(name, int(fold), path) for (name, _, fold), path in zip(names, files, strict=True)])
    return None


@dataclass(frozen=True)
class Hmdb:
    """Official splits: ``lists`` has (class, number of the split, file)."""

    root: Path
    lists: list[tuple[str, int, Path]]

    def read(self, found: Found, fold: int) -> dict[str, Listing]:
        """Training and test videos of the split with that number.

        Raises:
            DataError: no list of it, one for some classes alone, a malformed line, a class without videos, or videos
                that are missing.
        """
        lists = {name: path for name, number, path in self.lists if number == fold}
        for name in {name for name, _, _ in self.lists}:
            if name not in lists:
                raise DataError(f"{name}_test_split{fold}.txt is missing", where=str(self.root), remedy="Choose a fold")
        wanted: dict[str, list[Wanted]] = {"train": [], "test": []}
        for name, path in sorted(lists.items()):
            for number, line in enumerate(_lines(path), start=1):
                if not line.strip():
                    continue
                file, _, digit = line.strip().rpartition(" ")
                if not file or digit not in _HMDB_SPLITS:
                    raise DataError(f"{line.strip()!r} is no video and 0, 1 or 2", where=f"{path}, line {number}")
                if (split := _HMDB_SPLITS[digit]) is not None:
                    wanted[split].append((Path(file.strip()).stem, name, f"{path}, line {number}"))
            for split, entries in wanted.items():
                if not any(label == name for _, label, _ in entries):
                    raise DataError(f"the class has no {split} video", where=str(path))
        return {split: found.listing(entries, self.root) for split, entries in wanted.items()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list cannot be read ({error})", where=str(path)) from error
