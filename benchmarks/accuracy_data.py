"""The data sets of the accuracy benchmark: two of inspection, and few-shot cut-outs from a Debian package.

``cut-outs``: the stamps of Tux Paint (package ``tuxpaint-stamps-default``, GPL-2: read where it is installed, never
copied): photographs and drawings of objects with an alpha channel. Each is cut at its outline, put in the middle of
a plain white square and shown at 224 px. The class is the category folder, such as ``animals/birds``, folders in
it included; ``symbols``, which are letters and signs, are left out. So are the files Tux Paint mirrored itself, SVG
files (nothing here draws them), and images nearly equal to another of their class or to its mirror image. Of each
category with enough images 8 are for training and 4 for validation, drawn with seed 0; the rest is test.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from refold import data

STAMPS = Path("/usr/share/tuxpaint/stamps")
MISSING = "cut-outs skipped: no Tux Paint stamps (apt-get install tuxpaint-stamps-default, or --stamps FOLDER)"
INSPECTION = {"elpv": (400, 200, 2024), "textile": (400, 200, 1400)}
#: As many images pass through training in each: 3200 to 4000.
EPOCHS = {"elpv": 8, "textile": 8, "cut-outs": 50}
SHOTS, VALIDATION, LEAST = 8, 4, 16
SIDE, THUMBNAIL, SAME = 224, 32, 8.0  # pixels; mean difference of grey levels below which two images are one


@cache
def load(dataset: str, stamps: Path = STAMPS) -> data.Splits:
    if dataset in INSPECTION:
        return data.load_dataset(f"packaged/{dataset}", fractions=INSPECTION[dataset])
    return cut_outs(stamps)


def available(dataset: str, stamps: Path) -> bool:
    return dataset in INSPECTION or stamps.is_dir()


def cut_outs(folder: Path) -> data.Splits:
    """Few-shot splits of the stamps in ``folder``; see the module's docstring."""
    found = {name: images for name, images in _categories(folder).items() if len(images) >= LEAST}
    classes = sorted(found)
    paths = [path for name in classes for path in found[name]]
    pixels = np.stack([found[name][path] for name in classes for path in found[name]])
    targets = torch.tensor([k for k, name in enumerate(classes) for _ in found[name]])
    licence = "GPL-2 (tuxpaint-stamps, Bill Kendrick and others)"
    whole = data.ImageSet(paths, targets, classes=classes, licence=licence, decoded=pixels)
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for k in range(len(classes)):
        rows = (targets == k).nonzero().flatten()
        drawn = rows[torch.randperm(len(rows), generator=generator)].tolist()
        ends = (0, SHOTS, SHOTS + VALIDATION, len(drawn))
        for part, start, end in zip(parts, ends, ends[1:], strict=False):
            part += drawn[start:end]
    train, val, test = (whole.subset(sorted(part)) for part in parts)
    return data.Splits(train, val, test, classes, "classify")


def _categories(folder: Path) -> dict[str, dict[Path, np.ndarray]]:
    """Category -> file -> (224, 224, 3) pixels, in the order of the names."""
    found: dict[str, dict[Path, np.ndarray]] = defaultdict(dict)
    thumbnails: dict[str, list[np.ndarray]] = defaultdict(list)
    for path in sorted(folder.rglob("*.png")):
        places = path.relative_to(folder).parts
        if len(places) < 3 or places[0] == "symbols" or path.stem.endswith(("_mirror", "_flip")):
            continue
        category = "/".join(places[:2])
        image = paste(path)
        small = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), dtype=float)
        if any(np.abs(twin - small).mean() < SAME for seen in thumbnails[category] for twin in (seen, seen[:, ::-1])):
            continue
        thumbnails[category].append(small)
        found[category][path] = np.asarray(image)
    return found


def paste(path: Path) -> Image.Image:
    """A cut-out in the middle of a white square, ``SIDE`` pixels wide."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
