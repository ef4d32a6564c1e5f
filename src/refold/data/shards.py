"""WebDataset shards: tar files of samples, ``KEY.jpg`` beside ``KEY.cls`` or ``KEY.json``, read where they lie.

=============  ========================================================================================
member         meaning
=============  ========================================================================================
``KEY.IMAGE``  the image, of any suffix that counts as one (:data:`refold.data.decoding.EXTENSIONS`)
``KEY.cls``    its class: an index, or a name
``KEY.json``   an object with ``label`` (an index or a name), ``labels`` (a list of names) or ``target`` (a
               number), or the field that is named; it counts where there is no ``KEY.cls``
=============  ========================================================================================

KEY is a member's name up to the first dot after its folder, and other members are ignored, as in the webdataset
library. Each shard's headers are read once; where its images lie and their labels, some 50 bytes an image, are kept in
:func:`refold.backbones.files.cache_dir`. An image is then read at its place in the tar file: shuffled, split,
resumed and divided between processes like files in a folder, and never unpacked or held in memory.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import torch

from refold.backbones.files import atomic_path, cache_dir
from refold.data.decoding import EXTENSIONS
from refold.data.images import ImageSet, Members, Task
from refold.data.listing import SPLIT_NAMES, WHOLE, Label, Listing, class_names, encode, number
from refold.data.parallel import for_each
from refold.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Shards", "find_shards", "load_shards", "read_shards"]

_FORMAT = 1  # of what is kept
_TASKS: dict[str, Task] = {"label": "classify", "labels": "multilabel", "target": "regress"}
_LABELS = "Give each image a KEY.cls, or a KEY.json with label, labels or target"


@dataclass(frozen=True)
class Shards:
    """The samples of one split.

    Attributes:
        members: their images.
        labels: what labels there are, each once, with a place where it is found.
        codes: (N,) int64: of each sample, the index of its label.
    """

    members: Members
    labels: Listing
    codes: np.ndarray

    def image_set(self, classes: list[str] | None, cache: str) -> ImageSet:
        """The samples with targets that count ``classes``; see :class:`refold.data.ImageSet`."""
        targets = encode(self.labels, classes)[torch.from_numpy(self.codes)]
        return ImageSet(self.members, targets, task=self.labels.task, classes=classes, cache=cache)


def load_shards(
    source: str | Path | None, named: Mapping[str, str | Path | None], target: str | None, cache: str
) -> dict[str, ImageSet] | None:
    """The parts that shards spell out, with the same classes; None where the source, or ``train``, names no shards.

    Args:
        source, target, cache: as for :func:`refold.data.load_dataset`.
        named: sources of ``train``, ``val`` and ``test``, relative to ``source``.

    Raises:
        DataError: as :func:`find_shards` and :func:`read_shards`, or parts that contradict each other.
    """
    main = _find(named["train"], source) if named["train"] is not None else source
    found = None if main is None else find_shards(main)
    if found is None:
        return None
    for split in ("train", "val", "test"):
        path = named[split]
        if path is not None:
            files = find_shards(_find(path, source))
            if files is None or not files.keys() & {WHOLE, split}:
                raise DataError(f"names no shards of a {split} split", where=str(path))
            found[split] = files.get(WHOLE) or files[split]
    if WHOLE in found:
        found.setdefault("train", found.pop(WHOLE))
    if "train" not in found:
        raise DataError("has no training split", where=str(main))
    shards = {split: read_shards(files, target) for split, files in found.items() if split != WHOLE}
    classes = class_names(shards["train"].labels, [part.labels for split, part in shards.items() if split != "train"])
    return {split: part.image_set(classes, cache) for split, part in shards.items()}


def _find(path: str | Path, root: str | Path | None) -> str:
    """``path`` inside the folder ``root`` if shards are there, else as it stands."""
    inside = None if root is None else Path(root, path)
    return str(inside if inside is not None and any(Path(name).exists() for name in _expand(str(inside))) else path)


def find_shards(source: str | Path) -> dict[str, list[Path]] | None:
    """The shards of each split that a tar file, a pattern with braces, or a folder names; None if it names none.

    In a folder the splits are told by a part of the names (``train-000.tar``, ``imagenet1k-validation-00.tar``), or by
    folders ``train``, ``val`` and ``test``.

    Raises:
        DataError: a missing or compressed shard, an address, or names of which some tell their split and some do not.
        MissingExtraError: braces, and the package that expands them is not installed.
    """
    text = str(source)
    if text.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise DataError(
            "images of a compressed shard cannot be read one by one", where=text, remedy="Unpack it to .tar"
        )
    if _is_tar(text):
        if "://" in text or text.startswith("pipe:"):
            remedy = "Download them, or read a data set of the hub (hf-dataset:)"
            raise DataError("shards are read where they lie, on disk", where=text, remedy=remedy)
        files = [Path(name) for name in _expand(text)]
        for file in files:
            if not file.is_file():
                raise DataError("there is no such shard", where=str(file))
        return {WHOLE: files}
    root = Path(source)
    if not root.is_dir():
        return None
    folders = {SPLIT_NAMES[f.name.lower()]: f for f in _entries(root) if f.name.lower() in SPLIT_NAMES and f.is_dir()}
    found = {split: files for split, folder in folders.items() if (files := _tars(folder))}
    if found:
        return found
    for file in _tars(root):
        parts = re.split(r"[-_.]", file.name.lower())
        found.setdefault(next((SPLIT_NAMES[part] for part in parts if part in SPLIT_NAMES), WHOLE), []).append(file)
    if WHOLE in found and len(found) > 1:
        raise DataError(
            "the name tells no split, and others do", where=str(found[WHOLE][0]), remedy="Rename or move it"
        )
    return found or None


def _tars(folder: Path) -> list[Path]:
    """The shards in a folder of shards; in one with folders (of classes, say) archives are something else."""
    entries = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
    tars = [entry for entry in entries if _is_tar(entry.name)]
    return [] if tars and any(entry.is_dir() for entry in entries) else tars


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # those who read it as a folder of images say why
        return []


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _expand(pattern: str) -> list[str]:
    if "{" not in pattern or not _is_tar(pattern):
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("braceexpand", "streams") from error
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"cannot be expanded ({error})", where=pattern) from error


def read_shards(files: Sequence[Path], target: str | None = None) -> Shards:
    """All samples of shards, in order.

    Args:
        files: the shards.
        target: field of ``KEY.json`` that holds the label; then ``KEY.cls`` does not count.

    Raises:
        DataError: a damaged shard, a sample without its image or label, or labels of several kinds.
    """
    import numpy as np

    found: list[_Index | None] = [None] * len(files)

    def read(k: int) -> None:
        found[k] = _index(files[k], target)

    for_each(read, len(files), "indexing shards")
    parts = [part for part in found if part is not None]
    tasks = {part.task: k for k, part in enumerate(parts)}
    if len(tasks) > 1:
        (one, k), (other, j) = list(tasks.items())[:2]
        raise DataError(f"its labels are to {other}, those of {files[k]} to {one}", where=str(files[j]))
    labels: dict[Label, int] = {}
    places = []
    codes = []
    for file, part in zip(files, parts, strict=True):
        table = np.empty(len(part.labels), np.int64)
        for code, label in enumerate(part.labels):
            if label not in labels:
                labels[label] = len(labels)
                places.append(str(file))
            table[code] = labels[label]
        codes.append(table[part.codes])
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.codes) for part in parts])
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("names", "offsets", "sizes")}
    members = Members([str(file) for file in files], shard, **joined)
    indices = all(isinstance(label, int) for label in labels)
    if parts[0].task == "classify":
        labels = {str(label): code for label, code in labels.items()}
    # As in VTAB's lists, indices name the classes up to the largest.
    classes = [str(k) for k in range(max(map(int, labels)) + 1)] if indices else None  # type: ignore[arg-type]
    listing = Listing(parts[0].task, [""] * len(labels), list(labels), places, classes)
    return Shards(members, listing, np.concatenate(codes))


@dataclass(frozen=True)
class _Index:
    """One shard: ``labels`` that occur, and of each sample the code of its label, the image's name, offset and size."""

    task: Task
    labels: list[Any]
    codes: np.ndarray
    names: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def _index(file: Path, target: str | None) -> _Index:
    """Read the shard's index as it was kept, or make and keep it."""
    import numpy as np

    stat = file.stat()
    identity = [_FORMAT, str(file.resolve()), stat.st_size, stat.st_mtime_ns, target]
    kept = cache_dir() / "data" / "shards" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(kept, allow_pickle=False) as content:
            head = json.loads(str(content["head"]))
            labels = [tuple(label) if isinstance(label, list) else label for label in head["labels"]]
            arrays = {name: content[name] for name in ("codes", "names", "offsets", "sizes")}
            return _Index(head["task"], labels, **arrays)
    except (OSError, ValueError, KeyError, EOFError):  # absent, cut short, or something else
        pass
    index = _read_tar(file, stat.st_size, target)
    head = json.dumps({"task": index.task, "labels": index.labels})
    try:
        with atomic_path(kept) as temporary:
            np.savez(
                temporary, head=np.array(head), codes=index.codes, names=index.names, offsets=index.offsets,
                sizes=index.sizes,
            )  # fmt: skip
    except OSError:  # a read-only or full disk: read again next time, no worse
        pass
    return index


def _read_tar(file: Path, size: int, target: str | None) -> _Index:
    import numpy as np

    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, tuple[Task, Any]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for key, suffix, member in _files(tar):
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                place = f"{file}, {member.name}"
                if f".{suffix}" in EXTENSIONS:
                    if key in images:
                        raise DataError(f"the sample has another image, {images[key][0]!r}", where=place)
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix == "cls" and target is None:
                    labels[key] = "classify", _class(_content(tar, member).decode("utf-8", "replace").strip(), place)
                elif suffix == "json" and (target is not None or key not in labels):
                    found = _from_json(_content(tar, member), target, place)
                    if found is not None:
                        labels[key] = found
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"the shard cannot be read ({error})", where=str(file), remedy="Repair or remove it") from error
    for key, (name, _, _) in images.items():
        if key not in labels:
            raise DataError("the image has no label", where=f"{file}, {name}", remedy=_LABELS)
    for key in labels:
        if key not in images:
            raise DataError("the sample has a label and no image", where=f"{file}, {key}")
    if not images:
        raise DataError("the shard holds no image", where=str(file))
    tasks: set[Task] = {labels[key][0] for key in images}
    if len(tasks) > 1:
        raise DataError(f"holds labels to {' and '.join(sorted(tasks))}", where=str(file))
    codes: dict[Any, int] = {}
    order = [codes.setdefault(labels[key][1], len(codes)) for key in images]
    names, offsets, sizes = zip(*images.values(), strict=True)
    return _Index(
        next(iter(tasks)),
        list(codes),
        np.array(order, np.int32),
        np.array([name.encode() for name in names]),
        np.array(offsets, np.int64),
        np.array(sizes, np.int64),
    )


def _files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, lower-case suffix, member) of the files that belong to samples; hidden ones do not."""
    for member in tar:
        path = PurePosixPath(member.name)
        stem, dot, suffix = path.name.partition(".")
        if member.isfile() and stem and dot:
            yield str(path.parent / stem), suffix.lower(), member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: IO[bytes] | None = tar.extractfile(member)
    return b"" if file is None else file.read()


def _class(text: str, place: str) -> int | str:
    if not text:
        raise DataError("the label is empty", where=place)
    return int(text) if text.isascii() and text.isdigit() else text


def _from_json(content: bytes, target: str | None, place: str) -> tuple[Task, Any] | None:
    """The task that a sample's JSON belongs to, and its label; None if it has none of the known fields."""
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise DataError(f"is no JSON ({error})", where=place) from error
    if not isinstance(fields, dict):
        raise DataError("is no JSON object", where=place)
    names = [target] if target is not None else [name for name in _TASKS if name in fields]
    if not names:
        return None
    if len(names) > 1 or names[0] not in fields:
        what = f"has the fields {' and '.join(names)}" if len(names) > 1 else f"has no field {names[0]!r}"
        raise DataError(what, where=place, remedy=f"Choose with target=. It has: {', '.join(fields)}")
    value = fields[names[0]]
    guess: Task = "multilabel" if isinstance(value, list) else "regress" if isinstance(value, float) else "classify"
    task = _TASKS.get(names[0], guess)
    if task == "multilabel":
        if not isinstance(value, list):
            raise DataError(f"the labels {value!r} are no list", where=place)
        return task, tuple(dict.fromkeys(map(str, value)))
    if task == "regress":
        return task, number(str(value), place)
    if not (type(value) is int and value >= 0) and not (isinstance(value, str) and value.strip()):
        raise DataError(f"the label {value!r} is neither an index nor a name", where=place)
    return task, _class(value.strip(), place) if isinstance(value, str) else value
