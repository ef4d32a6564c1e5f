"""Labelled videos from folders, and from the files that data sets come with.

==================  ==================================================================================================
layout              what is there
==================  ==================================================================================================
folders             a folder per class, with or without ``train/``, ``val/`` and ``test/`` above
Kinetics            ``train.csv``, ``val.csv`` (or ``validate.csv``) and ``test.csv`` with the columns label,
                    youtube_id, time_start, time_end and split; the videos ``ID_000000_000010.mp4`` anywhere below
lists               ``train``, ``val`` and ``test`` as ``.csv`` or ``.txt`` of lines ``path label`` with a class index,
                    as mmaction and VideoMAE have them; or ``.csv`` tables with the columns path and label
Something-          ``labels.json``, ``train.json``, ``validation.json`` (also ``something-something-v2-train.json``
Something v2        and so on), here or in ``labels/``; the videos ``ID.webm`` anywhere below
HMDB51              a folder per class, and the official ``CLASS_test_split1.txt``, here or in a folder beside the
                    classes
==================  ==================================================================================================

Annotations lie in the folder itself or in ``annotations/``; or a split's file is named. Everything is checked before
training: a video that is missing, a class without videos, a label that is not known are one error that names them. Of
Kinetics, of which videos disappear, and of the others, missing ones are left out with ``skip_bad_images``, and listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from refold.data.dataset import drawn_sizes, find_sources, without_bad
from refold.data.folders import FileKind, read_folder, read_list
from refold.data.listing import WHOLE, Listing, class_names, encode
from refold.data.splits import stratified_split
from refold.data.tables import read_table
from refold.errors import DataError
from refold.video.annotations import find_annotations, find_hmdb, find_something, is_kinetics, read_kinetics
from refold.video.decoding import EXTENSIONS, open_video
from refold.video.found import Found
from refold.video.videos import VideoSet, VideoSplits

__all__ = ["FOLDS", "VIDEOS", "find_videos", "load_videos"]

VIDEOS = FileKind("video", EXTENSIONS)
#: Numbers of HMDB51's official splits.
FOLDS = (1, 2, 3)


def load_videos(
    source: str | Path,
    *,
    train: str | Path | None = None,
    val: str | Path | None = None,
    test: str | Path | None = None,
    fractions: Sequence[float | None] = (0.8, 0.2, 0.0),
    seed: int = 0,
    fold: int = 1,
    skip_bad_images: bool = False,
) -> VideoSplits:
    """Find videos and their classes, and split them. No video is opened yet, unless ``skip_bad_images`` asks for it.

    Splits that the source spells out are taken as they are. Those left are drawn from the training videos, stratified,
    as :func:`refold.data.load_dataset` does.

    Args:
        source: a folder; see above.
        train, val, test: files or folders of single splits, relative to ``source`` or as they stand.
        fractions: of training, validation and test, for the splits that are drawn: shares, or counts; None, once, is
            all the rest.
        seed: of the draw.
        fold: which of HMDB51's three official splits.
        skip_bad_images: decode every video now, and leave out and list those that are missing or cannot be decoded.

    Raises:
        DataError: naming the file, and the line, that is missing, malformed or contradicts the others.
        MissingExtraError: videos are to be opened, and PyAV is not installed.
    """
    if len(fractions) != 3:
        raise DataError(f"must be three sizes, not {tuple(fractions)}", where="fractions")
    if fold not in FOLDS:
        raise DataError(f"must be one of {', '.join(map(str, FOLDS))}, not {fold}", where="fold")
    root = Path(source)
    if not root.exists():
        raise DataError("there is no such file or folder", where=str(root))
    found = Found(root if root.is_dir() else root.parent, VIDEOS, skip=skip_bad_images)
    named = {"train": train, "val": val, "test": test}
    if any(path is not None for path in named.values()):
        listings, mirrored = _named(found, root, named, fold)
    else:
        listings, mirrored = _read(root, found, fold)
    pool = listings.pop("train", None) or listings.pop(WHOLE, None)
    if pool is None:
        raise DataError("has no training split", where=str(root))
    if skip_bad_images:
        pool = without_bad(pool, found.skipped, VIDEOS, _check)
        listings = {name: without_bad(part, found.skipped, VIDEOS, _check) for name, part in listings.items()}
    classes = class_names(pool, listings.values())
    assert classes is not None
    _require_classes(pool, classes, fixed=pool.classes is not None)
    parts = stratified_split(encode(pool, classes), drawn_sizes(fractions, listings), seed)
    drawn = {name: pool.pick(part.tolist()) for name, part in zip(named, parts, strict=True) if len(part)}
    sets = {name: VideoSet(part.paths, encode(part, classes), classes) for name, part in (drawn | listings).items()}
    if "train" not in sets:
        raise DataError("leave no training video", where="fractions", remedy="Enlarge the first")
    return VideoSplits(sets["train"], sets.get("val"), sets.get("test"), classes, mirrored, found.skipped)


def find_videos(
    source: str | Path | Iterable[str | Path], *, skip_bad_images: bool = False
) -> tuple[list[str], list[tuple[str, str]]]:
    """Videos without labels, to predict: one file, a folder with all below it, or several of either.

    Returns:
        their paths, and (path, reason) of the files left out by ``skip_bad_images``.

    Raises:
        DataError: a file or folder that does not exist, or no video at all.
    """
    return find_sources(source, VIDEOS, _check if skip_bad_images else None)


def _read(path: Path, found: Found, fold: int) -> tuple[dict[str, Listing], bool]:
    """The splits of a folder or a file, and whether a mirrored video keeps its class."""
    if not path.is_dir():
        return _read_file(path, found), True
    if annotations := find_something(path):
        return annotations.read(found), False
    if files := find_annotations(path):
        return {split: _whole(_read_file(file, found), file, split) for split, file in files.items()}, True
    if lists := find_hmdb(path):
        return lists.read(found, fold), True
    return _single(read_folder(path, VIDEOS)), True


def _named(found: Found, root: Path, named: dict[str, str | Path | None], fold: int) -> tuple[dict[str, Listing], bool]:
    """The splits that files or folders are named for, and those of the source where training is not."""
    paths = {
        name: root / path if (root / path).exists() else Path(path) for name, path in named.items() if path is not None
    }
    for path in paths.values():
        if not path.exists():
            raise DataError("there is no such file or folder", where=str(path))
    listings, mirrored = ({}, True) if "train" in paths else _read(root, found, fold)
    for name, path in paths.items():
        there, both = _read(path, found, fold)
        listings[name] = _whole(there, path, name)
        mirrored = mirrored and both
    return listings, mirrored


def _whole(listings: dict[str, Listing], path: Path, split: str) -> Listing:
    """The listing of a source that is for one split."""
    listing = listings.get(split) or listings.get(WHOLE)
    if listing is None:
        raise DataError(f"has no {split} split", where=str(path), remedy=f"It has: {', '.join(listings)}")
    return listing


def _read_file(path: Path, found: Found) -> dict[str, Listing]:
    """A file of annotations; of those with a column ``split`` one listing each."""
    if is_kinetics(path):
        return read_kinetics(path, found)
    if path.suffix.lower() in (".csv", ".tsv") and _has_header(path):
        return _single(read_table(path))
    if path.suffix.lower() in (".csv", ".txt"):
        return read_list(path, VIDEOS, found.root)
    raise DataError("is no list of videos", where=str(path), remedy="Use .csv or .txt")


def _has_header(path: Path) -> bool:
    """Whether it is a table with a column ``path``, and not a list of ``path label``."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        names = file.readline().replace("\t", ",").split(",")
    return "path" in (name.strip() for name in names)


def _single(listings: dict[str, Listing]) -> dict[str, Listing]:
    """The listings, each with one class a video.

    Raises:
        DataError: they have several labels, or numbers.
    """
    for listing in listings.values():
        if listing.task != "classify":
            raise DataError("videos have one class each", where=listing.places[0], remedy="Use the column label")
    return listings


def _require_classes(pool: Listing, classes: list[str], *, fixed: bool) -> None:
    """Every class that a source names has a training video; of class indices the largest says how many there are."""
    there = set(pool.labels)
    missing = [name for name in classes if name not in there]
    if fixed and missing:
        raise DataError(
            f"{len(missing)} of {len(classes)} classes have no training video, for example {missing[0]!r}",
            where=pool.places[0],
            remedy="Add videos of them, or take them out of the annotations",
        )


def _check(path: str) -> None:
    with open_video(path) as video:
        video.check()
