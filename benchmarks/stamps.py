"""Cut-outs with an alpha channel from a Debian package, for the benchmarks.

The stamps of Tux Paint (package ``tuxpaint-stamps-default``, GPL-2: read where it is installed, never copied) are
photographs and drawings of objects. ``symbols``, which are letters and signs, are left out. So are the files Tux Paint
mirrored itself, SVG files (nothing here draws them), and images nearly equal to another of their category or to its
mirror image.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

STAMPS = Path("/usr/share/tuxpaint/stamps")
LICENCE = "GPL-2 (tuxpaint-stamps, Bill Kendrick and others)"
INSTALL = "apt-get install tuxpaint-stamps-default, or --stamps FOLDER"
SIDE, THUMBNAIL, SAME = 224, 32, 8.0  # pixels; mean difference of grey levels below which two images are one


def categories(folder: Path) -> dict[str, dict[Path, np.ndarray]]:
    """Category, such as ``animals/birds`` -> file -> (224, 224, 3) pixels on white, in the order of the names."""
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
