"""Data sets for dense prediction, written to disk in the formats that the field's tools read.

    images/{split}/NAME                  photographs
    annotations/instances_{split}.json   COCO: boxes [x, y, width, height], areas, masks as uncompressed RLE
    masks/{split}/STEM.png               semantic masks, where there are any: grey, the class's index a pixel
    classes.txt                          one class a line, in the order of the indices; the first is "background"
    README.md                            what it is, made of what, under which licence

Splits are ``train``, ``val`` and ``test``. Indices in the masks are the category ids of the JSON, from 1 on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refold.errors import DataError

__all__ = ["BACKGROUND", "SPLITS", "AnnotatedImage", "DenseFolder", "Instance", "new_folder", "run_lengths"]

SPLITS = ("train", "val", "test")
BACKGROUND = "background"


class Instance(NamedTuple):
    """One object of an image.

    Attributes:
        label: category id, from 1 on.
        box: x, y, width and height in pixels, as COCO has them.
        area: pixels of the mask, or of the box where there is no mask.
        mask: uncompressed run-length encoding, ``{"size": [height, width], "counts": [...]}``; None is no mask.
    """

    label: int
    box: tuple[float, float, float, float]
    area: float
    mask: dict[str, Any] | None = None

    @classmethod
    def of_mask(cls, label: int, mask: np.ndarray) -> Instance:
        """The object whose visible pixels are ``mask``, (H, W) bool with at least one of them set."""
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        box = (x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1)
        return cls(label, box, int(mask.sum()), {"size": list(mask.shape), "counts": run_lengths(mask)})


class AnnotatedImage(NamedTuple):
    """An image's file name, below the folder of its split, its size in pixels, and what is on it."""

    file_name: str
    height: int
    width: int
    objects: Sequence[Instance]


@dataclass(frozen=True)
class DenseFolder:
    """A data set in the layout of this module.

    Attributes:
        root: its folder.
    """

    root: Path

    def images(self, split: str) -> Path:
        """The folder of the split's images."""
        return self.root / "images" / split

    def masks(self, split: str) -> Path:
        """The folder of the split's semantic masks; not there for data with boxes alone."""
        return self.root / "masks" / split

    def annotations(self, split: str) -> Path:
        """The split's COCO file."""
        return self.root / "annotations" / f"instances_{split}.json"

    @property
    def classes(self) -> list[str]:
        """The names by index; the first is the background."""
        return (self.root / "classes.txt").read_text(encoding="utf-8").splitlines()

    def write_annotations(self, split: str, classes: Sequence[str], images: Sequence[AnnotatedImage]) -> None:
        """Write the split's COCO file; ids count from 1 in the order given.

        Args:
            split: its name.
            classes: names of the categories 1, 2, ..., without the background.
            images: all of the split, those without an object too.
        """
        objects = [(number, one) for number, image in enumerate(images, start=1) for one in image.objects]
        content = {
            "images": [
                {"id": number, "file_name": image.file_name, "height": image.height, "width": image.width}
                for number, image in enumerate(images, start=1)
            ],
            "categories": [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
            "annotations": [
                {
                    "id": number,
                    "image_id": image,
                    "category_id": one.label,
                    "bbox": list(one.box),
                    "area": one.area,
                    "iscrowd": 0,
                    **({} if one.mask is None else {"segmentation": one.mask}),
                }
                for number, (image, one) in enumerate(objects, start=1)
            ],
        }
        path = self.annotations(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")

    def write_notes(self, classes: Sequence[str], readme: str) -> None:
        """Write ``classes.txt`` (``classes`` without the background) and ``README.md``."""
        (self.root / "classes.txt").write_text("\n".join([BACKGROUND, *classes]) + "\n", encoding="utf-8")
        (self.root / "README.md").write_text(readme.strip() + "\n", encoding="utf-8")


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask (H, W): of zeros and ones in turn, zeros first, down the columns."""
    flat = np.asarray(mask, bool).ravel(order="F")
    ends = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    runs = np.diff(ends).tolist()
    return [0, *runs] if flat[0] else runs


@contextmanager
def new_folder(path: Path) -> Iterator[DenseFolder]:
    """A folder that takes its place at ``path`` once the block is through, and vanishes if it fails.

    Raises:
        DataError: something is at ``path`` already, or nothing can be written there.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError("is there already", where=str(path), remedy="Remove it or name another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise DataError(f"the folder cannot be written ({error.strerror})", where=str(path)) from error
    with holder:
        folder = Path(holder.name, path.name)
        folder.mkdir()
        yield DenseFolder(folder)
        try:
            folder.replace(path)
        except OSError as error:  # another process has put something there meanwhile
            raise DataError(f"the folder cannot be put in place ({error.strerror})", where=str(path)) from error
