"""Folders: a folder per class, with or without a folder per split above, and VTAB-style lists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from refold.data.decoding import EXTENSIONS
from refold.data.listing import SPLIT_NAMES, WHOLE, Label, Listing
from refold.errors import DataError

__all__ = ["IMAGES", "FileKind", "find_files", "find_images", "read_folder", "read_list"]

_LAYOUTS = (
    "Expected a folder per class (optionally under train/, val/, test/), VTAB lists (train800.txt ...), or a CSV file"
)
# A list with labels beyond this is a file of something else; names for them would fill the memory.
_MOST_CLASSES = 100_000


class FileKind(NamedTuple):
    """What is looked for: ``name`` in messages, and the ``endings`` of its files in lower case."""

    name: str
    endings: frozenset[str]


IMAGES = FileKind("image", EXTENSIONS)


def read_folder(root: Path, kind: FileKind = IMAGES) -> dict[str, Listing]:
    """The splits below ``root``: by lists (NOAH's VTAB-1k layout), by split folders, or one undivided listing.

    Hidden files and folders, files of another kind, and links back up are ignored; links to other folders are
    followed. Folders inside a class folder belong to the class.

    Raises:
        DataError: no class folder, an empty one, files outside of any, or an unreadable folder.
    """
    lists = _vtab_lists(root)
    if lists:
        return {split: read_list(path)[WHOLE] for split, path in lists.items()}
    folders = _subfolders(root)
    if any(f.name.lower() == "train" for f in folders) and all(f.name.lower() in SPLIT_NAMES for f in folders):
        splits: dict[str, Listing] = {}
        for folder in folders:
            split = SPLIT_NAMES[folder.name.lower()]
            if split in splits:
                raise DataError(f"holds two {split} folders", where=str(root), remedy="Keep one of them")
            splits[split] = _read_classes(folder, kind)
        return splits
    return {WHOLE: _read_classes(root, kind)}


def read_list(path: Path, kind: FileKind = IMAGES, root: Path | None = None) -> dict[str, Listing]:
    """A text file of lines ``relative/path class_index``, relative to its folder, or ``root``; blank ones are ignored.

    Raises:
        DataError: an unreadable file, a malformed line, a missing file.
    """
    paths: list[str] = []
    labels: list[Label] = []
    places: list[str] = []
    largest = -1
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        name, _, index = "\t".join(line.rsplit(maxsplit=1)).rpartition("\t")
        if not name or not (index.isascii() and index.isdigit()) or int(index[:9]) >= _MOST_CLASSES:
            raise DataError(f"{line.strip()!r} is no {kind.name} path and class index", where=place)
        file = path.parent / name.strip()
        if root is not None and not file.is_file():
            file = root / name.strip()
        if not file.is_file():
            raise DataError(f"there is no {kind.name} {str(file)!r}", where=place)
        paths.append(str(file))
        labels.append(str(int(index)))
        places.append(place)
        largest = max(largest, int(index))
    if not paths:
        raise DataError(f"lists no {kind.name}", where=str(path))
    return {WHOLE: Listing("classify", paths, labels, places, [str(k) for k in range(largest + 1)])}


def find_images(root: Path) -> list[str]:
    """All image files below ``root``, see :func:`find_files`."""
    return find_files(root, IMAGES)


def find_files(root: Path, kind: FileKind, *, inside: frozenset[str] = frozenset()) -> list[str]:
    """All files of a kind below ``root``, sorted by folder and name; each real folder is visited once.

    Args:
        root: folder.
        kind: what to look for.
        inside: real paths of folders that count as visited.

    Raises:
        DataError: a folder that cannot be read.
    """
    visited, found = set(inside), []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(_unvisited(folder, subfolders, visited))
        found += [str(Path(folder, name)) for name in sorted(files) if _is_of(kind, name)]
    return found


def _unvisited(folder: str, names: list[str], visited: set[str]) -> Iterator[str]:
    for name in names:
        real = os.path.realpath(Path(folder, name))
        if not name.startswith(".") and real not in visited:
            visited.add(real)
            yield name


def _read_classes(root: Path, kind: FileKind) -> Listing:
    folders = _subfolders(root)
    stray = [name for name in _entries(root) if _is_of(kind, name) and (root / name).is_file()]
    if not folders:
        raise DataError("holds no class folder", where=str(root), remedy=_LAYOUTS)
    if stray:
        raise DataError(
            f"{len(stray)} {kind.name}s lie outside of any class folder, for example {stray[0]!r}",
            where=str(root),
            remedy="Move them into the folder of their class",
        )
    paths: list[str] = []
    labels: list[Label] = []
    above = frozenset(map(str, (real := Path(os.path.realpath(root)), *real.parents)))
    for folder in folders:
        files = find_files(folder, kind, inside=above)
        if not files:
            raise DataError(f"the class folder holds no {kind.name}", where=str(folder), remedy="Fill or remove it")
        paths += files
        labels += [folder.name] * len(files)
    return Listing("classify", paths, labels, paths)


def _subfolders(root: Path) -> list[Path]:
    """Visible folders in ``root`` by name, without links to ``root`` itself or above."""
    real = Path(os.path.realpath(root))
    above = {real, *real.parents}
    folders = [root / name for name in _entries(root) if not name.startswith(".") and (root / name).is_dir()]
    return [folder for folder in folders if Path(os.path.realpath(folder)) not in above]


def _vtab_lists(root: Path) -> dict[str, Path]:
    names = set(_entries(root))
    if "train800.txt" in names:
        wanted = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
    elif "train800val200.txt" in names:  # val200.txt would be a part of it
        wanted = {"train": "train800val200.txt", "test": "test.txt"}
    else:
        return {}
    return {split: root / name for split, name in wanted.items() if name in names}


def _entries(root: Path) -> list[str]:
    try:
        return sorted(os.listdir(root))  # noqa: PTH208 (names are all that is needed)
    except OSError as error:
        _unreadable(error)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list cannot be read ({error})", where=str(path)) from error


def _is_of(kind: FileKind, name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in kind.endings  # noqa: PTH122


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"the folder cannot be read ({error.strerror})", where=str(error.filename)) from error
