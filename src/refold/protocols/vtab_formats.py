"""Sets of VTAB-1k that torchvision does not read as VTAB defines them: KITTI, CLEVR, dSprites, small NORB and others.

Labels and splits are those of VTAB's code (github.com/google-research/task_adaptation) and of the TFDS versions that it
names. Each function takes the folder that holds the downloads and returns the set's own splits.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from refold.data.folders import find_images
from refold.errors import DataError

__all__ = ["Part", "class_folders", "clevr", "dmlab", "dsprites", "kitti", "listed", "retinopathy", "smallnorb"]

_KITTI_VEHICLES, _KITTI_METRES, _KITTI_NONE = ("Car", "Van", "Truck"), (8.0, 20.0, 999.0), 1000.0
_CLEVR_DEPTHS = (8.0, 8.5, 9.0, 9.5, 10.0)
_NORB = {"train": "5x46789x9x18x6x2x96x96-training", "test": "5x01235x9x18x6x2x96x96-testing"}
_NORB_TYPES = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
_EYE_RADIUS, _EYE_KEPT, _EYE_SIGMA = 300, 270, 10.0  # pixels


@dataclass(frozen=True)
class Part:
    """One split of an original set.

    Attributes:
        count: of images.
        labels: of image k, one for each task of the set.
        picture: image k: a file that stays where it is, pixels, or the bytes of an encoded file.
        suffix: of the files to write; empty where pictures are files.
    """

    count: int
    labels: Callable[[int], tuple[int, ...]]
    picture: Callable[[int], Path | Image.Image | bytes]
    suffix: str = ""


def listed(rows: Sequence[tuple[Path, tuple[int, ...]]]) -> Part:
    """Files that stay where they are, with their labels."""
    return Part(len(rows), lambda k: rows[k][1], lambda k: rows[k][0])


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Images by the name of the folder of their class, both in order.

    Raises:
        DataError: a class without images.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {name: [Path(path) for path in find_images(folder / name)] for name in names}
    for name, images in found.items():
        if not images:
            raise DataError("the class folder holds no image", where=str(folder / name))
    return found


def kitti(root: Path, seed: int) -> dict[str, Part]:
    """Distance of the nearest car, van or truck: up to 8 m, up to 20 m, further, none.

    The labelled frames are split by drive, as TFDS 3.1.0 does with NumPy's legacy generator and seed 123: a tenth of
    the drives to test, a tenth to validate. Which frame is of which drive is in the object devkit's ``mapping/``.
    """
    from torchvision.datasets import Kitti

    data = Kitti(str(root), train=True)
    by_frame = {int(Path(path).stem): k for k, path in enumerate(data.images)}
    drives: dict[str, list[int]] = {}
    for frame, drive in enumerate(_kitti_drives(root / "Kitti" / "raw")):
        drives.setdefault(drive, []).append(by_frame[frame])
    legacy, tenth = np.random.RandomState(123), max(1, len(drives) // 10)
    test = set(legacy.choice(sorted(drives), tenth, replace=False).tolist())
    val = set(legacy.choice(sorted(set(drives) - test), tenth, replace=False).tolist())

    def row(k: int) -> tuple[Path, tuple[int, ...]]:
        image, objects = data[k]
        image.close()
        depths = [one["location"][2] for one in objects if one["type"] in _KITTI_VEHICLES]
        return Path(data.images[k]), (_above(min([*depths, _KITTI_NONE]), _KITTI_METRES),)

    def part(wanted: set[str]) -> Part:
        chosen = sorted(k for drive in wanted for k in drives[drive])
        return listed(sorted(row(k) for k in chosen))

    return {"train": part(set(drives) - test - val), "val": part(val), "test": part(test)}


def _kitti_drives(raw: Path) -> list[str]:
    """The drive of each frame."""
    folder = next((found for found in (raw / "mapping", raw / "devkit_object" / "mapping") if found.is_dir()), None)
    if folder is None:
        raise DataError(
            "is not there: it says which frames are of one drive, which must not be on both sides",
            where=str(raw / "mapping"),
            remedy=f"Unpack devkit_object.zip of the object benchmark into {raw}",
        )
    lines = (folder / "train_mapping.txt").read_text(encoding="utf-8").splitlines()
    numbers = (folder / "train_rand.txt").read_text(encoding="utf-8").split(",")
    return [lines[int(number) - 1].split()[1] for number in numbers]


def clevr(root: Path, seed: int) -> dict[str, Part]:
    """Objects in the scene, 3 to 10; and the depth of the nearest, cut at 8, 8.5, 9, 9.5 and 10.

    Tested on the official validation images: the test images have no scenes.
    """
    base = root / "clevr" / "CLEVR_v1.0"

    def part(split: str) -> Part:
        text = (base / "scenes" / f"CLEVR_{split}_scenes.json").read_text(encoding="utf-8")
        rows = []
        for scene in json.loads(text)["scenes"]:
            nearest = min(one["pixel_coords"][2] for one in scene["objects"])
            labels = len(scene["objects"]) - 3, _above(nearest, _CLEVR_DEPTHS)
            rows.append((base / "images" / split / scene["image_filename"], labels))
        return listed(rows)

    return {"train": part("train"), "test": part("val")}


def dsprites(root: Path, seed: int) -> dict[str, Part]:
    """Position along x, 32 steps in 16 bins; and orientation, 40 steps in 16 bins, ``floor(step / 2.5)``.

    Ones become white. The 737,280 images take 3 GB of memory.
    """
    with np.load(root / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz") as file:
        images, steps = file["imgs"], file["latents_classes"]
    x, turn = steps[:, 4] // 2, np.floor(steps[:, 3] / 2.5).astype(int)
    return {
        "all": Part(
            len(images),
            lambda k: (int(x[k]), int(turn[k])),
            lambda k: Image.fromarray(images[k] * np.uint8(255)),
            ".png",
        )
    }


def smallnorb(root: Path, seed: int) -> dict[str, Part]:
    """Azimuth in 18 steps and elevation in 9, from the picture of the first camera.

    Half of the official test images validate and half test. VTAB takes TFDS's order for that, ours is drawn.
    """

    def part(name: str) -> Part:
        images, info = (_norb_matrix(root / "smallnorb", f"smallnorb-{name}-{kind}.mat") for kind in ("dat", "info"))
        return Part(
            len(images),
            lambda k: (int(info[k, 2]) // 2, int(info[k, 1])),
            lambda k: Image.fromarray(images[k, 0]),
            ".png",
        )

    return {split: part(name) for split, name in _NORB.items()}


def _norb_matrix(folder: Path, name: str) -> np.ndarray:
    path = folder / name
    content = path.read_bytes() if path.is_file() else gzip.decompress((folder / f"{name}.gz").read_bytes())
    magic, dimensions = np.frombuffer(content, "<i4", 2).tolist()
    if magic not in _NORB_TYPES:
        raise DataError(f"begins with {magic:#x}, which is no matrix of bytes or integers", where=str(path))
    shape = np.frombuffer(content, "<i4", dimensions, offset=8).tolist()
    # There are three sizes even where there are fewer dimensions.
    return np.frombuffer(content, _NORB_TYPES[magic], offset=8 + 4 * max(3, dimensions)).reshape(shape)


def retinopathy(root: Path, seed: int) -> dict[str, Part]:
    """Grade 0 to 4; Kaggle's public test images validate and its private ones test.

    Images become those of the competition's winner, TFDS's ``btgraham-300``: the eye scaled to a radius of 300 pixels,
    its local average moved to gray, a tenth of the radius cut off. Resizing is Pillow's, not OpenCV's.
    """
    base = root / "diabetic-retinopathy-detection"

    def part(folder: str, file: str, usage: str | None) -> Part:
        with (base / file).open(newline="", encoding="utf-8") as lines:
            rows = [
                (base / folder / f"{row['image']}.jpeg", int(row["level"]))
                for row in csv.DictReader(lines)
                if usage is None or row["Usage"] == usage
            ]
        return Part(len(rows), lambda k: (rows[k][1],), lambda k: _eye(rows[k][0]), ".jpg")

    return {
        "train": part("train", "trainLabels.csv", None),
        "val": part("test", "retinopathy_solution.csv", "Public"),
        "test": part("test", "retinopathy_solution.csv", "Private"),
    }


def _eye(path: Path) -> bytes:
    """A retina as JPEG, at most 540 pixels high and wide."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    middle = np.asarray(picture)[picture.height // 2].sum(axis=1)
    radius = (middle > middle.mean() / 10).sum() / 2
    scale = _EYE_RADIUS / (radius if radius >= 1 else picture.height / 2)  # of black images the height, as TFDS
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    pixels = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1).float()
    pixels = (4 * (pixels - _blurred(pixels)) + 128).clamp(0, 255)
    x, y = (torch.arange(length) - length // 2 for length in size)
    outside = x[None, :] ** 2 + y[:, None] ** 2 > _EYE_KEPT**2
    pixels[:, outside] = 128
    pixels = pixels[:, (y >= -_EYE_KEPT) & (y < _EYE_KEPT)][:, :, (x >= -_EYE_KEPT) & (x < _EYE_KEPT)]
    kept = io.BytesIO()
    Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy()).save(kept, "JPEG", quality=72)
    return kept.getvalue()


def _blurred(pixels: torch.Tensor) -> torch.Tensor:
    """(3, H, W) through a Gaussian of three deviations to each side, along one axis after the other."""
    reach = round(3 * _EYE_SIGMA)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / _EYE_SIGMA) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    found = pixels[:, None]
    for _ in range(2):
        mode = "reflect" if found.shape[-1] > reach else "replicate"
        found = functional.conv2d(functional.pad(found, (reach, reach, 0, 0), mode=mode), kernel).transpose(2, 3)
    return found[:, 0]


def dmlab(root: Path, seed: int) -> dict[str, Part]:
    """The six classes of the records that VTAB's authors publish, TFDS's ``dmlab`` before it is prepared."""

    def part(split: str) -> Part:
        files = sorted((root / "dmlab").glob(f"dmlab-{split}.tfrecord*"))
        records = [record for path in files for record in _records(path)]

        def feature(k: int, name: str) -> int | bytes:
            path, start, length = records[k]
            with path.open("rb") as file:
                file.seek(start)
                return _features(file.read(length))[name]

        def image(k: int) -> bytes:
            found = feature(k, "image")
            assert isinstance(found, bytes)
            return found

        return Part(len(records), lambda k: (int(feature(k, "label")),), image, ".jpg")

    return {"train": part("train"), "val": part("validation"), "test": part("test")}


def _records(path: Path) -> Iterator[tuple[Path, int, int]]:
    """Where each record of a TFRecord file begins, and its bytes: 8 for the length, 4 of checksum, data, 4 again."""
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place < size:
            length = int.from_bytes(file.read(12)[:8], "little")
            place += 12
            if place + length + 4 > size:
                raise DataError("ends in the middle of a record", where=str(path), remedy="Download it again")
            yield path, place, length
            place += length + 4
            file.seek(place)


def _features(example: bytes) -> dict[str, int | bytes]:
    """The single values of a ``tf.train.Example``, by name."""
    found: dict[str, int | bytes] = {}
    for entry in _fields(_field(example, 1)):
        assert isinstance(entry[1], bytes)
        name, feature = _field(entry[1], 1).decode(), _field(entry[1], 2)
        kind, values = next(_fields(feature))  # 1: bytes, 2: floats, 3: integers
        assert isinstance(values, bytes)
        value = next(_fields(values))[1]
        found[name] = _varint(value, 0)[0] if kind == 3 and isinstance(value, bytes) else value
    return found


def _field(message: bytes, number: int) -> bytes:
    return next(value for one, value in _fields(message) if one == number and isinstance(value, bytes))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protocol buffer's fields."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7 == 0:
            value, place = _varint(message, place)
        else:
            length, place = _varint(message, place) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], place)
            value, place = message[place : place + length], place + length
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
        if byte < 128:
            return value, place


def _above(value: float, limits: Sequence[float]) -> int:
    """How many of the limits lie below it."""
    return sum(value > limit for limit in limits)
