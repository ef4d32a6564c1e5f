"""Labels from tables and lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from photos import class_folders, complaint, image, names, table
from refold.data import load_dataset

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
