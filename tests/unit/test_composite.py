"""Composites: what the pixels show is what the labels say, and no split shows what another does.

The parts have one colour each, so that every pixel tells which file it is from.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_masks
from PIL import Image, ImageDraw

from refold import DataError
from refold.data.coco_files import SPLITS, run_lengths
from refold.data.composite import compose

CLASSES = ("disc", "square")
SIDE = 60
COUNTS = (12, 4, 6)


def colours(count: int, blue: int) -> list[tuple[int, int, int]]:
    """Far apart in red and green: JPEG moves a flat colour by one or two."""
    return [(20 + 44 * (k % 5), 20 + 44 * (k // 5), blue) for k in range(count)]


def cut_out(path: Path, colour: tuple[int, int, int], shape: str, side: int = SIDE) -> Path:
    image = Image.new("RGBA", (side + 20, side + 20), (255, 0, 255, 0))  # magenta, which nobody must see
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "disc" else draw.rectangle)((10, 10, 9 + side, 9 + side), fill=(*colour, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


@pytest.fixture
def cutouts(tmp_path):
    """Five cut-outs a class; blue below 60."""
    shades = iter(colours(10, 30))
    for name in CLASSES:
        for k in range(5):
            cut_out(tmp_path / "cut" / name / f"{k}.png", next(shades), name)
    return tmp_path / "cut"


@pytest.fixture
def photographs(tmp_path):
    """Six of one colour each; blue above 200."""
    paths = [tmp_path / "photos" / f"{k}.png" for k in range(6)]
    paths[0].parent.mkdir()
    for path, colour in zip(paths, colours(6, 220), strict=True):
        Image.new("RGB", (90, 120), colour).save(path)
    return paths


@pytest.fixture
def made(cutouts, photographs, tmp_path):
    return compose(cutouts, photographs, tmp_path / "out", images=COUNTS, size=96, jitter=0.0, licence="CC0")


def scenes(folder, split):
    """Of each image: pixels, semantic mask, and (label, decoded mask, annotation) of each object."""
    content = json.loads(folder.annotations(split).read_text())
    for image in content["images"]:
        objects = []
        for one in content["annotations"]:
            if one["image_id"] == image["id"]:
                rle = coco_masks.frPyObjects(one["segmentation"], image["height"], image["width"])
                objects.append((one["category_id"], coco_masks.decode(rle).astype(bool), {**one, "rle": rle}))
        with Image.open(folder.images(split) / image["file_name"]) as file:
            pixels = np.asarray(file).astype(int)
        with Image.open(folder.masks(split) / f"{Path(image['file_name']).stem}.png") as file:
            assert file.mode == "L"
            yield pixels, np.asarray(file), objects


def inner(mask: np.ndarray, by: int = 3) -> np.ndarray:
    """Without the pixels that a JPEG or a soft edge mixes with others; the frame is no edge."""
    padded = np.pad(mask, by, constant_values=True)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * by + 1, 2 * by + 1))
    return windows.all(axis=(2, 3))


def colour_of(path: str | Path) -> np.ndarray:
    with Image.open(path) as file:
        image = np.asarray(file.convert("RGBA"))
    return image[image.shape[0] // 2, image.shape[1] // 2, :3].astype(int)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.root)): path.read_bytes() for path in folder.root.rglob("*") if path.is_file()}


def test_labels_lie_on_the_objects(made):
    seen = 0
    for split in SPLITS:
        content = json.loads(made.annotations(split).read_text())
        assert [one["name"] for one in content["categories"]] == list(CLASSES)
        for pixels, semantic, objects in scenes(made, split):
            assert pixels.shape == (96, 96, 3)
            blue = pixels[:, :, 2]
            assert (blue[inner(semantic == 0)] > 190).all()  # the photograph
            together = np.zeros((96, 96), int)
            for label, mask, _ in objects:
                assert (blue[inner(mask)] < 60).all()  # a cut-out
                assert not together[mask].any()  # a pixel shows one object only
                together[mask] = label
                seen += 1
            assert (together == semantic).all()
    assert seen > sum(COUNTS)


def test_boxes_and_areas_are_those_of_the_masks(made):
    for _, _, objects in scenes(made, "train"):
        for _, _, annotation in objects:
            assert annotation["bbox"] == coco_masks.toBbox(annotation["rle"]).tolist()
            assert annotation["area"] == coco_masks.area(annotation["rle"])
            assert annotation["iscrowd"] == 0


def test_splits_show_other_files(made, photographs):
    sources = json.loads((made.root / "sources.json").read_text())
    for split in SPLITS:
        cut = {name: np.array([colour_of(p) for p in paths]) for name, paths in sources[split]["cutouts"].items()}
        places = np.array([colour_of(path) for group in sources[split]["backgrounds"] for path in group])
        for pixels, semantic, objects in scenes(made, split):
            photograph = np.median(pixels[inner(semantic == 0)], axis=0)
            assert np.abs(places - photograph).max(axis=1).min() < 6
            for label, mask, _ in objects:
                if inner(mask).any():
                    shown = np.median(pixels[inner(mask)], axis=0)
                    assert np.abs(cut[CLASSES[label - 1]] - shown).max(axis=1).min() < 6
    files = [
        [path for paths in part["cutouts"].values() for path in paths]
        + [path for group in part["backgrounds"] for path in group]
        for part in sources.values()
    ]
    assert sum(map(len, files)) == len(set().union(*files)) == 10 + len(photographs)
    assert [len(part["cutouts"]["disc"]) for part in sources.values()] == [3, 1, 1]


def test_photographs_of_one_place_stay_together(cutouts, photographs, tmp_path):
    groups = [photographs[:2], photographs[2:4], photographs[4:]]
    for seed in range(3):
        folder = compose(cutouts, groups, tmp_path / str(seed), images=(1, 1, 1), size=48, seed=seed)
        sources = json.loads((folder.root / "sources.json").read_text())
        found = [part["backgrounds"] for part in sources.values()]
        assert sorted(found) == sorted([[str(a), str(b)]] for a, b in groups)


def test_hidden_colours_stay_hidden(tmp_path):
    cutouts = [cut_out(tmp_path / f"{k}.png", (20, 200 + k, 20), "disc") for k in range(3)]
    places = [tmp_path / f"grey{k}.png" for k in range(3)]
    for k, path in enumerate(places):
        Image.new("RGB", (90, 90), (120 + k,) * 3).save(path)
    folder = compose({"leaf": cutouts}, places, tmp_path / "out", images=(10, 1, 1), size=96)
    for pixels, semantic, _ in scenes(folder, "train"):
        assert semantic.any()
        assert (pixels[:, :, 0] - pixels[:, :, 1]).max() < 40  # green on grey: no magenta, which is 255 here


def test_edges_are_blended(tmp_path):
    cutouts = [cut_out(tmp_path / f"{k}.png", (k, k, k), "square") for k in range(3)]
    places = [tmp_path / f"white{k}.png" for k in range(3)]
    for k, path in enumerate(places):
        Image.new("RGB", (90, 90), (255 - k,) * 3).save(path)
    options = {"size": 96, "objects": (1, 1), "rotation": 0.0, "hidden": 0.0, "jitter": 0.0}
    folder = compose({"ink": cutouts}, places, tmp_path / "out", images=(5, 1, 1), **options)
    for pixels, _, objects in scenes(folder, "train"):
        grey = ((pixels.mean(axis=2) > 30) & (pixels.mean(axis=2) < 225)).sum()
        (_, _, annotation), *_ = objects
        outline = 2 * sum(annotation["bbox"][2:])
        assert 0.8 * outline < grey < 3 * outline  # a line of a pixel or two, neither black nor white


def test_same_seed_same_bytes(cutouts, photographs, tmp_path):
    by_class = {name: sorted((cutouts / name).iterdir()) for name in CLASSES}
    first, second, other, longer = (
        contents(compose(source, photographs, tmp_path / str(k), images=images, size=64, seed=seed))
        for k, (source, images, seed) in enumerate(
            [(cutouts, (3, 1, 1), 5), (by_class, (3, 1, 1), 5), (cutouts, (3, 1, 1), 6), (cutouts, (5, 1, 1), 5)]
        )
    )
    assert first == second
    images = [name for name in first if name.startswith(("images", "masks"))]
    assert len(images) == 10
    assert all(first[name] != other[name] for name in images if name.startswith("images"))
    assert all(first[name] == longer[name] for name in images)  # more images do not change the first ones


def test_nothing_is_hidden_where_nothing_may_be(cutouts, photographs, tmp_path):
    options = {"size": 96, "objects": (3, 3), "scale": (0.25, 0.25), "rotation": 0.0}
    folder = compose(cutouts, photographs, tmp_path / "out", images=(20, 1, 1), hidden=0.0, **options)
    areas = {1: np.pi / 4 * 24**2, 2: 24**2}
    for _, _, objects in scenes(folder, "train"):
        assert len(objects) == 3
        for label, _, annotation in objects:
            assert annotation["area"] == pytest.approx(areas[label], rel=0.1)
            assert annotation["bbox"][2:] == pytest.approx([24, 24], abs=2)


def test_no_object_is_hidden_beyond_the_limit(cutouts, photographs, tmp_path):
    options = {"size": 96, "objects": (6, 6), "scale": (0.4, 0.4), "rotation": 0.0}
    folder = compose(cutouts, photographs, tmp_path / "out", images=(20, 1, 1), hidden=0.4, **options)
    shares = [
        annotation["area"] / {1: np.pi / 4 * 38**2, 2: 38**2}[label]
        for _, _, objects in scenes(folder, "train")
        for label, _, annotation in objects
    ]
    assert 0.55 < min(shares) < 0.75  # the limit is reached, and kept
    assert max(shares) > 0.95


def test_small_cut_outs_are_enlarged_to_twice_at_most(photographs, tmp_path):
    paths = [cut_out(tmp_path / f"{k}.png", (10 * k, 50, 30), "square", side=8) for k in range(3)]
    options = {"size": 96, "scale": (0.5, 0.5), "rotation": 0.0, "hidden": 0.0}
    folder = compose({"dot": paths}, photographs, tmp_path / "out", images=(5, 1, 1), **options)
    boxes = [one["bbox"] for one in json.loads(folder.annotations("train").read_text())["annotations"]]
    assert boxes
    assert all(14 <= side <= 17 for box in boxes for side in box[2:])


def test_empty_images_and_splits_left_out(cutouts, photographs, tmp_path):
    folder = compose(cutouts, photographs, tmp_path / "out", images=(2, 0, 1), size=48, objects=(0, 0))
    content = json.loads(folder.annotations("train").read_text())
    assert len(content["images"]) == 2
    assert content["annotations"] == []
    assert not folder.images("val").exists()
    assert not folder.annotations("val").exists()


def test_notes(made):
    assert made.classes == ["background", *CLASSES]
    readme = (made.root / "README.md").read_text()
    assert "CC0" in readme
    assert "Made, not photographed" in readme
    assert '"seed": 0' in readme


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_are_cocos(seed):
    rng = np.random.default_rng(seed)
    mask = [np.zeros((5, 7), bool), np.ones((5, 7), bool), *(rng.random((4, 5, 7)) < 0.4)][seed]
    encoded = coco_masks.frPyObjects({"size": [5, 7], "counts": run_lengths(mask)}, 5, 7)
    assert (coco_masks.decode(encoded) == mask).all()


def test_refuses_unusable_parts_and_leaves_nothing_behind(cutouts, photographs, tmp_path):
    def complaint(cut=cutouts, photos=photographs, **options) -> str:
        with pytest.raises(DataError) as caught:
            compose(cut, photos, tmp_path / "out", images=(1, 1, 1), size=48, **options)
        assert not any("out" in path.name for path in tmp_path.iterdir())
        return str(caught.value)

    assert "no such folder" in complaint(cut=tmp_path / "nowhere")
    assert "5 cut-outs" not in complaint(photos=photographs[:2])
    assert "2 places cannot be held apart in 3 splits" in complaint(photos=photographs[:2])
    few = {"disc": sorted((cutouts / "disc").iterdir())[:2]}
    assert "class 'disc': 2 cut-outs cannot be held apart" in complaint(cut=few)
    assert "0 classes" in complaint(cut={})
    copy = cutouts / "square" / "copy.png"
    copy.write_bytes((cutouts / "disc" / "0.png").read_bytes())
    assert f"is the same picture as {cutouts / 'disc' / '0.png'}" in complaint()
    copy.unlink()
    assert "cannot be read" in complaint(photos=[*photographs, tmp_path / "missing.png"])
    for k, path in enumerate(sorted((cutouts / "square").iterdir())):
        Image.new("RGB", (30, 30), (k, k, k)).save(path)
    assert "has no alpha channel" in complaint(objects=(5, 5))
    for k, path in enumerate(sorted((cutouts / "square").iterdir())):
        Image.new("RGBA", (30, 30 + k), (9, 9, 9, 0)).save(path)
    assert "is transparent everywhere" in complaint(objects=(5, 5))
    for k, path in enumerate(sorted((cutouts / "square").iterdir())):
        path.write_text(f"no image {k}")
    assert "cannot be decoded" in complaint(objects=(5, 5))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", (0, 0, 0)),
        ("size", 4),
        ("seed", -1),
        ("objects", (3, 1)),
        ("scale", (0.0, 0.5)),
        ("rotation", 200.0),
        ("hidden", 1.0),
        ("jitter", -0.1),
    ],
)
def test_refuses_arguments_out_of_range(cutouts, photographs, tmp_path, name, value):
    with pytest.raises(DataError, match=rf"{name}: .* out of range"):
        compose(cutouts, photographs, tmp_path / "out", **{name: value})


def test_refuses_a_folder_in_use(made, cutouts, photographs):
    before = contents(made)
    with pytest.raises(DataError, match="is there already"):
        compose(cutouts, photographs, made.root, images=(1, 1, 1), size=48)
    assert contents(made) == before
