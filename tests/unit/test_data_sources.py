"""Folders, tables and lists: what is read from them, how they are split, and every complaint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from photos import class_folders, complaint, image, names, table
from refold import DataError
from refold.data import load_dataset, load_images

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
