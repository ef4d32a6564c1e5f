"""A set of images with boxes, classes and perhaps masks of the objects on them; and what makes a box usable."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from refold.data.decoding import decode, read_size
from refold.data.parallel import for_each
from refold.detection.masks import Rle, area_of, decode_masks
from refold.errors import DataError

__all__ = ["BoxSet", "Object", "Tally", "check_sizes", "finite_box"]

_LEAST_SIDE = 1e-2  # pixels; below, float32 at the far end of a large image may see no side at all
_TOLERANCE = 1.0  # pixels over the edge that are put down to rounding


class Object(NamedTuple):
    """One annotated object.

    Attributes:
        box: x1, y1, x2, y2 in pixels; x2 and y2 are where the object ends, so that x2 - x1 is its width.
        label: class, from 1.
        ignored: neither to be found nor to be missed: a crowd region in COCO, a difficult object in VOC. Left out of
            training; detections on it do not count in evaluation.
        area: pixels, which COCO calls small, medium or large by: of the mask where there is one.
        rle: its mask.
    """

    box: tuple[float, float, float, float]
    label: int
    ignored: bool
    area: float
    rle: Rle | None = None


@dataclass
class Tally:
    """Makes boxes usable, and counts what that took.

    Args:
        source: the file or folder, for the warning.
    """

    source: str
    counts: dict[str, int] = field(default_factory=dict)

    def usable(self, one: Object, height: int, width: int) -> Object | None:
        """``one`` with its box clipped to the image; None for one without area, or wholly outside."""
        x1, y1, x2, y2 = one.box
        inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
        if min(x2 - x1, y2 - y1) < _LEAST_SIDE or (one.rle is not None and not area_of(one.rle)):
            return self._count("without area: dropped")
        if min(inside[2] - inside[0], inside[3] - inside[1]) < _LEAST_SIDE:
            return self._count("outside their image: dropped")
        if max(abs(a - b) for a, b in zip(one.box, inside, strict=True)) > _TOLERANCE:
            self._count("partly outside their image: clipped")
        return one._replace(box=inside)

    def warn(self) -> None:
        """One warning about all that was counted."""
        if self.counts:
            found = ", ".join(f"{count} {what}" for what, count in self.counts.items())
            warnings.warn(f"{self.source}: boxes {found}", UserWarning, stacklevel=3)

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


class BoxSet:
    """N images and their objects.

    Args:
        paths: N image files.
        sizes: (height, width) of each.
        objects: of each, usable ones only (:class:`Tally`); none is a negative image.
        classes: names of the K classes, of labels 1 to K.
        category_ids: COCO's id of each class; None is 1 to K.
        image_ids: COCO's id of each image; None is 1 to N.
        source: where they come from, for messages.

    Attributes:
        paths, sizes, objects, classes, category_ids, image_ids, source: as above.
        has_masks: every object has a mask.

    Raises:
        DataError: arguments that contradict each other.
    """

    def __init__(
        self,
        paths: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[Sequence[Object]],
        *,
        classes: Sequence[str],
        category_ids: Sequence[int] | None = None,
        image_ids: Sequence[int] | None = None,
        source: str = "",
    ) -> None:
        self.paths, self.sizes, self.objects = list(paths), list(sizes), [list(some) for some in objects]
        self.classes, self.source = list(classes), source
        self.category_ids = list(range(1, len(classes) + 1)) if category_ids is None else list(category_ids)
        self.image_ids = list(range(1, len(paths) + 1)) if image_ids is None else list(image_ids)
        lengths = {len(part) for part in (self.paths, self.sizes, self.objects, self.image_ids)}
        if len(lengths) > 1 or len(self.classes) != len(self.category_ids):
            raise DataError("paths, sizes, objects and ids differ in number", where=source or "BoxSet")
        every = [one for some in self.objects for one in some]
        if any(not 1 <= one.label <= len(self.classes) for one in every):
            raise DataError(f"a label is not between 1 and {len(self.classes)}", where=source or "BoxSet")
        self.has_masks = bool(every) and all(one.rle is not None for one in every)

    @classmethod
    def unlabelled(cls, paths: Sequence[str], classes: Sequence[str]) -> BoxSet:
        """Images to find objects of ``classes`` on, with no objects known.

        Raises:
            DataError: a file is missing or no image.
        """
        sizes = check_sizes(paths, [None] * len(paths), list(paths))
        return cls(paths, sizes, [[] for _ in paths], classes=classes)

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"BoxSet({len(self)} images, {self.count()} objects, classes={self.classes})"

    def count(self) -> int:
        """Objects to learn from: all but the ignored."""
        return sum(not one.ignored for some in self.objects for one in some)

    def presence(self) -> Tensor:
        """(N, K) float32: whether an object of the class can be learned from the image; splits are stratified by it."""
        result = torch.zeros(len(self), len(self.classes))
        for row, some in enumerate(self.objects):
            result[row, [one.label - 1 for one in some if not one.ignored]] = 1.0
        return result

    def subset(self, indices: Iterable[int] | Tensor) -> BoxSet:
        """The images at ``indices``, in that order."""
        chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        part = copy.copy(self)
        for name in ("paths", "sizes", "objects", "image_ids"):
            values = getattr(self, name)
            setattr(part, name, [values[i] for i in chosen])
        return part

    def read(self, index: int) -> Tensor:
        """The image: (3, height, width) uint8, RGB.

        Raises:
            DataError: it cannot be decoded, or is no longer of its size.
        """
        import numpy as np

        pixels = torch.from_numpy(np.array(decode(self.paths[index], 3)))
        if tuple(pixels.shape[:2]) != tuple(self.sizes[index]):
            raise DataError(_other_size(self.sizes[index], tuple(pixels.shape[:2])), where=self.paths[index])
        return pixels.permute(2, 0, 1).contiguous()

    def target(self, index: int) -> dict[str, Tensor]:
        """What torchvision's detectors learn from: all objects of the image but the ignored.

        Returns:
            ``boxes`` (n, 4) float32, x1 y1 x2 y2; ``labels`` (n,) int64; ``masks`` (n, height, width) uint8, where
            :attr:`has_masks`; ``image_id`` int64, the index, not COCO's id.
        """
        kept = [one for one in self.objects[index] if not one.ignored]
        target = {
            "boxes": torch.tensor([one.box for one in kept], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([one.label for one in kept], dtype=torch.int64),
            "image_id": torch.tensor(index),
        }
        if self.has_masks:
            target["masks"] = decode_masks([one.rle for one in kept if one.rle is not None], *self.sizes[index])
        return target


def check_sizes(
    paths: Sequence[str], stated: Sequence[tuple[int, int] | None], places: Sequence[str]
) -> list[tuple[int, int]]:
    """(height, width) of each image, from the files' headers.

    Args:
        paths: image files.
        stated: what the annotations say; None where they say nothing.
        places: of the annotations, for messages.

    Raises:
        DataError: a file is missing, is no image, or has another size than stated.
    """
    sizes = [(0, 0)] * len(paths)

    def check(index: int) -> None:
        size, said = read_size(paths[index]), stated[index]
        if said is not None and tuple(said) != size:
            raise DataError(
                _other_size(said, size),
                where=f"{places[index]}, image {paths[index]!r}",
                remedy="Annotations and image do not belong together, or the image has an EXIF orientation that the "
                "annotations ignore: correct one of them",
            )
        sizes[index] = size

    for_each(check, len(paths), "checking images")
    return sizes


def finite_box(values: Iterable[object]) -> tuple[float, float, float, float]:
    """Four finite numbers.

    Raises:
        ValueError: there are others.
    """
    numbers = [float(v) for v in values]  # type: ignore[arg-type]
    if len(numbers) != 4 or not all(math.isfinite(v) for v in numbers):
        raise ValueError("a box is not four finite numbers")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _other_size(stated: tuple[int, ...], actual: tuple[int, ...]) -> str:
    return f"the annotations say {stated[0]} x {stated[1]} (height x width), the file is {actual[0]} x {actual[1]}"
