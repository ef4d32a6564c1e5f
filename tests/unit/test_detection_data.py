"""COCO and VOC files as they are found: what is read, what is repaired and counted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refold.detection import load_boxes, read_coco, read_voc
from refold.errors import DataError

ROWS, COLUMNS = 40, 60


def photo(path: Path, rows: int = ROWS, columns: int = COLUMNS, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 255, (rows, columns, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def content() -> dict[str, Any]:
    """Three images (one negative), categories with gaps and out of order, polygon, RLE and crowd."""
    rle = {"size": [ROWS, COLUMNS], "counts": [3 * ROWS + 5, 10, ROWS - 10, 10, ROWS * COLUMNS - 4 * ROWS - 15]}
    sizes = {"height": ROWS, "width": COLUMNS}
    return {
        "images": [{"id": id_, "file_name": f"{id_}.png", **sizes} for id_ in (40, 7, 12)],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [10, 5, 20, 15], "iscrowd": 0, "area": 111.5,
             "segmentation": [[10, 5, 30, 5, 30, 20, 10, 20]]},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [3, 5, 2, 10], "segmentation": rle},
            {"id": 3, "image_id": 40, "category_id": 9, "bbox": [0, 0, 30, 30], "iscrowd": 1, "area": 900,
             "segmentation": {"size": [ROWS, COLUMNS], "counts": [0, 20 * ROWS, (COLUMNS - 20) * ROWS]}},
        ],
    }  # fmt: skip


def written(root: Path, changed: dict[str, Any] | None = None, name: str = "instances.json") -> Path:
    for id_ in (40, 7, 12):
        photo(root / f"{id_}.png")
    path = root / name
    path.write_text(json.dumps(content() if changed is None else changed))
    return path


def test_coco_boxes_classes_crowd_and_negatives(tmp_path: Path) -> None:
    found = read_coco(written(tmp_path))
    assert found.classes == ["cat", "dog"]  # by id
    assert (found.category_ids, found.image_ids) == ([2, 9], [40, 7, 12])
    assert [Path(path).name for path in found.paths] == ["40.png", "7.png", "12.png"]
    assert found.sizes == [(ROWS, COLUMNS)] * 3
    dog, cat = found.objects[1]
    assert (dog.box, dog.label, dog.ignored, dog.area) == ((10, 5, 30, 20), 2, False, 111.5)
    assert (cat.box, cat.label, cat.area) == ((3, 5, 5, 15), 1, 20)
    assert found.objects[0][0].ignored
    assert found.count() == 2
    assert not found.has_masks
    assert found.target(0)["boxes"].shape == (0, 4)  # crowd: evaluated, not learned
    assert found.target(2)["boxes"].shape == (0, 4)
    target = found.target(1)
    assert target["boxes"].tolist() == [[10, 5, 30, 20], [3, 5, 5, 15]]
    assert target["labels"].tolist() == [2, 1]
    assert "masks" not in target


def test_coco_masks_polygon_and_rle(tmp_path: Path) -> None:
    found = read_coco(written(tmp_path), masks=True)
    masks = found.target(1)["masks"]
    dog = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    dog[5:20, 10:30] = 1
    cat = torch.zeros(ROWS, COLUMNS, dtype=torch.uint8)
    cat[5:15, 3:5] = 1
    assert masks.dtype == torch.uint8
    assert torch.equal(masks, torch.stack([dog, cat]))
    assert found.target(2)["masks"].shape == (0, ROWS, COLUMNS)
    assert found.objects[1][1].area == 20  # of the mask, where the file has none


def test_compressed_rle_is_read(tmp_path: Path) -> None:
    from faster_coco_eval.core import mask

    truth = np.zeros((ROWS, COLUMNS), dtype=np.uint8)
    truth[7:30, 20:41] = 1
    rle = mask.encode(np.asfortranarray(truth))
    changed = content()
    changed["annotations"][0]["segmentation"] = {"size": [ROWS, COLUMNS], "counts": rle["counts"].decode()}
    assert torch.equal(read_coco(written(tmp_path, changed), masks=True).target(1)["masks"][0], torch.from_numpy(truth))


def test_boxes_out_of_the_image_and_without_area_are_counted_once(tmp_path: Path) -> None:
    changed = content()
    extra = [
        [50, 30, 20, 20],
        [-5, -5, 10, 10],
        [70, 0, 5, 5],
        [5, 50, 5, 5],
        [5, 5, 0, 9],
        [5, 5, -3, 9],
        [58, 0, 2.4, 9],
    ]
    changed["annotations"] += [
        {"id": 10 + k, "image_id": 12, "category_id": 2, "bbox": box} for k, box in enumerate(extra)
    ]
    path = written(tmp_path, changed)
    with pytest.warns(UserWarning, match="instances.json: boxes") as caught:
        found = read_coco(path)
    assert len(caught) == 1
    text = str(caught[0].message)
    for part in ("2 partly outside their image: clipped", "2 outside their image: dropped", "2 without area: dropped"):
        assert part in text
    # 0.4 pixels over the edge are rounding: clipped, not counted.
    assert [one.box for one in found.objects[2]] == [(50, 30, 60, 40), (0, 0, 5, 5), (58, 0, 60, 9)]


def _without(key: str, place: str) -> dict[str, Any]:
    changed = content()
    del changed[place][0][key]
    return changed


def _with(place: str, **values: Any) -> dict[str, Any]:
    changed = content()
    changed[place][0] |= values
    return changed


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (_with("images", file_name="gone.png"), r"instances.json, image 40: there is no image '.*gone.png'"),
        (_with("images", height=41), r"40.png'?: the annotations say 41 x 60 .* the file is 40 x 60"),
        (_with("images", height="x"), "no whole numbers"),
        (_with("images", id=7), "in images, the id 7 is there 2 times"),
        (_with("images", id="a"), "no whole number"),
        (_with("categories", id=2), "in categories, the id 2 is there 2 times"),
        (_with("categories", name="cat"), "the category name 'cat' is there 2 times"),
        (_with("annotations", category_id=3), "annotation 1: names the category 3, which the file does not list"),
        (_with("annotations", image_id=3), "annotation 1: names the image 3"),
        (_with("annotations", bbox=[1, 2, 3]), "annotation 1: is malformed .*four finite numbers"),
        (_with("annotations", bbox=[1, 2, 3, "x"]), "annotation 1: is malformed"),
        (_with("annotations", bbox=[1, 2, 3, float("nan")]), "annotation 1: is malformed"),
        (_without("bbox", "annotations"), "annotation 1: lacks 'bbox'"),
        (_without("file_name", "images"), "image 40: lacks 'file_name'"),
        ({**content(), "annotations": []}, "has no annotations"),
        ({**content(), "annotations": content()["annotations"][2:]}, "no annotation that can be learned from"),
        ({**content(), "images": []}, "lists no images"),
        ({"images": content()["images"]}, "'categories' is no list"),
        ([{"image_id": 1}], "top level is no object"),
    ],
)  # fmt: skip
def test_broken_coco_files_are_one_clear_error(tmp_path: Path, changed: Any, text: str) -> None:
    path = written(tmp_path, changed)
    with pytest.raises(DataError, match=text):
        read_coco(path)


@pytest.mark.parametrize(
    ("segmentation", "text"),
    [
        (None, "neither a list of polygons nor an RLE"),
        ([], "there is no polygon"),
        ([[1, 2, 3, 4]], "three or more points"),
        ([[1, 2, 3, 4, 5, "x"]], "no number"),
        ({"size": [9, 9], "counts": [81]}, r"its RLE is of \[9, 9\]"),
        ({"size": [ROWS, COLUMNS], "counts": [10]}, "cannot be decoded"),
        ({"size": [ROWS, COLUMNS], "counts": "garbage~~"}, "cannot be decoded"),
    ],
)
def test_broken_masks_are_named(tmp_path: Path, segmentation: Any, text: str) -> None:
    path = written(tmp_path, _with("annotations", segmentation=segmentation))
    with pytest.raises(DataError, match=f"annotation 1: has no usable mask: .*{text}"):
        read_coco(path, masks=True)
    assert read_coco(path).count() == 2  # boxes alone need no mask


def test_unreadable_json_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_coco(path)
    path.write_text('{"images": [\n  oops')
    with pytest.raises(DataError, match=r"a.json, line 2, column 3: is no JSON"):
        read_coco(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no JSON"):
        read_coco(path)


def test_an_image_turned_by_exif_against_its_annotations_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "12.png", exif=exif)  # stored 40 x 60, shown 60 x 40
    with pytest.raises(DataError, match="EXIF"):
        read_coco(path)


def test_an_image_replaced_later_is_noticed(tmp_path: Path) -> None:
    found = read_coco(written(tmp_path))
    photo(tmp_path / "12.png", 41, 60)
    with pytest.raises(DataError, match=r"12.png: the annotations say 40 x 60"):
        found.read(2)


VOC = """<annotation><filename>{name}.jpg</filename>
<size><width>{width}</width><height>40</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


def voc(root: Path, name: str, *objects: tuple, width: int = COLUMNS) -> None:
    photo(root / "JPEGImages" / f"{name}.jpg")
    folder = root / "Annotations"
    folder.mkdir(exist_ok=True)
    text = VOC.format(name=name, width=width, objects="".join(OBJECT.format(*one) for one in objects))
    (folder / f"{name}.xml").write_text(text)


def lists(root: Path, **splits: str) -> None:
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True)
    for name, entries in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(entries.split()) + "\n")


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    voc(tmp_path, "a", ("dog", 0, 1, 1, 60, 40), ("cat", 1, 11, 6, 20, 15))
    voc(tmp_path, "b")
    found = read_voc(tmp_path)
    assert found.classes == ["cat", "dog"]
    dog, cat = found.objects[0]
    assert (dog.box, dog.label, dog.ignored, dog.area) == ((0, 0, 60, 40), 2, False, 2400)  # the whole image
    assert (cat.box, cat.ignored) == ((10, 5, 20, 15), True)  # 10 x 10 pixels, difficult
    assert found.objects[1] == []
    assert found.target(0)["labels"].tolist() == [2]


def test_voc_splits_and_files_beside_images(tmp_path: Path) -> None:
    for name in "abc":
        voc(tmp_path, name, ("dog", 0, 1, 1, 30, 30))
    lists(tmp_path, train="a b", val="c")
    assert [len(read_voc(tmp_path, split)) for split in ("train", "val")] == [2, 1]
    other = tmp_path / "list.txt"
    other.write_text("b 1\nc -1\n")  # as VOC's lists of a class
    assert [Path(path).stem for path in read_voc(tmp_path, other).paths] == ["b", "c"]
    splits = load_boxes(tmp_path)
    assert (len(splits.train), len(splits.val or []), splits.test) == (2, 1, None)
    flat = tmp_path / "flat"
    flat.mkdir()
    photo(flat / "x.png")
    (flat / "x.xml").write_text(VOC.format(name="elsewhere/x", width=0, objects=OBJECT.format("dog", 0, 1, 1, 9, 9)))
    found = read_voc(flat)
    assert Path(found.paths[0]).name == "x.png"
    assert found.sizes == [(ROWS, COLUMNS)]  # a width of zero says nothing


def test_broken_voc_files_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no XML files"):
        read_voc(tmp_path)
    voc(tmp_path, "a", ("dog", 0, 1, 1, 30, 30))
    xml = tmp_path / "Annotations" / "a.xml"
    good = xml.read_text()
    for broken, text in (
        (good.replace("</annotation>", ""), "a.xml: is no XML .*line"),
        (good.replace("<xmin>1</xmin>", ""), "a.xml, object 1: lacks <xmin>"),
        (good.replace("<xmin>1<", "<xmin>one<"), "a.xml, object 1: is malformed"),
        (good.replace("<name>dog</name>", ""), "a.xml, object 1: lacks <name>"),
        (good.replace("<width>60<", "<width>61<"), "a.xml, image .*say 40 x 61"),
        (good.replace("object>", "part>"), "has no annotated object"),
    ):
        xml.write_text(broken)
        with pytest.raises(DataError, match=text):
            read_voc(tmp_path)
    xml.write_text(good)
    with pytest.raises(DataError, match="unknown class 'dog'"):
        read_voc(tmp_path, classes=["cat"])
    with pytest.raises(DataError, match="list of a split cannot be read"):
        read_voc(tmp_path, "train")
    lists(tmp_path, train="a b")
    with pytest.raises(DataError, match=r"train.txt, entry 2: there is no '.*b.xml'"):
        read_voc(tmp_path, "train")
    with pytest.raises(DataError, match="has no folder SegmentationObject, and so no mask for each object"):
        load_boxes(tmp_path, masks=True)
    (tmp_path / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a.xml: there is no image '.*a.jpg'"):
        read_voc(tmp_path)


def test_layouts_of_coco_folders(tmp_path: Path) -> None:
    official = tmp_path / "official"
    for split in ("train2017", "val2017"):
        written(official / split)
        (official / split / "instances.json").unlink()
        (official / "annotations").mkdir(exist_ok=True)
        (official / "annotations" / f"instances_{split}.json").write_text(json.dumps(content()))
        (official / "annotations" / f"captions_{split}.json").write_text("{}")
    splits = load_boxes(official, masks=True)
    assert splits.val is not None
    assert Path(splits.train.paths[0]).parent.name == "train2017"
    assert Path(splits.val.paths[0]).parent.name == "val2017"
    beside = tmp_path / "beside"
    for split in ("train", "valid", "test"):
        written(beside / split, name="_annotations.coco.json")
    splits = load_boxes(beside)
    assert splits.val is not None
    assert splits.test is not None
    assert Path(splits.val.paths[0]).parent.name == "valid"
    (beside / "train" / "_annotations.coco.json").unlink()
    with pytest.raises(DataError, match="no training split"):
        load_boxes(beside)
    with pytest.raises(DataError, match="is no data set with boxes"):
        load_boxes(tmp_path)
    other = content()
    other["categories"][0]["name"] = "wolf"
    (official / "annotations" / "instances_val2017.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="not those of training"):
        load_boxes(official)


def test_one_file_is_split_by_the_seed(tmp_path: Path) -> None:
    changed = content()
    changed["annotations"].append({"id": 4, "image_id": 12, "category_id": 9, "bbox": [1, 1, 9, 9]})
    changed["annotations"].append({"id": 5, "image_id": 40, "category_id": 2, "bbox": [1, 1, 9, 9]})
    path = written(tmp_path, changed)
    splits = load_boxes(path, fractions=(2, 1, 0), seed=3)
    assert splits.val is not None
    assert splits.test is None
    assert sorted(splits.train.image_ids + splits.val.image_ids) == [7, 12, 40]
    assert len(splits.val) == 1
    again = load_boxes(path, fractions=(2, 1, 0), seed=3)
    assert again.train.image_ids == splits.train.image_ids
