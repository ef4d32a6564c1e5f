"""Pascal VOC's pictures of objects and classes as instances: known answers, what is refused, and a training on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import refold
from refold.detection import load_boxes, read_voc_masks
from refold.errors import DataError

ROWS, COLUMNS = 40, 60
CAT, DOG = 8, 12  # VOC's values
BORDER = 255


def png(path: Path, values: np.ndarray) -> None:
    """A palette image, as VOC's masks are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8)).convert("P")
    image.putdata(values.astype(np.uint8).ravel().tolist())
    image.putpalette([(37 * k) % 256 for k in range(768)])
    image.save(path)


def picture(root: Path, name: str, objects: np.ndarray, classes: np.ndarray) -> None:
    (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 200, (*objects.shape, 3), dtype=np.uint8)
    pixels[(classes > 0) & (classes < BORDER)] = 255
    Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg")
    png(root / "SegmentationObject" / f"{name}.png", objects)
    png(root / "SegmentationClass" / f"{name}.png", classes)


def blank() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((ROWS, COLUMNS), dtype=np.uint8), np.zeros((ROWS, COLUMNS), dtype=np.uint8)


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """A dog of two parts (object 1), a cat with a void border (object 3), and a void region of no object."""
    objects, classes = blank()
    objects[5:10, 2:8] = 1
    objects[20:24, 30:33] = 1
    classes[objects == 1] = DOG
    classes[5, 2:5] = CAT  # three pixels of another class: the majority counts
    objects[11:21, 9:21] = classes[11:21, 9:21] = BORDER
    objects[12:20, 10:20] = 3
    classes[12:20, 10:20] = CAT
    classes[12, 10:20] = BORDER
    objects[30:35, 50:60] = classes[30:35, 50:60] = BORDER
    return objects, classes


def lists(root: Path, **splits: str) -> None:
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(entries.split()) + "\n")


def test_objects_classes_boxes_and_masks(tmp_path: Path) -> None:
    objects, classes = drawn()
    picture(tmp_path, "a", objects, classes)
    picture(tmp_path, "b", *blank())
    found = read_voc_masks(tmp_path)
    assert [Path(path).name for path in found.paths] == ["a.jpg", "b.jpg"]
    assert found.sizes == [(ROWS, COLUMNS)] * 2
    assert len(found.classes) == 20
    dog, cat = found.objects[0]
    assert found.classes[dog.label - 1] == "dog"
    assert found.classes[cat.label - 1] == "cat"
    assert (dog.box, dog.area, dog.ignored) == ((2, 5, 33, 24), 5 * 6 + 4 * 3, False)
    assert (cat.box, cat.area, cat.ignored) == ((10, 12, 20, 20), 80, False)  # without the border around it
    target = found.target(0)
    assert torch.equal(target["masks"].bool(), torch.from_numpy(np.stack([objects == 1, objects == 3])))
    assert target["labels"].tolist() == [DOG, CAT]
    assert found.target(1)["masks"].shape == (0, ROWS, COLUMNS)  # a negative
    assert found.has_masks


def test_own_classes(tmp_path: Path) -> None:
    objects, classes = blank()
    objects[1:5, 1:5], classes[1:5, 1:5] = 7, 2
    picture(tmp_path, "a", objects, classes)
    (tmp_path / "classes.txt").write_text("background\nnut\nbolt\n")
    found = read_voc_masks(tmp_path)
    assert (found.classes, found.objects[0][0].label) == (["nut", "bolt"], 2)
    assert read_voc_masks(tmp_path, classes=["x", "y", "z"]).classes == ["x", "y", "z"]


def test_splits_come_from_the_lists_of_segmentation(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path, name, *drawn())
    picture(tmp_path, "e", *drawn())
    (tmp_path / "SegmentationObject" / "e.png").unlink()
    main = tmp_path / "ImageSets" / "Main"  # of the boxes: not asked
    main.mkdir(parents=True)
    (main / "train.txt").write_text("zzz\n")
    lists(tmp_path, train="a b", val="c", trainval="a b c", test="e")
    splits = load_boxes(tmp_path, masks=True)
    assert [Path(path).stem for path in splits.train.paths] == ["a", "b"]
    assert splits.val is not None
    assert [Path(path).stem for path in splits.val.paths] == ["c"]
    assert splits.test is None  # as published: without masks
    lists(tmp_path, test="d")
    splits = load_boxes(tmp_path, masks=True)
    assert splits.test is not None
    assert [Path(path).stem for path in splits.test.paths] == ["d"]


def test_without_lists_all_masks_are_split_by_the_seed(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path, name, *drawn())
    splits = load_boxes(tmp_path, masks=True, fractions=(3, 1, 0))
    assert splits.val is not None
    assert (len(splits.train), len(splits.val)) == (3, 1)


def small(objects: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return objects[:-1], classes


def classless(objects: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return objects, np.where(objects == 3, 0, classes)


def void(objects: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return objects, np.where(objects == 3, BORDER, classes)


def beyond(objects: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return objects, np.where(objects == 3, 21, classes)


def empty(objects: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 0 * objects, 0 * classes


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (small, r"SegmentationObject/a.png: the mask is 39 x 60 \(height x width\), its image 40 x 60 \(.*a.jpg\)\. M"),
        (classless, r"SegmentationClass/a.png, against .*Object/a.png: object 3 has no class: of its 80 .*Draw"),
        (void, r"object 3 has no class: of its 80 pixels 0 are background there, and 0 of a class\. Draw"),
        (beyond, r"SegmentationClass/a.png: 80 pixels have the label 21, beyond the 21 classes\. .*classes.txt"),
        (empty, r"train.txt: has no object in any mask\. Annotate"),
    ],
    ids=["size", "no class", "void", "beyond", "empty"],
)
def test_masks_that_contradict_are_one_clear_error(tmp_path: Path, change, text: str) -> None:
    picture(tmp_path, "a", *drawn())
    for kind, values in zip(("Object", "Class"), change(*drawn()), strict=True):
        png(tmp_path / f"Segmentation{kind}" / "a.png", values)
    lists(tmp_path, train="a")
    with pytest.raises(DataError, match=text):
        load_boxes(tmp_path, masks=True)


def test_missing_files_are_one_clear_error(tmp_path: Path) -> None:
    picture(tmp_path, "a", *drawn())
    lists(tmp_path, train="a gone")
    with pytest.raises(DataError, match=r"train.txt, entry 2: there is no image '.*gone'"):
        load_boxes(tmp_path, masks=True)
    lists(tmp_path, train="a", val="")
    with pytest.raises(DataError, match=r"val.txt: the list of a split is empty"):
        load_boxes(tmp_path, masks=True)
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").unlink()
    for kind in ("Class", "Object"):
        (tmp_path / f"Segmentation{kind}" / "a.png").unlink()
        with pytest.raises(DataError, match=rf"Segmentation{kind}/a.png: the mask cannot be decoded .*No such file"):
            load_boxes(tmp_path, masks=True)
    (tmp_path / "SegmentationObject").rmdir()
    with pytest.raises(DataError, match=r"has no folder SegmentationObject.* COCO's format, or train on boxes alone"):
        load_boxes(tmp_path, masks=True)


def test_a_mask_rcnn_trains_predicts_and_is_measured_on_a_voc_folder(tmp_path: Path) -> None:
    root = tmp_path / "voc"
    for name in ("a", "b", "c", "d"):
        picture(root, name, *drawn())
    lists(root, train="a b", val="c", test="d")
    result = refold.train(
        data=root, task="instance", model="timm/test_convnext", pretrained=False, method=refold.RepAdapter(rank=4),
        decoder="mask_rcnn(channels=16, hidden=32, rois=16)", image_size=64, epochs=1, batch_size=2, precision="fp32",
        output=tmp_path / "run",
    )  # fmt: skip
    for split in ("val", "test"):
        assert {"ap", "ap50", "box_ap", "mask_ap"} <= result.metrics[split].keys()
    assert (tmp_path / "run" / "overlays.png").is_file()
    found = refold.predict(tmp_path / "run", root / "JPEGImages", output=tmp_path / "out")
    assert (tmp_path / "out" / "predictions.json").is_file()
    assert (tmp_path / "out" / "overlays" / "a.png").is_file()
    assert found is not None
