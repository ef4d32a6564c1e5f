"""``shapes``: drawn pictures with discs, squares and triangles on noise, to try dense tasks without any data.

Each object has a class, a box and a mask; nearer ones cover others. Pixels are a function of the seed alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from refold.data.coco_files import SPLITS, AnnotatedImage, DenseFolder, Instance, new_folder
from refold.errors import DataError

__all__ = ["CLASSES", "shapes"]

CLASSES = ("disc", "square", "triangle")
COUNTS = (24, 8, 8)  # images of training, validation and test
_SIDE = 96
_OBJECTS = (2, 4)
_LEAST = 40  # pixels of an object that must be in sight


def shapes(
    cache: str | Path, *, counts: tuple[int, int, int] = COUNTS, side: int = _SIDE, seed: int = 0
) -> DenseFolder:
    """The data set in the layout of :mod:`refold.data.coco_files`, below ``cache``; written by the first call.

    Args:
        cache: folder for the data set's own; it may not exist yet.
        counts: images of training, validation and test.
        side: of the images in pixels, 32 or more.
        seed: of everything drawn.

    Raises:
        DataError: a number out of range, or a cache that cannot be written.
    """
    if side < 32 or min(counts) < 1:
        raise DataError(f"{counts} images of {side} pixels: must be 1 or more, of 32 or more", where="shapes")
    root = Path(cache, f"shapes-{side}-{'-'.join(map(str, counts))}-{seed}")
    if not root.is_dir():
        try:
            _write(root, counts, side, seed)
        except DataError:
            if not root.is_dir():  # else another process was quicker
                raise
    return DenseFolder(root)


def _write(root: Path, counts: tuple[int, int, int], side: int, seed: int) -> None:
    from PIL import Image

    rng = np.random.default_rng(seed)
    with new_folder(root) as folder:
        for split, count in zip(SPLITS, counts, strict=True):
            folder.images(split).mkdir(parents=True)
            folder.masks(split).mkdir(parents=True)
            annotated = []
            for number in range(count):
                name = f"{split}_{number:03}.png"
                pixels, mask, objects = _draw(rng, side)
                Image.fromarray(pixels).save(folder.images(split) / name)
                Image.fromarray(mask).save(folder.masks(split) / name)
                annotated.append(AnnotatedImage(name, side, side, objects))
            folder.write_annotations(split, CLASSES, annotated)
        folder.write_notes(CLASSES, "# Shapes\n\nDrawn by refold (`refold.dense.shapes`).\n\nLicence: CC0.")


def _draw(rng: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray, list[Instance]]:
    """Pixels (side, side, 3), classes (side, side) with 0 for the background, and the objects in sight."""
    pixels = rng.normal(110, 25, (side, side, 1)) + rng.normal(0, 15, (1, 1, 3))
    owner = np.zeros((side, side), int)
    labels = rng.integers(1, len(CLASSES) + 1, rng.integers(_OBJECTS[0], _OBJECTS[1] + 1)).tolist()
    for number, label in enumerate(labels, start=1):
        radius = rng.uniform(0.12, 0.2) * side
        x, y = rng.uniform(0.8 * radius, side - 0.8 * radius, 2)
        inside = _shape(label, side, x, y, radius, rng.uniform(0, 2 * math.pi))
        owner[inside] = number
        pixels = np.where(inside[..., None], rng.uniform(20, 235, 3) + rng.normal(0, 12, (side, side, 1)), pixels)
    classes = np.array([0, *labels], np.uint8)[owner]
    seen = [(label, owner == number) for number, label in enumerate(labels, start=1)]
    objects = [Instance.of_mask(label, mask) for label, mask in seen if mask.sum() >= _LEAST]
    return pixels.clip(0, 255).astype(np.uint8), classes, objects


def _shape(label: int, side: int, x: float, y: float, radius: float, turn: float) -> np.ndarray:
    """Pixels (side, side) inside a disc, or a polygon of 4 or 3 corners, of this radius around x, y."""
    rows, columns = np.mgrid[:side, :side] + 0.5
    if CLASSES[label - 1] == "disc":
        return (columns - x) ** 2 + (rows - y) ** 2 < (0.85 * radius) ** 2
    corners = 4 if CLASSES[label - 1] == "square" else 3
    inside = np.ones((side, side), bool)
    for k in range(corners):  # on the inner side of every edge
        angle = turn + 2 * math.pi * k / corners
        distance = (columns - x) * math.cos(angle) + (rows - y) * math.sin(angle)
        inside &= distance < radius * math.cos(math.pi / corners)
    return inside
