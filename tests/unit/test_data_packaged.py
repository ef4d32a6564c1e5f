"""The packaged data sets: what is in them, and the cache of their pixels."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refold import DataError, MissingExtraError
from refold.data import load_dataset, packaged
from refold.data.packages import PACKAGED


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def few(monkeypatch):
    """Every fiftieth image of each package: the same code, less time."""
    for name, entry in list(PACKAGED.items()):
        monkeypatch.setitem(
            PACKAGED, name, dataclasses.replace(entry, labelled=lambda root, e=entry: e.labelled(root)[::50])
        )


@pytest.mark.parametrize(
    ("name", "classes", "counts"),
    [
        ("elpv", ["functional", "defective"], [1803, 821]),
        ("textile", ["nominal", "local", "global"], [1000, 500, 500]),
    ],
)
def test_labels(name, classes, counts, monkeypatch):
    monkeypatch.setattr("refold.data.packages._decoded", lambda *_: None)
    images = packaged(name)
    assert images.classes == classes
    assert images.targets.bincount().tolist() == counts
    assert len(set(images.paths)) == sum(counts)
    assert all(Path(path).is_file() for path in images.paths)


def test_elpv_labels_follow_the_package(few):
    table = importlib.resources.files("elpv_dataset") / "data" / "labels.csv"
    rows = np.genfromtxt(str(table), dtype=None, encoding="utf-8", names=["path", "probability", "type"])[::50]
    images = packaged("elpv")
    assert np.array_equal(images.targets.numpy(), rows["probability"] > 0.5)
    for k, name in enumerate(rows["path"][:5]):
        with Image.open(str(table).replace("labels.csv", name)) as image:
            assert np.array_equal(images.read([k], (300, 300))[0, 0].numpy(), np.asarray(image))
    assert "CC-BY-NC-SA-4.0" in str(images.licence)


def test_textile_images(few):
    images = packaged("textile")
    assert images.channels == 3
    with Image.open(images.paths[7]) as image:
        assert np.array_equal(images.read([7], (250, 250))[0].permute(1, 2, 0).numpy(), np.asarray(image))
    assert str(images.licence).startswith("MIT")


def test_channels_as_asked(few):
    assert packaged("elpv").read([0], (8, 8)).shape == (1, 1, 8, 8)
    assert packaged("elpv", channels=3).read([0], (8, 8)).shape == (1, 3, 8, 8)
    assert packaged("textile", channels=1).read([0], (8, 8)).shape == (1, 1, 8, 8)


def test_second_time_comes_from_the_cache(few, cache, monkeypatch):
    first = packaged("elpv").read(range(10), (30, 30))
    file = cache / f"elpv-{importlib.metadata.version('elpv-dataset')}.npy"
    assert list(cache.iterdir()) == [file]

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("refold.data.packages.decode", refuse)
    assert torch.equal(packaged("elpv").read(range(10), (30, 30)), first)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "shape", "pickle"])
def test_unsound_cache_is_made_anew(few, cache, damage):
    first = packaged("elpv").read(range(10), (30, 30))
    (file,) = cache.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage in ("empty", "other"):
        file.write_bytes(b"" if damage == "empty" else b"something else")
    elif damage == "shape":
        np.save(file, np.zeros((3, 300, 300), np.uint8))
    else:
        np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert torch.equal(packaged("elpv").read(range(10), (30, 30)), first)
    assert np.load(file, mmap_mode="r").shape == (53, 300, 300)


def test_cache_that_cannot_be_written(few, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFOLD_CACHE", str(tmp_path / "file" / "below"))
    assert len(packaged("elpv").read([0, 1], (8, 8))) == 2


def test_as_a_source(few):
    splits = load_dataset("packaged/elpv", fractions=(20, 10, None), seed=1)
    assert splits.val is not None
    assert splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [20, 10, 23]
    assert splits.classes == ["functional", "defective"]
    assert splits.train.licence == packaged("elpv").licence
    with pytest.raises(DataError, match="neither split files nor columns"):
        load_dataset("packaged/elpv", val="val.txt")


def test_unknown_name():
    with pytest.raises(DataError, match="Known: elpv, textile"):
        load_dataset("packaged/mnist")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(PACKAGED, "elpv", dataclasses.replace(PACKAGED["elpv"], module="no_such_package"))
    with pytest.raises(MissingExtraError, match=r"pip install 'refold\[demo\]'"):
        packaged("elpv")


def test_package_with_other_content(monkeypatch):
    monkeypatch.setitem(PACKAGED, "elpv", dataclasses.replace(PACKAGED["elpv"], module="conformal_clip_data"))
    with pytest.raises(DataError, match="unexpected content"):
        packaged("elpv")
    monkeypatch.undo()
    monkeypatch.setitem(PACKAGED, "elpv", dataclasses.replace(PACKAGED["elpv"], size=(10, 10)))
    with pytest.raises(DataError, match="300 x 300 pixels"):
        packaged("elpv")
