"""From what the user names to three image sets."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from refold.data.decoding import decode
from refold.data.folders import IMAGES, FileKind, find_files, read_folder, read_list
from refold.data.images import CACHES, ImageSet, Task
from refold.data.listing import WHOLE, Listing, class_names, encode
from refold.data.packages import packaged
from refold.data.parallel import for_each
from refold.data.shards import load_shards
from refold.data.splits import stratified_split
from refold.data.stream_sources import PREFIX, load_streams
from refold.data.streams import StreamSet
from refold.data.tables import read_table
from refold.errors import DataError

__all__ = ["Splits", "load_dataset", "load_images"]

_PACKAGED = "packaged/"


@dataclass(frozen=True)
class Splits:
    """The parts of one data set, with the same classes.

    Attributes:
        train, val, test: image sets; None for a part that does not exist.
        classes: names in the order of the targets; None for a regression.
        task: ``"classify"``, ``"multilabel"`` or ``"regress"``.
        skipped: (path, reason) of every file left out by ``skip_bad_images``.
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    classes: list[str] | None
    task: Task
    skipped: list[tuple[str, str]] = field(default_factory=list)


def load_dataset(
    source: str | Path | None,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
    target: str | None = None,
    fractions: Sequence[float | None] = (0.8, 0.2, 0.0),
    seed: int = 0,
    skip_bad_images: bool = False,
    cache: str = "auto",
) -> Splits:
    """Find images and labels, and split them. No image is opened yet, unless ``skip_bad_images`` asks for it.

    A source is a folder with a folder per class, or with such folders under ``train/``, ``val/`` and ``test/``; a
    folder with VTAB lists; one list; a CSV file (:mod:`refold.data.tables`); WebDataset shards, as a pattern like
    ``train-{0000..0099}.tar`` or a folder of them (:mod:`refold.data.shards`); ``"hf-dataset:NAME"``, a Hugging Face
    data set as a stream, whose splits ``train``, ``val`` and ``test`` may name (:mod:`refold.data.stream_sources`); or
    ``"packaged/elpv"`` and ``"packaged/textile"``, see :func:`packaged`.

    Splits that the sources spell out are taken as they are. Those left are drawn from the training images, stratified
    (:func:`stratified_split`); the share of a split that is spelt out goes to training.

    Args:
        source: the data, or, with ``train``, the folder that the names of the splits are relative to.
        train, val, test: sources of single splits.
        target: column of a CSV, or field of a shard's JSON, that holds the labels.
        fractions: of training, validation and test, for the splits that are drawn: shares, or counts; None, once, is
            all the rest.
        seed: of the draw.
        skip_bad_images: open every image now, and leave out and list those that cannot be decoded.
        cache: ``"auto"``, ``"memory"`` or ``"stream"``, see :class:`ImageSet`.

    Raises:
        DataError: naming the file, and the row, that is missing, malformed or contradicts the others.
        MissingExtraError: a packaged source whose package is not installed.
    """
    if cache not in CACHES:
        raise DataError(f"must be one of {', '.join(CACHES)}, not {cache!r}", where="cache")
    if len(fractions) != 3:
        raise DataError(f"must be three sizes, not {tuple(fractions)}", where="fractions")
    if source is not None and str(source).startswith(_PACKAGED) and not Path(source).exists():
        if train or val or test or target:
            raise DataError("has neither split files nor columns", where=str(source), remedy="Use fractions")
        return _split_packaged(str(source).removeprefix(_PACKAGED), fractions, seed, cache)

    named = {"train": train, "val": val, "test": test}
    if str(source).startswith(PREFIX):
        return _split_streams(*load_streams(str(source), named, target), str(source), fractions, skip_bad_images)
    if (shards := load_shards(source, named, target, cache)) is not None:
        return _split_shards(shards, fractions, seed, skip_bad_images)
    pool, found = _find(source, named, target)
    skipped: list[tuple[str, str]] = []
    if skip_bad_images:
        pool, *others = (without_bad(listing, skipped, IMAGES, _check) for listing in (pool, *found.values()))
        found = dict(zip(found, others, strict=True))
    classes = class_names(pool, found.values())
    targets = encode(pool, classes)
    sizes = drawn_sizes(fractions, found)
    parts = {
        name: pool.pick(indices.tolist())
        for name, indices in zip(("train", "val", "test"), stratified_split(targets, sizes, seed), strict=True)
        if len(indices)
    }
    parts |= found

    def build(name: str) -> ImageSet | None:
        listing = parts.get(name)
        if listing is None:
            return None
        return ImageSet(listing.paths, encode(listing, classes), task=pool.task, classes=classes, cache=cache)

    return _assemble(build("train"), build("val"), build("test"), skipped)


def load_images(
    source: str | Path | Iterable[str | Path], *, skip_bad_images: bool = False, cache: str = "auto"
) -> tuple[ImageSet, list[tuple[str, str]]]:
    """Images without labels, to predict: one file, a folder with all below it, or several of either.

    Returns:
        the images, with -1 for every target, and (path, reason) of the files left out by ``skip_bad_images``.

    Raises:
        DataError: a file or folder that does not exist, or no image at all.
    """
    paths, skipped = find_sources(source, IMAGES, _check if skip_bad_images else None)
    return ImageSet(paths, torch.full((len(paths),), -1), cache=cache), skipped


def find_sources(
    source: str | Path | Iterable[str | Path], kind: FileKind, check: Callable[[str], object] | None
) -> tuple[list[str], list[tuple[str, str]]]:
    """Files without labels: one, those of a kind in a folder and all below it, or several of either.

    Returns:
        their paths, and (path, reason) of those that ``check`` refuses, which are left out.

    Raises:
        DataError: a file or folder that does not exist, or nothing to be read.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    paths: list[str] = []
    for entry in map(Path, sources):
        if not entry.exists():
            raise DataError("there is no such file or folder", where=str(entry))
        paths += find_files(entry, kind) if entry.is_dir() else [str(entry)]
    skipped: list[tuple[str, str]] = []
    if check is not None:
        bad = _bad_files(paths, kind, check)
        skipped = [(paths[i], reason) for i, reason in bad.items()]
        paths = [path for i, path in enumerate(paths) if i not in bad]
    if not paths:
        raise DataError(f"there is no readable {kind.name}", where=", ".join(map(str, sources)) or "source")
    return paths, skipped


def _find(
    source: str | Path | None, named: dict[str, str | Path | None], target: str | None
) -> tuple[Listing, dict[str, Listing]]:
    """The listing that training, and the splits to be drawn, come from; and the validation and test that are given."""
    if source is None and named["train"] is None:
        raise DataError("no data is named", remedy="Give source, or train")
    root = None if source is None else Path(source)
    explicit = {name: _read(_locate(path, root), target) for name, path in named.items() if path is not None}
    base = explicit.pop("train", None)
    if base is None:
        assert root is not None
        base = _read(root, target)
        found = {name: listing for name, listing in base.items() if name in ("val", "test")}
    else:
        found = {}
    for name, listings in explicit.items():
        listing = listings.get(WHOLE, listings.get(name))
        if listing is None:
            raise DataError(f"has no {name} split", where=str(named[name]), remedy=f"It has: {', '.join(listings)}")
        found[name] = listing
    pool = base.get(WHOLE, base.get("train"))
    if pool is None:
        raise DataError("has no training split", where=str(named["train"] or source))
    return pool, found


def _locate(path: str | Path, root: Path | None) -> Path:
    """``path`` inside the folder ``root`` if it is there, else as it stands."""
    return root / path if root is not None and (root / path).exists() else Path(path)


def _read(path: Path, target: str | None) -> dict[str, Listing]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise DataError("there is no such file or folder", where=str(path))
    if not path.is_dir() and suffix in (".csv", ".tsv"):
        return read_table(path, target)
    if target is not None:
        raise DataError(f"only CSV files have columns such as {target!r}", where=str(path), remedy="Drop target")
    if path.is_dir():
        return read_folder(path)
    if suffix == ".txt":
        return read_list(path)
    raise DataError(f"a {suffix or 'suffixless'} file is no data set", where=str(path), remedy="Use .csv, .tsv or .txt")


def drawn_sizes(fractions: Sequence[float | None], found: Container[str]) -> list[float | None]:
    """Sizes of train, val and test to draw: nothing for what is given; its share (not its count) goes to training."""
    sizes = list(fractions)
    given = [k for k, name in enumerate(("train", "val", "test")) if name in found]
    shares = any(isinstance(size, float) for size in sizes)
    if any(sizes[k] is None for k in given):
        sizes[0] = None
    elif shares and sizes[0] is not None:
        sizes[0] += sum(sizes[k] or 0.0 for k in given)
    for k in given:
        sizes[k] = 0.0 if shares else 0
    return sizes


def _split_packaged(name: str, fractions: Sequence[float | None], seed: int, cache: str) -> Splits:
    whole = packaged(name, cache=cache)
    indices = stratified_split(whole.targets, fractions, seed)
    train, val, test = (whole.subset(part) if len(part) else None for part in indices)
    return _assemble(train, val, test, [])


def _split_streams(
    parts: Mapping[str, StreamSet],
    skipped: list[tuple[str, str]],
    source: str,
    fractions: Sequence[float | None],
    skip_bad_images: bool,
) -> Splits:
    if skip_bad_images:
        raise DataError("images of a stream are not looked at before", where="skip_bad_images", remedy="Leave it out")
    for split, size in zip(("val", "test"), fractions[1:], strict=True):
        if split not in parts and size != 0:
            raise DataError(
                f"has no {split} split, and none is drawn from a stream",
                where=source,
                remedy=f"Name one ({split}=..., --{split}), or do without (fractions=(1, 0, 0), --split 1 0 0)",
            )
    return _assemble(parts["train"], parts.get("val"), parts.get("test"), skipped)


def _split_shards(
    parts: dict[str, ImageSet], fractions: Sequence[float | None], seed: int, skip_bad_images: bool
) -> Splits:
    skipped: list[tuple[str, str]] = []
    if skip_bad_images:
        for split, images in parts.items():
            bad = images.undecodable()
            skipped += [(images.paths[i], reason) for i, reason in bad.items()]
            parts[split] = images.subset([i for i in range(len(images)) if i not in bad])
    pool = parts.pop("train")
    chosen = stratified_split(pool.targets, drawn_sizes(fractions, parts), seed)
    drawn = zip(("train", "val", "test"), chosen, strict=True)
    parts |= {split: pool.subset(indices) for split, indices in drawn if len(indices)}
    return _assemble(parts.get("train"), parts.get("val"), parts.get("test"), skipped)


def _assemble(
    train: ImageSet | None, val: ImageSet | None, test: ImageSet | None, skipped: list[tuple[str, str]]
) -> Splits:
    if train is None:
        raise DataError("leave no training image", where="fractions", remedy="Enlarge the first")
    return Splits(train, val, test, train.classes, train.task, skipped)


def without_bad(
    listing: Listing, skipped: list[tuple[str, str]], kind: FileKind, check: Callable[[str], object]
) -> Listing:
    """The listing without the files that ``check`` refuses, which are added to ``skipped`` with the reason.

    Raises:
        DataError: nothing is left, or nothing of a class.
    """
    bad = _bad_files(listing.paths, kind, check)
    skipped += [(listing.paths[i], reason) for i, reason in bad.items()]
    kept = listing.pick(i for i in range(len(listing)) if i not in bad)
    lost = {listing.labels[i] for i in bad} - set(kept.labels)
    if not len(kept) or (listing.task == "classify" and lost):
        what = f"of class {min(map(str, lost))!r} " if listing.task == "classify" else ""
        path, reason = skipped[-1]
        raise DataError(f"no {kind.name} {what}can be decoded", where=path, remedy=f"Reason: {reason}")
    return kept


def _bad_files(paths: list[str], kind: FileKind, check: Callable[[str], object]) -> dict[int, str]:
    """Index and reason of every file that ``check`` refuses."""
    bad: dict[int, str] = {}

    def look(i: int) -> None:
        try:
            check(paths[i])
        except DataError as error:
            bad[i] = error.reason

    for_each(look, len(paths), f"checking {kind.name}s")
    return dict(sorted(bad.items()))


def _check(path: str) -> None:
    decode(path, channels=3)
