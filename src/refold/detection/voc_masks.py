"""Pascal VOC's masks: two pictures an image, one of objects and one of classes.

``SegmentationObject/NAME.png`` has the value k on the pixels of object k, ``SegmentationClass/NAME.png`` the class on
each pixel; both are palette or grey images, 0 is background and 255 "void": the borders of objects, and what is too
difficult to segment. Images are in ``JPEGImages/``, the names of a split in ``ImageSets/Segmentation/SPLIT.txt``.

The masks alone are read: a box is the extent of an object's mask, without the void border that VOC's XML boxes may
reach into, and nothing is marked as difficult, for which VOC's masks have void. Void pixels belong to no object. The
XML files are left aside: many such folders have none, and which of its objects is the k-th is not written in the masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refold.data.decoding import read_size
from refold.data.parallel import for_each
from refold.detection.boxes import BoxSet, Object
from refold.detection.masks import mask_api
from refold.detection.voc import find_image, read_names, split_file
from refold.errors import DataError
from refold.segmentation.labels import IGNORE, VOC, Labels, read_class_names, read_mask

if TYPE_CHECKING:
    import numpy as np

__all__ = ["mask_splits", "read_voc_masks"]

_LISTS = "Segmentation"


def mask_splits(root: str | Path) -> list[str]:
    """Names of the splits with masks that are one of train, val, trainval and test.

    A test split of which no image has a mask is left out: VOC publishes none.
    """
    root = Path(root)
    folder = root / "ImageSets" / _LISTS
    found = [name for name in ("train", "val", "trainval", "test") if (folder / f"{name}.txt").is_file()]
    if "test" in found and not any(_mask(root, "Object", name).is_file() for name in read_names(folder / "test.txt")):
        found.remove("test")
    return found


def read_voc_masks(
    root: str | Path, split: str | Path | None = None, *, classes: Sequence[str] | None = None
) -> BoxSet:
    """The images, objects and masks of a VOC folder; images without an object are negatives.

    Everything is checked now, and all masks are decoded.

    Args:
        root: the folder.
        split: ``"train"`` for ``ImageSets/Segmentation/train.txt``, or the path of such a file; None takes every file
            of ``SegmentationObject``.
        classes: names of the classes 1, 2, ...; None is ``classes.txt`` in the folder, which begins with the
            background, else VOC's 20.

    Raises:
        DataError: a file that is missing or no mask; a mask of another size than its image; an object that has no
            class; a class beyond the names; no object at all.
        MissingExtraError: faster-coco-eval is not installed.
    """
    root = Path(root)
    if not (root / "SegmentationObject").is_dir():
        raise DataError(
            "has no folder SegmentationObject, and so no mask for each object",
            where=str(root),
            remedy="Add VOC's SegmentationObject and SegmentationClass, use COCO's format, or train on boxes alone",
        )
    if split is None:
        where, names = str(root), sorted(file.stem for file in (root / "SegmentationObject").glob("*.png"))
    else:
        file = split_file(root, split, _LISTS)
        where, names = str(file), read_names(file)
    if not names:
        raise DataError("there are no masks", where=str(root / "SegmentationObject"), remedy="Expected NAME.png")
    listed = [VOC[0], *classes] if classes is not None else VOC
    if classes is None and (root / "classes.txt").is_file():
        listed = read_class_names(root / "classes.txt")
    labels = Labels.plain(list(listed))
    mask_api()  # complains now, and not from a thread
    images = [
        find_image(root / "JPEGImages", name, place=f"{where}, entry {number}")
        for number, name in enumerate(names, start=1)
    ]
    objects: list[list[Object]] = [[] for _ in names]
    sizes = [(0, 0)] * len(names)

    def read(index: int) -> None:
        sizes[index] = read_size(images[index])
        objects[index] = _objects(root, names[index], images[index], sizes[index], labels)

    for_each(read, len(names), "reading masks")
    if not any(objects):
        raise DataError("has no object in any mask", where=where, remedy="Annotate, or name another folder or split")
    return BoxSet(images, sizes, objects, classes=labels.classes[1:], source=where)


def _objects(root: Path, name: str, image: str, size: tuple[int, int], labels: Labels) -> list[Object]:
    import numpy as np

    at, of_classes = _mask(root, "Object", name), _mask(root, "Class", name)
    numbers = _values(at, image, size)
    classes = labels.encode(_values(of_classes, image, size), str(of_classes))
    found = [number for number in np.unique(numbers).tolist() if number not in (0, IGNORE)]
    if not found:
        return []
    masks = np.asfortranarray(numbers[:, :, None] == np.array(found), dtype=np.uint8)
    objects = []
    for k, (number, rle) in enumerate(zip(found, mask_api().encode(masks), strict=True)):
        rows, columns = np.nonzero(masks[:, :, k])
        votes = np.bincount(classes[rows, columns], minlength=IGNORE + 1)[:IGNORE]
        label = int(votes.argmax())
        if not label:
            raise DataError(
                f"object {number} has no class: of its {len(rows)} pixels {votes[0]} are background there, and "
                f"{int(votes[1:].sum())} of a class",
                where=f"{of_classes}, against {at}",
                remedy="Draw its class there, or remove it from SegmentationObject",
            )
        box = (float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1))
        objects.append(Object(box, label, False, float(len(rows)), rle))
    return objects


def _mask(root: Path, kind: str, name: str) -> Path:
    return root / f"Segmentation{kind}" / f"{name}.png"


def _values(path: Path, image: str, size: tuple[int, int]) -> np.ndarray:
    values = read_mask(str(path))
    if values.shape != size:
        raise DataError(
            f"the mask is {values.shape[0]} x {values.shape[1]} (height x width), its image {size[0]} x {size[1]} "
            f"({image})",
            where=str(path),
            remedy="Make a mask of its image's size, its EXIF orientation applied, or pair the right files",
        )
    return values
