"""The data sets of the dense-prediction benchmarks, made once under ``runs/dense-data``.

    python benchmarks/dense_data.py [--stamps FOLDER]     # makes them, and prints what is in them

* composite: 1100 images of 224 px with boxes, instance masks and semantic masks: seven classes of Tux Paint's stamps
  (``stamps.py``) pasted on the photographs of the package ``mvtb-data`` that show none of them. The test split has
  stamps and places of its own.
* trees, nuclei: see ``refold.dense.packaged``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from refold.data.coco_files import SPLITS, DenseFolder
from refold.data.composite import compose
from refold.dense.packaged import packaged
from refold.errors import DataError
from stamps import INSTALL, LICENCE, STAMPS, categories

CACHE = Path(__file__).parent.parent / "runs" / "dense-data"
IMAGES, SIZE, SEED = (800, 100, 200), 224, 0
CLASSES = {
    "bird": "animals/birds",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "fruit": "food/fruit",
    "vegetable": "food/vegetables",
    "flower": "plants/flowers",
    "road sign": "town/roadsigns",
}
#: Photographs of mvtb-data, a list for each place: patterns of file names.
PLACES = [
    ["campus/**/*.png"],
    ["eiffel-?.png"],
    ["mosaic/aerialphoto.png", "mosaic/aerial-??.png"],
    *([f"{name}.png"] for name in ("58060", "arucoboard", "building2-3", "church", "lab-scene", "mosaic/aerial2-00?")),
    *([f"{name}.png"] for name in ("notre-dame", "parks", "road", "rocks2-l", "roof", "street", "tags", "walls-l")),
]


def composite(stamps: Path = STAMPS) -> DenseFolder:
    """The composite, made if it is not there yet: a minute.

    Raises:
        DataError: no stamps, or no photographs.
    """
    root = CACHE / f"composite-{SIZE}-{sum(IMAGES)}-{SEED}"
    if not root.is_dir():
        if not stamps.is_dir():
            raise DataError("there are no Tux Paint stamps", where=str(stamps), remedy=INSTALL)
        found = categories(stamps)
        cutouts = {name: [path for path in found[folder] if _is_cut_out(path)] for name, folder in CLASSES.items()}
        licence = f"stamps {LICENCE}; photographs MIT (mvtb-data, Peter Corke)"
        try:
            compose(cutouts, _photographs(), root, images=IMAGES, size=SIZE, seed=SEED, licence=licence)
        except DataError:
            if not root.is_dir():  # else another process was quicker
                raise
    return DenseFolder(root)


def trees() -> DenseFolder:
    return packaged("trees", CACHE)


def nuclei() -> DenseFolder:
    return packaged("nuclei", CACHE)


def _is_cut_out(path: Path) -> bool:
    with Image.open(path) as file:
        return file.has_transparency_data


def _photographs() -> list[list[Path]]:
    try:
        folder = Path(str(importlib.metadata.distribution("mvtb-data").locate_file("mvtbdata/images")))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError("the package 'mvtb-data' is not installed", remedy="Run: pip install mvtb-data") from error
    return [sorted(path for pattern in place for path in folder.glob(pattern)) for place in PLACES]


def rows(folder: DenseFolder) -> Iterator[tuple[str, int, int, str, str]]:
    """Of each split: name, images, objects, sizes of the images, and how many objects of each class."""
    for split in SPLITS:
        content = json.loads(folder.annotations(split).read_text())
        names = {one["id"]: one["name"] for one in content["categories"]}
        labels = [names[one["category_id"]] for one in content["annotations"]]
        sizes = sorted({(one["height"], one["width"]) for one in content["images"]})
        shown = f"{sizes[0][0]} x {sizes[0][1]}" + (f" to {sizes[-1][0]} x {sizes[-1][1]}" if len(sizes) > 1 else "")
        classes = ", ".join(f"{labels.count(name)} {name}" for name in names.values())
        yield split, len(content["images"]), len(labels), shown, classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of Tux Paint's stamps")
    stamps = parser.parse_args().stamps
    print("| data | split | images | objects | pixels | classes |\n|---|---|---|---|---|---|")
    for name, make in {"composite": lambda: composite(stamps), "trees": trees, "nuclei": nuclei}.items():
        try:
            for row in rows(make()):
                print("|", " | ".join(map(str, (name, *row))), "|")
        except DataError as error:
            print(f"| {name} | skipped: {error} | | | | |")


if __name__ == "__main__":
    main()
