"""From what the user names to three sets of boxes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refold.data.dataset import drawn_sizes
from refold.data.splits import stratified_split
from refold.detection.boxes import BoxSet
from refold.detection.coco import read_coco
from refold.detection.voc import read_voc, voc_splits
from refold.detection.voc_masks import mask_splits, read_voc_masks
from refold.errors import DataError

__all__ = ["BoxSplits", "load_boxes"]

_SPELLINGS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_HELP = (
    "Expected a COCO file; a folder of them (annotations/*train*.json beside train/ or images/train/, or "
    "train/_annotations.coco.json); or a VOC folder (Annotations, JPEGImages, ImageSets/Main; of masks "
    "SegmentationObject, SegmentationClass, ImageSets/Segmentation)"
)


@dataclass(frozen=True)
class BoxSplits:
    """The parts of one data set, with the same classes.

    Attributes:
        train, val, test: None for a part that does not exist.
        classes: names of the labels 1, 2, ...
    """

    train: BoxSet
    val: BoxSet | None
    test: BoxSet | None
    classes: list[str]


def load_boxes(
    source: str | Path,
    *,
    images: str | Path | None = None,
    masks: bool = False,
    fractions: Sequence[float | None] = (0.8, 0.2, 0.0),
    seed: int = 0,
) -> BoxSplits:
    """Find annotated images and split them; everything is checked now, no image is decoded but VOC's masks.

    Splits that the source spells out are taken as they are: by COCO files with "train", "val" or "valid", and "test"
    in their names or their folder's, or by VOC's lists. Those left are drawn from the training images, stratified by
    the classes on them; the share of a split that is spelt out goes to training.

    Args:
        source: a COCO file; a folder with COCO files in ``annotations/`` and images in ``NAME/`` or ``images/NAME/``,
            NAME being what follows the last underscore of the file's name (``instances_train2017.json``); a folder of
            ``train/``, ``valid/`` and ``test/`` with ``_annotations.coco.json`` beside the images; or a VOC folder.
        images: folder of the images of a COCO file that lie elsewhere.
        masks: read masks too; of a VOC folder they are all that is read, see :mod:`refold.detection.voc_masks`.
        fractions: of training, validation and test, for the splits that are drawn: shares, or counts; None, once, is
            all the rest.
        seed: of the draw.

    Raises:
        DataError: as :func:`refold.detection.read_coco`, :func:`refold.detection.read_voc` and
            :func:`refold.detection.read_voc_masks`; no known layout; splits of other classes than training's.
        MissingExtraError: ``masks``, and faster-coco-eval is not installed.
    """
    if len(fractions) != 3:
        raise DataError(f"must be three sizes, not {tuple(fractions)}", where="fractions")
    found = _find(Path(source), None if images is None else Path(images), masks)
    train = found.pop("train")
    for part in found.values():
        if (part.classes, part.category_ids) != (train.classes, train.category_ids):
            remedy = f"Training has: {', '.join(train.classes)}"
            raise DataError("its classes or their ids are not those of training", where=part.source, remedy=remedy)
    parts = stratified_split(train.presence(), drawn_sizes(fractions, found), seed)
    drawn = {name: train.subset(rows) for name, rows in zip(_SPELLINGS, parts, strict=True) if len(rows)}
    if "train" not in drawn or not drawn["train"].count():
        raise DataError("leave no training image with an object", where="fractions", remedy="Enlarge the first")
    found |= drawn
    return BoxSplits(found["train"], found.get("val"), found.get("test"), train.classes)


def _find(source: Path, images: Path | None, masks: bool) -> dict[str, BoxSet]:
    """The splits there are, training among them; it is all there is where the source knows none."""
    if not source.exists():
        raise DataError("there is no such file or folder", where=str(source))
    if not source.is_dir():
        return {"train": read_coco(source, images, masks=masks)}
    known = mask_splits(source) if masks else voc_splits(source)
    if known:
        return _voc(source, known, masks)
    files = _coco_files(source)
    if files:
        return {name: read_coco(file, images or _images_of(source, file), masks=masks) for name, file in files.items()}
    marks = ("SegmentationObject", "Annotations") if masks else ("Annotations",)
    if any((source / mark).is_dir() for mark in marks) or any(source.glob("*.xml")):
        return _voc(source, [], masks)
    raise DataError("is no data set with boxes", where=str(source), remedy=_HELP)


def _voc(root: Path, splits: list[str], masks: bool) -> dict[str, BoxSet]:
    read = read_voc_masks if masks else read_voc
    if not splits:
        return {"train": read(root)}
    first = "train" if "train" in splits else "trainval"
    if first not in splits:
        raise DataError(f"has the splits {', '.join(splits)} and no training split", where=str(root), remedy=_HELP)
    train = read(root, first)
    held_out = [name for name in ("val", "test") if name in splits and not (name == "val" and first == "trainval")]
    return {"train": train} | {name: read(root, name, classes=train.classes) for name in held_out}


def _coco_files(root: Path) -> dict[str, Path]:
    """COCO files by split."""
    files = sorted(root.glob("annotations/*.json")) or sorted(root.glob("*/_annotations.coco.json"))
    files = files or sorted(root.glob("*.json"))
    files = [file for file in files if file.name.startswith("instances_")] or files
    found: dict[str, Path] = {}
    for file in files:
        name = file.parent.name if file.name == "_annotations.coco.json" else file.stem
        words = re.findall("[a-z]+", name.lower())
        splits = [split for split, spellings in _SPELLINGS.items() if set(words) & set(spellings)]
        if len(files) == 1:
            splits = ["train"]
        if len(splits) != 1 or splits[0] in found:
            taken = f", as has {found[splits[0]].name}" if len(splits) == 1 else ""
            reason = f"its name says {' and '.join(splits) or 'no split'}{taken}"
            raise DataError(reason, where=str(file), remedy=f"Name one COCO file. {_HELP}")
        found[splits[0]] = file
    if found and "train" not in found:
        raise DataError(f"has the splits {', '.join(found)} and no training split", where=str(root), remedy=_HELP)
    return found


def _images_of(root: Path, file: Path) -> Path:
    """The folder of a COCO file's images: named as the file ends (``instances_NAME.json``), else all of them."""
    name = file.stem.rpartition("_")[2]
    candidates = [root / name, root / "images" / name, root / "images"]
    if file.parent.name != "annotations" and file.parent != root:  # a file beside its images
        return file.parent
    return next((folder for folder in candidates if folder.is_dir()), root)
