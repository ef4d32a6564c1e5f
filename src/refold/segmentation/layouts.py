"""Folders of images and masks, as ADE20K, Pascal VOC and Cityscapes have them, and a plain one.

==========  ==========================================================================================================
layout      files
==========  ==========================================================================================================
plain       ``images/{train,val,test}`` and ``masks/{train,val,test}``, or both without split folders; value k is class
            k, 255 is ignored; names in ``classes.txt``, one a line, else as many classes as there are values
ade20k      ``images/{training,validation}`` and ``annotations/{training,validation}``; value 0 is ignored, value k is
            class k - 1; names in ``classes.txt`` or ``objectInfo150.txt``, else 150 numbers
voc         ``JPEGImages``, ``SegmentationClass`` (palette) and ``ImageSets/Segmentation/{train,val,test}.txt``; 255 is
            ignored; ``classes.txt`` replaces VOC's 21 names
cityscapes  ``leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png`` and ``gtFine/{train,val}/CITY/NAME_gtFine_labelIds
            .png``; the 19 evaluated classes, all else is ignored; its test split has no public labels and is left out
==========  ==========================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from refold.data.folders import find_images
from refold.data.listing import SPLIT_NAMES
from refold.data.parallel import for_each
from refold.data.splits import stratified_split
from refold.errors import DataError
from refold.segmentation.data import MaskSet
from refold.segmentation.labels import IGNORE, VOC, Labels, read_class_names, read_mask

__all__ = ["LAYOUTS", "MaskSplits", "load_masks"]

_SPLITS = ("train", "val", "test")
_ADE20K_CLASSES = 150
Pairs = tuple[list[str], list[str]]  # images, and a mask for each


@dataclass(frozen=True)
class MaskSplits:
    """The parts of one data set, with the same classes.

    Attributes:
        train, val, test: None for a part that does not exist.
        classes: names in the order of the class indices.
        layout: one of :data:`LAYOUTS`.
    """

    train: MaskSet
    val: MaskSet | None
    test: MaskSet | None
    classes: list[str]
    layout: str


def load_masks(
    root: str | Path,
    *,
    layout: str | None = None,
    fractions: Sequence[float | None] = (0.8, 0.2, 0.0),
    seed: int = 0,
    check: bool = True,
) -> MaskSplits:
    """Find images and masks, pair them, and look at all of them.

    Args:
        root: the folder.
        layout: one of :data:`LAYOUTS`; None tells it from the folders.
        fractions, seed: of the split that is drawn where a plain layout has none, see
            :func:`refold.data.splits.stratified_split`.
        check: decode every image and mask now (:meth:`MaskSet.check`).

    Raises:
        DataError: an unknown layout; an image without a mask or a mask without an image; and with ``check`` a broken
            file, image and mask of different size, a label beyond the classes, no labelled pixel in a split, or only
            one class in the training masks.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder))
    layout = layout or _recognise(folder)
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}", where="layout", remedy=f"Known: {', '.join(LAYOUTS)}")
    found, labels = LAYOUTS[layout](folder)
    if "all" in found:
        found = _draw(found["all"], fractions, seed)
    if "train" not in found:
        raise DataError("has no training split", where=str(folder), remedy=_expected(layout))
    sets = {split: MaskSet(*pairs, labels) for split, pairs in found.items()}
    if check:
        for split, masks in sets.items():
            present = (masks.check() > 0).nonzero().flatten().tolist()
            if split == "train" and len(present) < 2:
                raise DataError(
                    f"every labelled pixel of the training masks is of class {labels.classes[present[0]]!r}",
                    where=str(folder),
                    remedy=f"Masks of two classes hold 0 and 1; {IGNORE} is ignored",
                )
    return MaskSplits(sets["train"], sets.get("val"), sets.get("test"), labels.classes, layout)


def _recognise(root: Path) -> str:
    for layout, marks in _MARKS.items():
        if all((root / mark).is_dir() for mark in marks):
            return layout
    known = "; ".join(f"{layout}: {' and '.join(marks)}" for layout, marks in _MARKS.items())
    raise DataError("holds no images and masks of a known layout", where=str(root), remedy=f"Expected {known}")


def _read_ade20k(root: Path) -> tuple[dict[str, Pairs], Labels]:
    folders = {"train": "training", "val": "validation"}
    found = {
        split: _pair(root / "images" / name, root / "annotations" / name)
        for split, name in folders.items()
        if (root / "images" / name).is_dir() or (root / "annotations" / name).is_dir()
    }
    table = root / "objectInfo150.txt"
    if (root / "classes.txt").is_file():
        names = read_class_names(root / "classes.txt")
    elif table.is_file():  # "Idx Ratio Train Val Stuff Name", tab-separated
        names = [re.split("[,;]", row.split("\t")[-1])[0].strip() for row in read_class_names(table)[1:]]
        names = _distinct(names)
    else:
        names = [str(k) for k in range(1, _ADE20K_CLASSES + 1)]
    return found, Labels.reduced(names)


def _read_voc(root: Path) -> tuple[dict[str, Pairs], Labels]:
    lists = root / "ImageSets" / "Segmentation"
    found: dict[str, Pairs] = {}
    for split in _SPLITS:
        path = lists / f"{split}.txt"
        if not path.is_file():
            continue
        names = read_class_names(path)
        images = [str(root / "JPEGImages" / f"{name}.jpg") for name in names]
        masks = [str(root / "SegmentationClass" / f"{name}.png") for name in names]
        for kind, files in (("image", images), ("mask", masks)):
            if split == "test" and kind == "mask" and not any(Path(file).is_file() for file in files):
                break  # VOC publishes no masks of its test images
            _require_files(kind, files, path)
        else:
            found[split] = images, masks
    names_file = root / "classes.txt"
    return found, Labels.plain(read_class_names(names_file) if names_file.is_file() else VOC)


def _read_cityscapes(root: Path) -> tuple[dict[str, Pairs], Labels]:
    found = {
        split: _pair(
            root / "leftImg8bit" / split,
            root / "gtFine" / split,
            image_ending="_leftImg8bit",
            mask_ending="_gtFine_labelIds",
        )
        for split in ("train", "val")
        if (root / "leftImg8bit" / split).is_dir() or (root / "gtFine" / split).is_dir()
    }
    return found, Labels.cityscapes()


def _read_plain(root: Path) -> tuple[dict[str, Pairs], Labels]:
    images, masks = root / "images", root / "masks"
    names = sorted({p.name for part in (images, masks) for p in part.iterdir() if p.is_dir()})
    splits = {name: SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES}
    if len(set(splits.values())) < len(splits):
        raise DataError(f"holds two folders of one split: {', '.join(splits)}", where=str(root))
    found = {split: _pair(images / name, masks / name) for name, split in splits.items()}
    if not found:
        found = {"all": _pair(images, masks)}
    names_file = root / "classes.txt"
    if names_file.is_file():
        return found, Labels.plain(read_class_names(names_file))
    largest = _largest_label([path for _, paths in found.values() for path in paths])
    return found, Labels.plain([str(k) for k in range(largest + 1)])


#: Name of a layout -> its reader.
LAYOUTS: dict[str, Callable[[Path], tuple[dict[str, Pairs], Labels]]] = {
    "ade20k": _read_ade20k,
    "voc": _read_voc,
    "cityscapes": _read_cityscapes,
    "plain": _read_plain,
}
_MARKS = {
    "ade20k": ("images/training", "annotations/training"),
    "voc": ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "plain": ("images", "masks"),
}


def _pair(images: Path, masks: Path, image_ending: str = "", mask_ending: str = "") -> Pairs:
    """Image and mask files of the same relative path, apart from the suffix and these endings, sorted.

    Raises:
        DataError: a missing folder, an image without a mask, a mask without an image, or two of one name.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(
                "there is no such folder", where=str(folder), remedy="Images and masks have the same splits"
            )
    by_name = [_by_name(images, image_ending), _by_name(masks, mask_ending)]
    for ours, theirs, folder, text in (
        (by_name[0], by_name[1], masks, ("image", "mask")),
        (by_name[1], by_name[0], images, ("mask", "image")),
    ):
        alone = sorted(ours.keys() - theirs.keys())
        if alone:
            raise DataError(
                f"{len(alone)} {text[0]}s have no {text[1]} in {folder}",
                where=ours[alone[0]],
                remedy="An image and its mask have the same name, apart from the ending",
            )
    if not by_name[0]:
        raise DataError("there is no image", where=str(images))
    names = sorted(by_name[0])
    return [by_name[0][name] for name in names], [by_name[1][name] for name in names]


def _by_name(folder: Path, ending: str) -> dict[str, str]:
    """Relative path without ``ending`` and suffix -> file, of the images below ``folder`` that have this ending."""
    found: dict[str, str] = {}
    for path in find_images(folder):
        name = str(Path(path).relative_to(folder).with_suffix(""))
        if not name.endswith(ending):
            continue  # Cityscapes keeps instances and colours beside the labels
        name = name.removesuffix(ending)
        if name in found:
            raise DataError(f"has the same name as {found[name]}", where=path, remedy="Keep one of them")
        found[name] = path
    return found


def _require_files(kind: str, paths: list[str], source: Path) -> None:
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise DataError(f"{len(missing)} {kind}s are listed and not there, first {missing[0]}", where=str(source))


def _largest_label(paths: list[str]) -> int:
    """The largest value, apart from 255, in these masks."""
    largest = [0] * len(paths)

    def look(k: int) -> None:
        values = read_mask(paths[k])
        labelled = values[values != IGNORE]
        largest[k] = int(labelled.max()) if labelled.size else 0
        if largest[k] > IGNORE:
            raise DataError(
                f"the mask has a label of {largest[k]}",
                where=paths[k],
                remedy=f"Labels are class indices up to {IGNORE - 1}; name the classes in classes.txt",
            )

    for_each(look, len(paths), "reading masks")
    return max(largest)


def _draw(pairs: Pairs, fractions: Sequence[float | None], seed: int) -> dict[str, Pairs]:
    images, masks = pairs
    parts = stratified_split(torch.zeros(len(images), dtype=torch.long), fractions, seed)
    return {
        split: ([images[i] for i in part.tolist()], [masks[i] for i in part.tolist()])
        for split, part in zip(_SPLITS, parts, strict=True)
        if len(part)
    }


def _distinct(names: list[str]) -> list[str]:
    """The same names, with a number where one comes again."""
    return [f"{name} ({names[:k].count(name) + 1})" if name in names[:k] else name for k, name in enumerate(names)]


def _expected(layout: str) -> str:
    return f"The {layout} layout needs {' and '.join(_MARKS[layout])} with a training part"
