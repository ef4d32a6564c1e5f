"""Pascal VOC's XML: one file an image.

A folder of the VOC layout has ``Annotations/NAME.xml``, ``JPEGImages/`` and ``ImageSets/Main/SPLIT.txt``, whose lines
begin with a NAME. Without these three, a folder of XML files beside their images is read as it is.

VOC counts pixels from 1 and includes the last: a box from xmin to xmax covers the pixels xmin - 1 to xmax, from the
left edge of the first to the right edge of the last. Objects marked ``difficult`` are kept as ignored, as VOC's own
evaluation does. ``truncated``, ``occluded`` and parts of objects are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from refold.data.decoding import EXTENSIONS
from refold.detection.boxes import BoxSet, Object, Tally, check_sizes, finite_box
from refold.errors import DataError

__all__ = ["find_image", "read_names", "read_voc", "split_file", "voc_splits"]


class _Entry(NamedTuple):
    image: str
    size: tuple[int, int] | None
    objects: list[tuple[str, tuple[float, float, float, float], bool]]
    place: str


def voc_splits(root: str | Path) -> list[str]:
    """Names of the splits of a VOC folder that are one of train, val, trainval and test."""
    folder = Path(root) / "ImageSets" / "Main"
    return [name for name in ("train", "val", "trainval", "test") if (folder / f"{name}.txt").is_file()]


def read_voc(root: str | Path, split: str | Path | None = None, *, classes: Sequence[str] | None = None) -> BoxSet:
    """The images and boxes of a VOC folder; images without an object are negatives.

    Everything is checked now, as by :func:`refold.detection.read_coco`.

    Args:
        root: the folder.
        split: ``"train"`` for ``ImageSets/Main/train.txt``, or the path of such a file; None takes every XML file.
        classes: names in the order of the labels; None is those that occur, sorted.

    Raises:
        DataError: a file that is missing or malformed, with the place; an image of another size than stated; a class
            that is none of ``classes``; no object at all.
    """
    root = Path(root)
    where = str(root if split is None else split_file(root, split))
    entries = [_read(root, file) for file in _files(root, split)]
    names = sorted({name for entry in entries for name, _, _ in entry.objects}) if classes is None else list(classes)
    if not any(entry.objects for entry in entries):
        raise DataError("has no annotated object", where=where, remedy="Annotate, or name another folder or split")
    label_of = {name: k for k, name in enumerate(names, start=1)}
    paths, places = [entry.image for entry in entries], [entry.place for entry in entries]
    sizes = check_sizes(paths, [entry.size for entry in entries], places)
    tally = Tally(where)
    objects: list[list[Object]] = []
    for entry, size in zip(entries, sizes, strict=True):
        objects.append([])
        for name, box, difficult in entry.objects:
            if name not in label_of:
                remedy = f"Known: {', '.join(names)}"
                raise DataError(f"unknown class {name!r}", where=entry.place, remedy=remedy)
            area = (box[2] - box[0]) * (box[3] - box[1])
            usable = tally.usable(Object(box, label_of[name], difficult, area), *size)
            if usable is not None:
                objects[-1].append(usable)
    tally.warn()
    result = BoxSet(paths, sizes, objects, classes=names, source=where)
    if not result.count():
        raise DataError("has no object that can be learned from", where=where)
    return result


def _files(root: Path, split: str | Path | None) -> list[Path]:
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    if split is None:
        found = sorted(folder.glob("*.xml"))
        if not found:
            raise DataError("there are no XML files", where=str(folder), remedy="Expected VOC's Annotations/NAME.xml")
        return found
    file = split_file(root, split)
    names = read_names(file)
    for number, name in enumerate(names, start=1):
        if not (folder / f"{name}.xml").is_file():
            raise DataError(f"there is no {str(folder / f'{name}.xml')!r}", where=f"{file}, entry {number}")
    return [folder / f"{name}.xml" for name in names]


def split_file(root: Path, split: str | Path, lists: str = "Main") -> Path:
    """The file of a split: the one of that name in ``ImageSets/LISTS/``, or ``split`` as it is."""
    named = root / "ImageSets" / lists / f"{split}.txt"
    return named if named.is_file() else Path(split)


def read_names(file: Path) -> list[str]:
    """The names of a split, with which its lines begin.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list of a split cannot be read ({error})", where=str(file)) from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise DataError("the list of a split is empty", where=str(file))
    return names


def _read(root: Path, file: Path) -> _Entry:
    place = str(file)
    try:
        tree = ElementTree.parse(file).getroot()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=place) from error
    except ElementTree.ParseError as error:
        raise DataError(f"is no XML ({error})", where=place) from error
    objects = []
    for number, one in enumerate(tree.findall("object"), start=1):
        at = f"{place}, object {number}"
        name = _text(one, "name", at)
        corners = [_text(one, f"bndbox/{key}", at) for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = finite_box(corners)
            difficult = bool(int(one.findtext("difficult") or 0))
        except ValueError as error:
            raise DataError(f"is malformed ({error})", where=at) from error
        objects.append((name, (left - 1, top - 1, right, bottom), difficult))
    return _Entry(_image(root, file, tree), _size(tree, place), objects, place)


def _text(element: ElementTree.Element, path: str, place: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise DataError(f"lacks <{path.rpartition('/')[2]}>", where=place)
    return text


def _size(tree: ElementTree.Element, place: str) -> tuple[int, int] | None:
    """(height, width) as stated; some tools write zeros where they do not know."""
    texts = [tree.findtext(f"size/{key}") for key in ("height", "width")]
    try:
        height, width = (int(text or 0) for text in texts)
    except ValueError as error:
        raise DataError(f"its size is no whole numbers ({error})", where=place) from error
    return (height, width) if height and width else None


def _image(root: Path, file: Path, tree: ElementTree.Element) -> str:
    """The image of an XML file: by its ``filename``, else by the file's own name."""
    folder = root / "JPEGImages" if (root / "JPEGImages").is_dir() else file.parent
    stated = (tree.findtext("filename") or "").strip()
    if stated and (folder / stated).is_file():
        return str(folder / stated)
    return find_image(folder, file.stem, place=str(file), stated=stated)


def find_image(folder: Path, name: str, *, place: str, stated: str = "") -> str:
    """The image ``name`` with a suffix of images.

    Args:
        folder: where it lies.
        name: of the file, without suffix.
        place: what asks for it, for the message.
        stated: what the message shall call it.

    Raises:
        DataError: there is none.
    """
    for suffix in sorted(EXTENSIONS):
        if (folder / f"{name}{suffix}").is_file():
            return str(folder / f"{name}{suffix}")
    raise DataError(f"there is no image {str(folder / (stated or name))!r}", where=place)
