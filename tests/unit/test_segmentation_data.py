"""Folders of masks in every layout, and what is refused before a training begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refold.errors import DataError
from refold.segmentation import IGNORE, Labels, MaskSet, load_masks
from refold.segmentation.labels import CITYSCAPES, VOC

SIZE = (6, 8)


def paint(path: Path, colour: Any = (10, 200, 30), size: tuple[int, int] = SIZE) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size[1], size[0]), colour).save(path)
    return str(path)


def mask(path: Path, values: Any, mode: str = "L") -> str:
    """``values`` down the rows of a mask of SIZE, or the whole array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array(values)
    if array.ndim == 1:
        array = np.repeat(np.resize(array, SIZE[0])[:, None], SIZE[1], axis=1)
    if mode == "P":
        picture = Image.fromarray(array.astype(np.uint8)).convert("P")
        picture.putdata(array.ravel().tolist())
        picture.putpalette([7 * k % 256 for k in range(768)])
    elif mode == "I;16":
        picture = Image.fromarray(array.astype(np.uint16))
    else:
        picture = Image.fromarray(array.astype(np.uint8)).convert(mode)
    picture.save(path)
    return str(path)


def plain(root: Path, splits: dict[str, int], values: Any = (0, 1, 2, 255), names: str | None = "a\nb\nc\n") -> Path:
    for split, count in splits.items():
        for k in range(count):
            paint(root / "images" / split / f"{k}.jpg")
            mask(root / "masks" / split / f"{k}.png", values)
    if names is not None:
        (root / "classes.txt").write_text(names)
    return root


class TestLayouts:
    def test_plain(self, tmp_path: Path) -> None:
        splits = load_masks(plain(tmp_path, {"train": 3, "val": 2, "test": 1}))
        assert (splits.layout, splits.classes) == ("plain", ["a", "b", "c"])
        assert [len(part) for part in (splits.train, splits.val, splits.test) if part] == [3, 2, 1]
        image, labels = splits.train.read(0)
        assert image.shape == (3, *SIZE)
        assert image.dtype == labels.dtype == torch.uint8
        assert labels[:, 0].tolist() == [0, 1, 2, 255, 0, 1]
        assert splits.train.check().tolist() == [3 * 16, 3 * 16, 3 * 8]

    def test_plain_without_names_counts_the_labels(self, tmp_path: Path) -> None:
        splits = load_masks(plain(tmp_path, {"train": 1, "valid": 1}, values=(0, 3, 255), names=None))
        assert splits.classes == ["0", "1", "2", "3"]
        assert splits.val is not None
        assert splits.test is None

    def test_plain_without_splits_draws_them(self, tmp_path: Path) -> None:
        plain(tmp_path, {"": 10})
        splits = load_masks(tmp_path, fractions=(0.6, 0.2, 0.2), seed=1)
        parts = [set(part.images) for part in (splits.train, splits.val, splits.test) if part]
        assert [len(part) for part in parts] == [6, 2, 2]
        assert len(set.union(*parts)) == 10
        for part in (splits.train, splits.val):
            assert part is not None
            assert [Path(p).stem for p in part.images] == [Path(p).stem for p in part.masks]
        assert load_masks(tmp_path, fractions=(0.6, 0.2, 0.2), seed=1).train.images == splits.train.images

    def test_ade20k_ignores_zero_and_shifts_the_rest(self, tmp_path: Path) -> None:
        for split in ("training", "validation"):
            paint(tmp_path / "images" / split / "ADE_1.jpg")
            mask(tmp_path / "annotations" / split / "ADE_1.png", (0, 1, 2, 150))
        splits = load_masks(tmp_path)
        assert splits.layout == "ade20k"
        assert len(splits.classes) == 150
        assert splits.train.read(0)[1][:4, 0].tolist() == [255, 0, 1, 149]
        (tmp_path / "objectInfo150.txt").write_text(
            "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t1\t1\twall\n2\t0.1\t1\t1\tscreen, crt\n3\t0.1\t1\t1\tscreen\n"
        )
        with pytest.raises(DataError, match="8 pixels have the label 150, beyond the 3 classes"):
            load_masks(tmp_path)
        assert load_masks(tmp_path, check=False).classes == ["wall", "screen", "screen (2)"]

    def test_voc_reads_palettes_and_lists(self, tmp_path: Path) -> None:
        for name in ("x", "y", "z", "unused"):
            paint(tmp_path / "JPEGImages" / f"{name}.jpg")
            if name != "z":
                mask(tmp_path / "SegmentationClass" / f"{name}.png", (0, 15, 20, 255), mode="P")
        lists = tmp_path / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("x\n")
        (lists / "val.txt").write_text("y\n")
        (lists / "test.txt").write_text("z\n")  # as published: without masks
        splits = load_masks(tmp_path)
        assert (splits.layout, splits.classes, splits.test) == ("voc", VOC, None)
        assert splits.train.read(0)[1][:4, 0].tolist() == [0, 15, 20, 255]
        assert [len(splits.train), len(splits.val or [])] == [1, 1]
        (lists / "val.txt").write_text("z\n")
        with pytest.raises(DataError, match=r"val.txt: 1 masks are listed and not there, first .*z.png"):
            load_masks(tmp_path)

    def test_cityscapes_keeps_the_nineteen_classes(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            paint(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png")
            mask(tmp_path / "gtFine" / split / "ulm" / "ulm_0_gtFine_labelIds.png", (0, 7, 26, 33, 29, 255))
            mask(tmp_path / "gtFine" / split / "ulm" / "ulm_0_gtFine_instanceIds.png", (1, 2))
        splits = load_masks(tmp_path)
        assert splits.layout == "cityscapes"
        assert splits.classes == list(CITYSCAPES.values())
        assert len(splits.classes) == 19
        assert splits.train.read(0)[1][:, 0].tolist() == [255, 0, 13, 18, 255, 255]


@pytest.mark.parametrize(("mode", "values"), [("L", (0, 2)), ("P", (0, 2)), ("I;16", (0, 2)), ("1", (0, 255))])
def test_grey_palette_16_bit_and_bilevel_masks(tmp_path: Path, mode: str, values: tuple[int, ...]) -> None:
    pair = paint(tmp_path / "a.png"), mask(tmp_path / "m.png", values, mode)
    found = MaskSet([pair[0]], [pair[1]], Labels.plain(["a", "b", "c"])).read(0)[1]
    assert found[:2, 0].tolist() == ([0, 1] if mode == "1" else [0, 2])


class TestRefusals:
    def test_another_size(self, tmp_path: Path) -> None:
        plain(tmp_path, {"train": 2})
        mask(tmp_path / "masks" / "train" / "1.png", np.zeros((6, 9)))
        with pytest.raises(DataError, match=r"masks/train/1.png: the mask is 6x9 pixels, its image 6x8"):
            load_masks(tmp_path)
        mask(tmp_path / "masks" / "train" / "1.png", np.zeros((8, 6)))
        with pytest.raises(DataError, match="EXIF orientation"):
            load_masks(tmp_path)

    def test_a_label_beyond_the_classes(self, tmp_path: Path) -> None:
        plain(tmp_path, {"train": 2})
        mask(tmp_path / "masks" / "train" / "1.png", (0, 1, 7))
        with pytest.raises(
            DataError, match=r"1.png: 16 pixels have the label 7, beyond the 3 classes. Labels are 0 to 2"
        ):
            load_masks(tmp_path)
        mask(tmp_path / "masks" / "train" / "1.png", (0, 1, 40000), mode="I;16")
        with pytest.raises(DataError, match="the label 40000"):
            load_masks(tmp_path)

    def test_a_missing_mask_or_image(self, tmp_path: Path) -> None:
        plain(tmp_path, {"train": 3})
        (tmp_path / "masks" / "train" / "2.png").unlink()
        with pytest.raises(DataError, match=r"images/train/2.jpg: 1 images have no mask"):
            load_masks(tmp_path)
        (tmp_path / "images" / "train" / "2.jpg").unlink()
        (tmp_path / "images" / "train" / "1.jpg").unlink()
        with pytest.raises(DataError, match=r"masks/train/1.png: 1 masks have no image"):
            load_masks(tmp_path)
        plain(tmp_path, {"train": 3})
        paint(tmp_path / "images" / "val" / "0.jpg")
        with pytest.raises(DataError, match="masks/val: there is no such folder"):
            load_masks(tmp_path)

    def test_broken_files(self, tmp_path: Path) -> None:
        plain(tmp_path, {"train": 1})
        path = tmp_path / "masks" / "train" / "0.png"
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(DataError, match=r"0.png: the mask cannot be decoded"):
            load_masks(tmp_path)
        mask(path, (0, 1))
        (tmp_path / "images" / "train" / "0.jpg").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"0.jpg: the image cannot be decoded"):
            load_masks(tmp_path)

    def test_colours_and_lossy_masks(self, tmp_path: Path) -> None:
        plain(tmp_path, {"train": 1})
        paint(tmp_path / "masks" / "train" / "0.png")
        with pytest.raises(DataError, match="the mask is a RGB image: colours, not labels"):
            load_masks(tmp_path)
        (tmp_path / "masks" / "train" / "0.png").unlink()
        mask(tmp_path / "masks" / "train" / "0.jpg", (0, 1))
        with pytest.raises(DataError, match=r"0.jpg: the mask cannot be decoded.*masks are PNG"):
            load_masks(tmp_path)

    def test_nothing_labelled(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="none of 2 masks has a labelled pixel"):
            load_masks(plain(tmp_path, {"train": 2}, values=(255,)))

    def test_binary_masks_of_0_and_255(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"every labelled pixel of the training masks is of class 'a'.*hold 0 and 1"
        ):
            load_masks(plain(tmp_path / "named", {"train": 2}, values=(0, 255), names="a\nb\n"))
        with pytest.raises(DataError, match=r"2 to 255 classes, not 1.*not 0 and 255"):
            load_masks(plain(tmp_path / "unnamed", {"train": 2}, values=(0, 255), names=None))

    def test_no_known_layout(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="holds no images and masks of a known layout"):
            load_masks(tmp_path)
        with pytest.raises(DataError, match="no such folder"):
            load_masks(tmp_path / "nowhere")
        with pytest.raises(DataError, match="unknown layout 'coco'"):
            load_masks(plain(tmp_path, {"train": 1}), layout="coco")
        with pytest.raises(DataError, match="has no training split"):
            load_masks(plain(tmp_path / "other", {"val": 1}))

    def test_names_twice(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="names the class 'a' twice"):
            load_masks(plain(tmp_path, {"train": 1}, names="a\na\n"))
        plain(tmp_path, {"train": 1})
        paint(tmp_path / "images" / "train" / "0.png")
        with pytest.raises(DataError, match="has the same name as"):
            load_masks(tmp_path)


def test_a_subset_keeps_pairs(tmp_path: Path) -> None:
    whole = load_masks(plain(tmp_path, {"train": 4})).train
    part = whole.subset([3, 1])
    assert [Path(p).stem for p in part.images] == [Path(p).stem for p in part.masks] == ["3", "1"]
    with pytest.raises(DataError, match="are among 4 images"):
        whole.subset([4])


def test_ignored_values_are_no_class() -> None:
    labels = Labels.reduced(["wall", "sky"])
    found = labels.encode(np.array([[0, 1], [2, 255]]), "x.png")
    assert found.tolist() == [[IGNORE, 0], [1, IGNORE]]
    with pytest.raises(DataError, match="1 pixels have the label -3"):
        labels.encode(np.array([[0, -3]]), "x.png")
