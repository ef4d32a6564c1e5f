"""What the grey values of a mask mean: classes, ignored pixels, and mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refold.errors import DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CITYSCAPES", "IGNORE", "VOC", "Labels", "read_class_names", "read_mask"]

#: Class index of pixels without a label.
IGNORE = 255
_MOST_CLASSES = IGNORE  # indices 0 to 254
_LOSSLESS = ("PNG", "TIFF", "BMP", "GIF", "PPM")

#: Names of the values 0 to 20 in Pascal VOC.
VOC = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
#: Value in ``*_labelIds.png`` -> name, of the 19 classes that count; the other values up to 33 are ignored.
CITYSCAPES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_CITYSCAPES_VALUES = 34


@dataclass(frozen=True)
class Labels:
    """Class names, and which value of a mask is which class.

    Attributes:
        classes: names in the order of the class indices.
        indices: value in the file -> class index, or :data:`IGNORE`. A value that is missing is a mistake.
    """

    classes: list[str]
    indices: Mapping[int, int]

    def __post_init__(self) -> None:
        if not 2 <= len(self.classes) <= _MOST_CLASSES:
            raise DataError(
                f"segmentation takes 2 to {_MOST_CLASSES} classes, not {len(self.classes)}",
                where="classes",
                remedy="Name them all in classes.txt, the background too if it is one; masks of two classes hold 0 "
                f"and 1, not 0 and {IGNORE}",
            )

    @classmethod
    def plain(cls, classes: list[str]) -> Labels:
        """Value k is class k; 255 is ignored."""
        return cls(classes, {k: k for k in range(len(classes))} | {IGNORE: IGNORE})

    @classmethod
    def reduced(cls, classes: list[str]) -> Labels:
        """Value 0 is ignored, value k is class k - 1, as in ADE20K (``reduce_zero_label``); 255 is ignored."""
        return cls(classes, {k + 1: k for k in range(len(classes))} | {0: IGNORE, IGNORE: IGNORE})

    @classmethod
    def cityscapes(cls) -> Labels:
        """The 19 evaluated classes of ``*_labelIds.png``."""
        ignored = dict.fromkeys((*range(_CITYSCAPES_VALUES), IGNORE), IGNORE)
        return cls(list(CITYSCAPES.values()), ignored | {value: k for k, value in enumerate(CITYSCAPES)})

    def encode(self, values: np.ndarray, path: str) -> np.ndarray:
        """Values (H, W) of a mask file -> class indices (H, W) uint8.

        Raises:
            DataError: a value that is no label; names the file, the value and how many pixels have it.
        """
        import numpy as np

        table = np.full(256, -1, dtype=np.int16)
        for value, index in self.indices.items():
            table[value] = index
        if values.min() >= 0 and values.max() < len(table):
            indices = table[values]
            if indices.min() >= 0:
                return indices.astype(np.uint8)
        found, counts = np.unique(values, return_counts=True)
        wrong, count = next(
            (v, n) for v, n in zip(found.tolist(), counts.tolist(), strict=True) if v not in self.indices
        )
        known = sorted(value for value, index in self.indices.items() if index != IGNORE)
        raise DataError(
            f"{count} pixels have the label {wrong}, beyond the {len(self.classes)} classes",
            where=path,
            remedy=f"Labels are {known[0]} to {known[-1]}, and {IGNORE} is ignored. Correct the mask or the list of "
            "classes (classes.txt)",
        )


def read_mask(path: str) -> np.ndarray:
    """The values (H, W) of a grey, bilevel or palette image, of a palette the indices; any integer type.

    Raises:
        DataError: the file is missing, broken, of a kind that loses values (JPEG), or has colours instead of labels.
    """
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path, formats=_LOSSLESS) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's parsers let through whatever they trip over
        first = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        remedy = f"Repair or remove it; masks are {', '.join(_LOSSLESS)} files"
        raise DataError(f"the mask cannot be decoded ({first})", where=path, remedy=remedy) from error
    if values.ndim != 2 or mode == "F":
        raise DataError(
            f"the mask is a {mode} image: colours, not labels",
            where=path,
            remedy="Save the class index of every pixel as a grey or palette PNG",
        )
    return values.astype(np.uint8) if values.dtype == bool else values


def read_class_names(path: Path) -> list[str]:
    """Names from a text file, one a line.

    Raises:
        DataError: the file is no text, or names a class twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as text ({error})", where=str(path)) from error
    names = [line for line in lines if line]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"names the class {twice!r} twice", where=str(path))
    return names
