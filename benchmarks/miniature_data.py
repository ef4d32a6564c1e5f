"""The data of the miniature tables, written once as image folders under ``runs/miniature-data``.

    python benchmarks/miniature_data.py [--stamps FOLDER] [--emoji FOLDER]     # makes them, and prints what is in them

* cut-outs: Tux Paint's stamps (``stamps.py``) of the categories that have enough; 16 of each are to train on, the rest
  is test.
* emoji: the same pictures as two vendors draw them, 64 px on white, from the npm packages ``emoji-datasource-google``
  and ``emoji-datasource-twitter`` (``npm pack`` both and unpack each to FOLDER/google and FOLDER/twitter). Classes are
  the categories. What one vendor's training images show is in neither vendor's test images.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from refold.errors import DataError
from stamps import INSTALL, STAMPS, categories

CACHE = Path(__file__).resolve().parent.parent / "runs" / "miniature-data"
EMOJI = CACHE / "packages"
VENDORS = ("google", "twitter")
SHOTS, LEAST = 16, 25  # training images of a class of cut-outs; images that a class must have
DRAWN, FEWEST = 40, 80  # training images of a class of emoji; pictures that a class must have

Picture = tuple[str, str, Image.Image]  # split, class and picture


def cut_outs(stamps: Path = STAMPS) -> Path:
    """The cut-outs, a folder per split and class.

    Raises:
        DataError: no stamps.
    """
    if not (CACHE / "cut-outs").is_dir():
        if not stamps.is_dir():
            raise DataError("there are no Tux Paint stamps", where=str(stamps), remedy=INSTALL)
        found = {name: images for name, images in categories(stamps).items() if len(images) >= LEAST}
        pictures = []
        for name, images in sorted(found.items()):
            order = random.Random(f"0/{name}").sample(sorted(images), len(images))
            for number, path in enumerate(order):
                split = "train" if number < SHOTS else "test"
                pictures.append((split, name.replace("/", "-"), Image.fromarray(images[path])))
        _write(CACHE / "cut-outs", pictures)
    return CACHE / "cut-outs"


def emoji(vendor: str, packages: Path = EMOJI) -> Path:
    """A vendor's emoji, a folder per split and class.

    Raises:
        DataError: the packages are not there.
    """
    root = CACHE / f"emoji-{vendor}"
    if not root.is_dir():
        package = packages / vendor / "package"
        if not (package / "emoji.json").is_file():
            remedy = f"Run: npm pack emoji-datasource-{vendor}@16.0.0, and unpack it to {packages / vendor}"
            raise DataError(f"there is no package emoji-datasource-{vendor}", where=str(packages), remedy=remedy)
        listed = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
        known = [one for one in listed if all(one[f"has_img_{vendor}"] for vendor in VENDORS)]
        counts = Counter(one["category"] for one in known)
        pictures = []
        for name in sorted(name for name, count in counts.items() if count >= FEWEST):
            mine = sorted((one for one in known if one["category"] == name), key=lambda one: one["unified"])
            random.Random(f"0/{name}").shuffle(mine)
            for number, one in enumerate(mine):
                split = "train" if number < DRAWN else "test"
                picture = Image.open(package / "img" / vendor / "64" / one["image"]).convert("RGBA")
                white = Image.new("RGBA", picture.size, "white")
                white.alpha_composite(picture)
                pictures.append((split, name.replace(" & ", "-and-").replace(" ", "-"), white.convert("RGB")))
        _write(root, pictures)
    return root


def _write(root: Path, pictures: Iterable[Picture]) -> None:
    """The folder, whole or not at all."""
    unfinished = root.with_name(f"{root.name}.{os.getpid()}")
    for number, (split, name, picture) in enumerate(pictures):
        folder = unfinished / split / name
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number:04}.png")
    unfinished.rename(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="folder of Tux Paint's stamps")
    parser.add_argument("--emoji", type=Path, default=EMOJI, help="folder of the two unpacked packages")
    arguments = parser.parse_args()
    for root in (cut_outs(arguments.stamps), *(emoji(vendor, arguments.emoji) for vendor in VENDORS)):
        for split in ("train", "test"):
            classes = {folder.name: len(list(folder.iterdir())) for folder in sorted((root / split).iterdir())}
            print(f"{root.name} {split}: {sum(classes.values())} images; {classes}")


if __name__ == "__main__":
    main()
