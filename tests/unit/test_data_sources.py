"""Folders, tables and lists: what is read from them, how they are split, and every complaint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from refold import DataError
from refold.data import ImageSet, load_dataset, load_images

COLOURS = {"cat": "red", "dog": "lime", "bird": "blue"}


def image(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), colour).save(path)
    return path


def class_folders(root: Path, counts: dict[str, int], prefix: str = "") -> Path:
    for name, count in counts.items():
        for k in range(count):
            image(root / name / f"{prefix}{k:03}.png", COLOURS[name])
    return root


def table(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def names(image_set: ImageSet | None) -> list[str]:
    assert image_set is not None
    return [Path(path).name for path in image_set.paths]


def complaint(*args, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(*args, **options)
    return str(caught.value)


@pytest.fixture
def photos(tmp_path):
    """Ten images beside the tables of a test."""
    for k in range(10):
        image(tmp_path / f"{k}.png")
    return tmp_path


# -- folders ----------------------------------------------------------------------------------------------------


def test_folder_per_class(tmp_path):
    splits = load_dataset(class_folders(tmp_path, {"dog": 10, "cat": 20, "bird": 5}), seed=1)
    assert splits.classes == ["bird", "cat", "dog"]
    assert splits.task == "classify"
    assert splits.test is None
    assert splits.val is not None
    assert splits.train.targets.bincount().tolist() == [4, 16, 8]
    assert splits.val.targets.bincount().tolist() == [1, 4, 2]
    assert not set(splits.train.paths) & set(splits.val.paths)
    for part in (splits.train, splits.val):
        assert [Path(path).parent.name for path in part.paths] == [splits.classes[k] for k in part.targets]
        assert part.classes == splits.classes


def test_split_depends_on_the_seed_alone(tmp_path):
    class_folders(tmp_path, {"dog": 10, "cat": 20})
    first, again, other = (load_dataset(str(tmp_path), seed=seed).train.paths for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_counts_and_the_rest(tmp_path):
    splits = load_dataset(class_folders(tmp_path, {"dog": 10, "cat": 20}), fractions=(8, 4, None))
    assert [len(part) for part in (splits.train, splits.val, splits.test) if part is not None] == [8, 4, 18]


def test_what_counts_as_an_image(tmp_path):
    class_folders(tmp_path, {"dog": 1, "cat": 1})
    image(tmp_path / "dog" / "puppies" / "tiny" / "UPPER.JPG")
    image(tmp_path / "dog" / ".thumbnail.png")
    image(tmp_path / "dog" / ".cache" / "a.png")
    image(tmp_path / ".git" / "a.png")
    (tmp_path / "dog" / "notes.txt").write_text("barks")
    (tmp_path / "README.md").write_text("pets")
    splits = load_dataset(tmp_path, fractions=(1.0, 0.0, 0.0))
    assert splits.classes == ["cat", "dog"]
    assert names(splits.train) == ["000.png", "000.png", "UPPER.JPG"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = class_folders(tmp_path / "elsewhere", {"cat": 2})
    root = class_folders(tmp_path / "data", {"dog": 2})
    (root / "cat").symlink_to(elsewhere / "cat")
    (root / "again").symlink_to(root)
    (root / "dog" / "self").symlink_to(root / "dog")
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "further").symlink_to(tmp_path)
    splits = load_dataset(root, fractions=(1.0, 0.0, 0.0))
    assert splits.classes == ["cat", "dog"]
    assert len(splits.train) == 4


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders(tmp_path, val):
    class_folders(tmp_path / "train", {"dog": 2, "cat": 3}, "train")
    class_folders(tmp_path / val, {"dog": 1, "cat": 1}, "val")
    class_folders(tmp_path / "test", {"cat": 2}, "test")
    splits = load_dataset(tmp_path)
    assert names(splits.train) == ["train000.png", "train001.png", "train002.png", "train000.png", "train001.png"]
    assert names(splits.val) == ["val000.png", "val000.png"]
    assert names(splits.test) == ["test000.png", "test001.png"]
    assert splits.test is not None
    assert splits.test.targets.tolist() == [0, 0]


def test_validation_is_drawn_from_training_where_it_has_no_folder(tmp_path):
    class_folders(tmp_path / "train", {"dog": 10, "cat": 10}, "train")
    class_folders(tmp_path / "test", {"dog": 3, "cat": 3}, "test")
    splits = load_dataset(tmp_path)
    assert splits.val is not None
    assert splits.test is not None
    assert [len(splits.train), len(splits.val), len(splits.test)] == [16, 4, 6]
    assert all(name.startswith("train") for name in names(splits.val))


def test_share_of_a_split_that_is_given_goes_to_training(tmp_path):
    class_folders(tmp_path / "train", {"dog": 10, "cat": 10})
    class_folders(tmp_path / "test", {"dog": 3, "cat": 3})
    splits = load_dataset(tmp_path, fractions=(0.5, 0.2, 0.3))
    assert splits.val is not None
    assert [len(splits.train), len(splits.val)] == [16, 4]
    splits = load_dataset(tmp_path, fractions=(5, 4, 3))
    assert splits.val is not None
    assert [len(splits.train), len(splits.val)] == [5, 4]
    splits = load_dataset(tmp_path, fractions=(0.5, 0.2, None))
    assert splits.val is not None
    assert [len(splits.train), len(splits.val)] == [16, 4]


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "bus"):
        image(tmp_path / name / "a.png")
    assert load_dataset(tmp_path, fractions=(1, 0, 0)).classes == ["bus", "train"]


def test_folder_complaints(tmp_path):
    assert "no such file" in complaint(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    assert "no class folder" in complaint(tmp_path / "empty")
    flat = tmp_path / "flat"
    image(flat / "a.png")
    assert "no class folder" in complaint(flat)
    image(flat / "dog" / "b.png")
    assert "outside of any class folder" in (message := complaint(flat))
    assert "'a.png'" in message
    hole = class_folders(tmp_path / "hole", {"dog": 1})
    (hole / "cat").mkdir()
    assert str(hole / "cat") in complaint(hole)
    twice = tmp_path / "twice"
    for name in ("train", "val", "valid"):
        class_folders(twice / name, {"dog": 1})
    assert "two val folders" in complaint(twice)
    (tmp_path / "data.json").write_text("{}")
    assert ".json" in complaint(tmp_path / "data.json")


def test_class_missing_from_training(tmp_path):
    class_folders(tmp_path / "train", {"dog": 2})
    class_folders(tmp_path / "val", {"dog": 1, "cat": 1})
    message = complaint(tmp_path)
    assert "'cat' is missing from training" in message
    assert str(tmp_path / "val" / "cat" / "000.png") in message


def test_unreadable_folder(tmp_path, monkeypatch):
    class_folders(tmp_path, {"dog": 1, "cat": 1})
    real = os.scandir

    def scandir(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    message = complaint(tmp_path)
    assert str(tmp_path / "dog") in message
    assert "Permission denied" in message


# -- tables -----------------------------------------------------------------------------------------------------


def test_one_label(photos):
    file = table(photos / "a.csv", "path,label", "0.png,b", "1.png,a", "", "2.png , b ")
    splits = load_dataset(file, fractions=(1.0, 0.0, 0.0))
    assert (splits.task, splits.classes) == ("classify", ["a", "b"])
    assert splits.train.targets.tolist() == [1, 0, 1]
    assert names(splits.train) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("column", ["path", "image", "file", "filename"])
def test_column_of_images(photos, column):
    file = table(photos / "a.csv", f"id,{column},label", "7,0.png,b", "8,1.png,a")
    assert names(load_dataset(file, fractions=(1, 0, 0)).train) == ["0.png", "1.png"]


def test_paths_may_be_absolute_and_in_folders(photos):
    inner = image(photos / "in ner" / "x.png")
    file = table(photos / "a.csv", "path,label", f"{inner},b", "in ner/x.png,a")
    assert names(load_dataset(file, fractions=(1, 0, 0)).train) == ["x.png", "x.png"]


def test_several_labels(photos):
    file = table(photos / "a.csv", "path,labels", "0.png,sun;rain", "1.png,rain|wind", "2.png,", "3.png,sun;sun")
    splits = load_dataset(file, fractions=(1.0, 0.0, 0.0))
    assert (splits.task, splits.classes) == ("multilabel", ["rain", "sun", "wind"])
    assert splits.train.targets.tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert splits.train.targets.dtype == torch.float32


def test_columns_of_zeros_and_ones(photos):
    file = table(photos / "a.csv", "sun,path,rain,split", "1,0.png,0,train", "1,1.png,1,train", "0,2.png,1,test")
    splits = load_dataset(file, fractions=(1.0, 0.0, 0.0))
    assert (splits.task, splits.classes) == ("multilabel", ["sun", "rain"])
    assert splits.train.targets.tolist() == [[1, 0], [1, 1]]
    assert splits.test is not None
    assert splits.test.targets.tolist() == [[0, 1]]


def test_numbers(photos):
    file = table(photos / "a.csv", "path,target", "0.png,1.5", "1.png,-2e3")
    splits = load_dataset(file, fractions=(1.0, 0.0, 0.0))
    assert (splits.task, splits.classes) == ("regress", None)
    assert splits.train.targets.tolist() == [1.5, -2000.0]
    assert splits.train.targets.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "task"),
    [
        (("1.5", "2"), "regress"),
        (("1", "2"), "classify"),
        (("a", "2.5"), "classify"),
        (("a;b", "a"), "multilabel"),
    ],
)
def test_column_of_ones_own(photos, values, task):
    file = table(photos / "a.csv", "path,label,mine", f"0.png,x,{values[0]}", f"1.png,y,{values[1]}")
    assert load_dataset(file, target="mine", fractions=(1, 0, 0)).task == task


def test_choice_between_known_columns(photos):
    file = table(photos / "a.csv", "path,label,target", "0.png,x,1", "1.png,y,2")
    assert "label and target" in complaint(file)
    assert load_dataset(file, target="target", fractions=(1, 0, 0)).task == "regress"
    assert load_dataset(file, target="label", fractions=(1, 0, 0)).task == "classify"


def test_split_column(photos):
    rows = [f"{k}.png,{'ab'[k % 2]},{s}" for k, s in enumerate(["train", "TRAIN", "val", "validation", "test"])]
    splits = load_dataset(table(photos / "a.csv", "path,label,split", *rows))
    assert names(splits.train) == ["0.png", "1.png"]
    assert names(splits.val) == ["2.png", "3.png"]
    assert names(splits.test) == ["4.png"]


def test_tabs_and_byte_order_mark(photos):
    (photos / "a.tsv").write_text("\ufeffpath\tlabel\n0.png\ta, or b\n1.png\tc\n", encoding="utf-8")
    assert load_dataset(photos / "a.tsv", fractions=(1, 0, 0)).classes == ["a, or b", "c"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((), ["no rows"]),
        (("path,label",), ["no rows"]),
        (("name,label", "0.png,a"), ["no column of image paths"]),
        (("path,kind", "0.png,a"), ["no column of labels"]),
        (("path,label,label", "0.png,a,a"), ["'label' is there twice"]),
        (("path,label", "0.png,a", "1.png"), ["row 3", "1 values for 2 columns"]),
        (("path,label", "0.png,a", "1.png,"), ["row 3", "label is empty"]),
        (("path,label", "0.png,a", ",a"), ["row 3", "path is empty"]),
        (("path,label", "0.png,a", "gone.png,a"), ["row 3", "gone.png"]),
        (("path,label", "0.png,a", "..,a"), ["row 3", "no image"]),
        (("path,labels", "0.png,a;;b"), ["row 2", "'a;;b'"]),
        (("path,target", "0.png,1", "1.png,nan"), ["row 3", "not finite"]),
        (("path,target", "0.png,1", "1.png,inf"), ["row 3", "not finite"]),
        (("path,target", "0.png,1", "1.png,"), ["row 3", "no number"]),
        (("path,target", "0.png,1", "1.png,big"), ["row 3", "'big' is no number"]),
        (("path,label,split", "0.png,a,train", "1.png,a,hold"), ["row 3", "unknown split 'hold'"]),
        (("path,label,split", "0.png,a,train", "1.png,b,val"), ["row 3", "'b' is missing from training"]),
        (("path,labels,split", "0.png,a,train", "1.png,a;b,val"), ["row 3", "'b' is missing from training"]),
        (("path,label,split", "0.png,a,test"), ["no training split"]),
        (("path,x,y", "0.png,1,0", "1.png,2,0"), ["row 3", "'x' is '2'"]),
        (('path,label', '0.png,"a'), ["cannot be read"]),
    ],
)  # fmt: skip
def test_table_complaints(photos, rows, words):
    message = complaint(table(photos / "a.csv", *rows))
    assert str(photos / "a.csv") in message
    for word in words:
        assert word in message


def test_unreadable_tables(photos):
    (photos / "a.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    assert "cannot be read" in complaint(photos / "a.csv")
    file = table(photos / "b.csv", "path,label", "0.png,a")
    assert "It has: path, label" in complaint(file, target="age")
    assert "only CSV files" in complaint(class_folders(photos / "folders", {"dog": 2}), target="age")


# -- lists ------------------------------------------------------------------------------------------------------


@pytest.fixture
def vtab(tmp_path):
    for split, count in (("train800", 4), ("val200", 2), ("test", 3)):
        for k in range(count):
            image(tmp_path / "images" / split / f"{k}.jpg")
    for split, labels in (("train800", [0, 1, 2, 0]), ("val200", [1, 0]), ("test", [4, 0, 2])):
        table(tmp_path / f"{split}.txt", *(f"images/{split}/{k}.jpg {label}" for k, label in enumerate(labels)))
    lines = [(tmp_path / name).read_text() for name in ("train800.txt", "val200.txt")]
    (tmp_path / "train800val200.txt").write_text("".join(lines))
    return tmp_path


def test_vtab_lists(vtab):
    splits = load_dataset(vtab)
    assert splits.val is not None
    assert splits.test is not None
    assert splits.classes == ["0", "1", "2", "3", "4"]  # a class of an index list may be without training images
    assert splits.train.targets.tolist() == [0, 1, 2, 0]
    assert splits.val.targets.tolist() == [1, 0]
    assert splits.test.targets.tolist() == [4, 0, 2]
    assert Path(splits.train.paths[0]) == vtab / "images" / "train800" / "0.jpg"


def test_final_vtab_run(vtab):
    splits = load_dataset(vtab, train="train800val200.txt", test="test.txt", fractions=(1, 0, 0))
    assert splits.train.targets.tolist() == [0, 1, 2, 0, 1, 0]
    assert splits.val is None
    assert splits.test is not None
    (vtab / "train800.txt").unlink()  # without it, the folder itself means the same
    again = load_dataset(vtab, fractions=(1, 0, 0))
    assert (again.train.paths, again.val) == (splits.train.paths, None)
    assert again.test is not None
    assert again.test.paths == splits.test.paths


def test_list_with_blanks_in_paths(tmp_path):
    image(tmp_path / "a b.png")
    splits = load_dataset(table(tmp_path / "l.txt", "a b.png\t1", "", "a b.png  0 "), fractions=(1, 0, 0))
    assert names(splits.train) == ["a b.png", "a b.png"]
    assert splits.train.targets.tolist() == [1, 0]


@pytest.mark.parametrize("line", ["0.png", "0.png one", "0.png -1", "0.png 1.0", "1", "0.png 99999999999999999999"])
def test_malformed_lines(photos, line):
    message = complaint(table(photos / "l.txt", "0.png 0", line))
    assert f"{photos / 'l.txt'}, line 2" in message
    assert "no image path and class index" in message


def test_list_complaints(photos):
    assert "line 1: there is no image" in complaint(table(photos / "l.txt", "gone.png 0"))
    (photos / "l.txt").write_text("\n")
    assert "lists no image" in complaint(photos / "l.txt")
    (photos / "l.txt").write_bytes(b"\xff\xfe\xff 1\n")
    assert "cannot be read" in complaint(photos / "l.txt")


# -- named splits -----------------------------------------------------------------------------------------------


def test_named_splits_of_several_kinds(tmp_path):
    train = class_folders(tmp_path / "train", {"dog": 3, "cat": 3}, "train")
    image(tmp_path / "x.png")
    val = table(tmp_path / "val.csv", "path,label", "x.png,dog")
    both = class_folders(tmp_path / "more" / "train", {"dog": 1, "cat": 1}).parent
    class_folders(both / "test", {"cat": 1}, "test")
    splits = load_dataset(None, train=train, val=str(val), test=both)
    assert len(splits.train) == 6
    assert splits.val is not None
    assert splits.val.targets.tolist() == [1]
    assert names(splits.test) == ["test000.png"]


def test_named_splits_take_precedence(photos):
    rows = ["0.png,a,train", "1.png,b,train", "2.png,a,test"]
    file = table(photos / "a.csv", "path,label,split", *rows)
    other = table(photos / "b.csv", "path,label", "5.png,b")
    splits = load_dataset(file, test=other, fractions=(1.0, 0.0, 0.0))
    assert names(splits.train) == ["0.png", "1.png"]
    assert names(splits.test) == ["5.png"]


def test_named_split_complaints(photos):
    one = table(photos / "a.csv", "path,label", "0.png,a", "1.png,b")
    two = table(photos / "b.csv", "path,target", "0.png,1", "1.png,2")
    lists = table(photos / "l.txt", "0.png 0", "1.png 1")
    flags = [table(photos / f"{n}.csv", f"path,x,{n}", "0.png,1,0") for n in "yz"]
    assert "no data is named" in complaint(None, val=one)
    assert "is a regress split and training a classify split" in complaint(one, val=two)
    assert "names its classes in another way" in complaint(one, val=lists)
    assert "other classes" in complaint(flags[0], test=flags[1])
    split = table(photos / "s.csv", "path,label,split", "0.png,a,train", "1.png,b,test")
    assert "has no val split" in complaint(one, val=split)


def test_arguments(tmp_path):
    class_folders(tmp_path, {"dog": 4, "cat": 4})
    assert "cache" in complaint(tmp_path, cache="disk")
    assert "three sizes" in complaint(tmp_path, fractions=(0.5, 0.5))
    assert "no training image" in complaint(tmp_path, fractions=(0.0, 1.0, 0.0))
    assert "cannot hold one of each" in complaint(tmp_path, fractions=(1, 3, 3))


# -- bad images -------------------------------------------------------------------------------------------------


def test_bad_images_are_listed_or_stop_the_reading(tmp_path):
    class_folders(tmp_path, {"dog": 20, "cat": 20})
    bad = [tmp_path / "dog" / "003.png", tmp_path / "cat" / "011.png"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:50])
    splits = load_dataset(tmp_path, skip_bad_images=True, fractions=(1, 0, 0))
    assert sorted(path for path, _ in splits.skipped) == sorted(map(str, bad))
    assert all("cannot be decoded" in reason for _, reason in splits.skipped)
    assert len(splits.train) == 38
    assert splits.train.read(range(38), (4, 4)).shape == (38, 3, 4, 4)

    splits = load_dataset(tmp_path, fractions=(1, 0, 0))
    assert (len(splits.train), splits.skipped) == (40, [])
    with pytest.raises(DataError, match=r"cat/011\.png"):
        splits.train.read(range(40), (4, 4))


def test_nothing_left_of_a_class(tmp_path):
    class_folders(tmp_path, {"dog": 2, "cat": 1})
    (tmp_path / "cat" / "000.png").write_bytes(b"")
    message = complaint(tmp_path, skip_bad_images=True)
    assert "no image of class 'cat' can be decoded" in message
    assert str(tmp_path / "cat" / "000.png") in message


def test_bad_images_of_given_splits(tmp_path):
    class_folders(tmp_path / "train", {"dog": 2})
    class_folders(tmp_path / "val", {"dog": 2})
    (tmp_path / "val" / "dog" / "001.png").write_bytes(b"")
    splits = load_dataset(tmp_path, skip_bad_images=True)
    assert names(splits.val) == ["000.png"]
    assert len(splits.skipped) == 1


# -- images without labels --------------------------------------------------------------------------------------


def test_load_images(tmp_path):
    class_folders(tmp_path, {"dog": 2, "cat": 1})
    images, skipped = load_images(tmp_path)
    assert names(images) == ["000.png", "000.png", "001.png"]
    assert (images.targets.tolist(), skipped) == ([-1, -1, -1], [])
    several, _ = load_images([tmp_path / "dog" / "001.png", str(tmp_path / "cat")])
    assert [Path(path).parent.name for path in several.paths] == ["dog", "cat"]
    (tmp_path / "dog" / "000.png").write_bytes(b"")
    images, skipped = load_images(tmp_path, skip_bad_images=True)
    assert (len(images), [path for path, _ in skipped]) == (2, [str(tmp_path / "dog" / "000.png")])


def test_load_images_complaints(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load_images(tmp_path / "gone.png")
    with pytest.raises(DataError, match="no readable image"):
        load_images(tmp_path)
    with pytest.raises(DataError, match="no readable image"):
        load_images([])
