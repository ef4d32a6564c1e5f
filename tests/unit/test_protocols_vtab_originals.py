"""``refold vtab --prepare`` on tiny sets in the layouts of the downloads: those that torchvision reads, and folders."""

from __future__ import annotations

import pickle
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import run
from originals import Expected, cycle, levels, linked, prepared, say_their_labels
from refold.data import ImageSet
from refold.errors import DataError, MissingExtraError
from refold.protocols import TASKS, prepare
from refold.protocols.vtab_originals import ORIGINALS


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> Expected:
    return Expected(monkeypatch)


def cifar(root: Path, patch: pytest.MonkeyPatch, expected: Expected) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split, count in (("train", 1010), ("test", 100)):
        labels = cycle(count, 100)
        content = {"data": levels(labels, 3072).copy(), "fine_labels": labels}
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list("ab")}))
    from torchvision.datasets import CIFAR100

    patch.setattr(CIFAR100, "train_list", [["train", None]])
    patch.setattr(CIFAR100, "test_list", [["test", None]])
    patch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})
    expected("cifar", 100, train=1010, test=100)


def gray(*parts: ImageSet) -> None:
    for part in parts:
        for path, target in zip(part.paths, part.targets.tolist(), strict=True):
            with Image.open(path) as image:
                assert np.unique(np.asarray(image)).tolist() == [target]


def test_cifar_is_written_once_and_lists_that_are_there_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Expected
) -> None:
    downloads, root = tmp_path / "downloads", tmp_path / "vtab"
    cifar(downloads, monkeypatch, expected)
    gray(*prepared(root, "cifar", originals=downloads, seed=3))
    with Image.open(root / "cifar" / "images" / "test-000004.png") as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    assert len([path for path in before if path.suffix == ".png"]) == 1100
    assert prepare(root, ["cifar"], originals=downloads, seed=4) == {}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.*")} == before
    # Only the lists are missing: what is written is not written again, and the same seed draws the same.
    lists = {path: path.read_text() for path in (root / "cifar").glob("*.txt")}
    for path in lists:
        path.unlink()
    told: list[tuple[str, list[str]]] = []
    prepare(root, ["cifar"], originals=downloads, seed=3, on_task=lambda *one: told.append(one))
    assert told == [("cifar", ["800 and 200 images drawn with seed 3, not those of NOAH's lists"])]
    assert {path: path.read_text() for path in lists} == lists
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.suffix == ".png")


def test_svhn_has_ten_for_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Expected) -> None:
    from scipy import io as matlab
    from torchvision.datasets import SVHN

    for split, count in (("train", 1000), ("test", 20)):
        labels = cycle(count, 10)
        pixels = np.ascontiguousarray(levels(labels, 32, 32, 3).transpose(1, 2, 3, 0))
        digits = np.array(labels, np.uint8)[:, None]
        matlab.savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.where(digits == 0, 10, digits)})
    monkeypatch.setattr(SVHN, "split_list", {s: ["", f"{s}_32x32.mat", None] for s in ("train", "test")})
    expected("svhn", 20, train=1000, test=20)
    gray(*prepared(tmp_path, "svhn"))


def test_camelyon_needs_h5py_and_keeps_its_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Expected
) -> None:
    import h5py

    base = tmp_path / "pcam"
    base.mkdir()
    sizes = {"train": 900, "val": 250, "test": 10}
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "h5py", None)
        with pytest.raises(MissingExtraError, match=r"pcam: the package 'h5py' is not installed.*refold\[vtab\]"):
            prepare(tmp_path, ["patch_camelyon"])
    for split, (part, count) in zip(("train", "valid", "test"), sizes.items(), strict=True):
        labels = np.array(cycle(count, 2), np.uint8)
        for name, content in {
            "x": np.broadcast_to(labels.reshape(-1, 1, 1, 1), (count, 4, 4, 3)),
            "y": labels.reshape(-1, 1, 1, 1),
        }.items():
            with h5py.File(base / f"camelyonpatch_level_2_split_{split}_{name}.h5", "w") as file:
                file[name] = content
        assert part[:3] == split[:3]
    expected("patch_camelyon", 10, **sizes)
    train, val, test = prepared(tmp_path, "patch_camelyon")
    gray(train, val, test)
    assert {Path(path).name.split("-")[0] for path in val.paths} == {"val"}
    assert {Path(path).name.split("-")[0] for path in train.paths} == {"train"}


def test_lists_of_the_sets_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Expected) -> None:
    from scipy import io as matlab
    from torchvision.datasets import Flowers102

    sizes = {"train": 850, "val": 210, "test": 50}
    dtd, flowers = tmp_path / "dtd" / "dtd", tmp_path / "flowers-102"
    (dtd / "labels").mkdir(parents=True)
    ids, every = {}, []
    for split, count in sizes.items():
        labels = cycle(count, 47)
        names = [f"class{label:02}/{split}_{k}.jpg" for k, label in enumerate(labels)]
        linked(dtd / "images", labels, names)
        (dtd / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))
        key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
        ids[key] = np.arange(count) + len(every) + 1
        every += cycle(count, 5)
    linked(flowers, every, [f"jpg/image_{k + 1:05}.jpg" for k in range(len(every))])
    matlab.savemat(flowers / "setid.mat", ids)
    matlab.savemat(flowers / "imagelabels.mat", {"labels": np.array(every) + 1})
    files = {name: (file, None) for name, (file, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    expected("dtd", 50, **sizes)
    expected("oxford_flowers102", 50, classes=5, **sizes)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    for name, root in (("dtd", tmp_path), ("oxford_flowers102", tmp_path / "link")):
        train, val, test = prepared(root, name, originals=tmp_path)
        say_their_labels(train, val, test)
    assert (tmp_path / "dtd" / "test.txt").read_text().startswith("dtd/images/class00/test_0.jpg 0\n")
    assert {Path(path).name for path in test.paths} == {f"image_{k:05}.jpg" for k in range(1061, 1111)}

    pets = tmp_path / "oxford-iiit-pet"
    for file, count in (("trainval.txt", 1000), ("test.txt", 37)):
        labels = cycle(count, 37)
        names = [f"great_dane_{label}_{file[:-4]}{k}" for k, label in enumerate(labels)]
        linked(pets / "images", labels, [f"{name}.jpg" for name in names])
        (pets / "annotations").mkdir(exist_ok=True)
        lines = [f"{name} {label + 1} 1 2\n" for name, label in zip(names, labels, strict=True)]
        (pets / "annotations" / file).write_text("".join(lines))
    expected("oxford_iiit_pet", 37, train=1000, test=37)
    say_their_labels(*prepared(tmp_path, "oxford_iiit_pet"))


def test_one_pool_is_divided_by_seed(tmp_path: Path, expected: Expected) -> None:
    for name, place in (("eurosat", "eurosat/2750"), ("resisc45", "NWPU-RESISC45")):
        classes, count = TASKS[name].classes, 1100 if name == "eurosat" else 1170
        labels = cycle(count, classes)
        linked(tmp_path, labels, [f"{place}/class {label:02}/{k}.jpg" for k, label in enumerate(labels)])
        expected(name, 90, all=count)
        (notes,) = prepare(tmp_path / "again", [name], originals=tmp_path, seed=5).values()
        assert notes == [
            "800 and 200 images drawn with seed 5, not those of NOAH's lists",
            "90 test images drawn with that seed",
        ]
        train, val, test = prepared(tmp_path, name, seed=6)
        say_their_labels(train, val, test)
        assert len(Counter(test.targets.tolist())) >= 5
        other = (tmp_path / "again" / name / "test.txt").read_text()
        assert other != (tmp_path / name / "test.txt").read_text()

    places = ["a/abbey", "c/church/indoor", "c/church/outdoor"]
    labels = cycle(1050, 3)
    linked(tmp_path / "SUN397", labels, [f"{places[label]}/sun_{k}.jpg" for k, label in enumerate(labels)])
    linked(tmp_path / "SUN397", [9], ["c/church/outdoor/sun_bhenjvsvrtumjuri.jpg"])
    (tmp_path / "SUN397" / "ClassName.txt").write_text("".join(f"/{place}\n" for place in places))
    expected("sun397", 50, classes=3, all=1050)
    say_their_labels(*prepared(tmp_path, "sun397"))


def test_caltech_trains_on_thirty_of_each_class_and_knows_the_background(tmp_path: Path, expected: Expected) -> None:
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    names = sorted(["BACKGROUND_Google", *(f"kind{k:03}" for k in range(101))])
    sizes = {name: 31 + k % 3 for k, name in enumerate(names)}
    labels = [k for k, name in enumerate(names) for _ in range(sizes[name])]
    linked(folder, labels, [f"{name}/image_{k:04}.jpg" for name in names for k in range(sizes[name])])
    (folder / "BACKGROUND_Google" / "tmp").write_bytes(b"it is there in the archive")
    rest = sum(sizes.values()) - 30 * 102
    expected("caltech101", rest, train=3060, test=rest)
    train, val, test = prepared(tmp_path, "caltech101")
    say_their_labels(train, val, test)
    assert Counter(test.targets.tolist()) == {k: 1 + k % 3 for k in range(102)}


def test_what_is_missing_short_or_damaged_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Expected
) -> None:
    assert set(ORIGINALS) == set(TASKS)
    assert all(ORIGINALS[name].counts.get("test", task.test) >= task.test for name, task in TASKS.items())
    cifar(tmp_path, monkeypatch, expected)
    with pytest.raises(
        DataError, match=r"no images of dsprites_loc, dsprites_ori.*Download dSprites, .*npz\); or"
    ) as no:
        prepare(tmp_path, ["cifar", "dsprites_loc", "dsprites_ori"])
    assert str(no.value).count("github.com/deepmind/dsprites-dataset") == 1
    assert (tmp_path / "cifar" / "test.txt").is_file()  # what is there was prepared before the complaint
    expected("cifar", 100, train=50_000, test=100)
    with pytest.raises(DataError, match="holds 1,010 train images, not 50,000"):
        prepare(tmp_path / "a", ["cifar"], originals=tmp_path)
    expected("cifar", 100, classes=101, train=1010, test=100)
    with pytest.raises(DataError, match="has 100 classes; CIFAR-100 has 101"):
        prepare(tmp_path / "b", ["cifar"], originals=tmp_path)
    expected("cifar", 100, classes=99, train=1010, test=100)
    with pytest.raises(DataError, match="has class 99; CIFAR-100 has 99"):
        prepare(tmp_path / "c", ["cifar"], originals=tmp_path)
    (tmp_path / "cifar-100-python" / "test").unlink()
    with pytest.raises(DataError, match=r"cifar-100-python: files are missing or damaged\. Download CIFAR-100"):
        prepare(tmp_path / "d", ["cifar"], originals=tmp_path)
    linked(tmp_path, cycle(1090, 10), [f"eurosat/2750/{k % 10}/{k}.jpg" for k in range(1090)])
    expected("eurosat", 100, all=1090)
    with pytest.raises(DataError, match="EuroSAT: leaves 190 val images; VTAB-1k has 200"):
        prepare(tmp_path / "e", ["eurosat"], originals=tmp_path)
    with pytest.raises(DataError, match="no such task"):
        prepare(tmp_path, ["mnist"])


def test_the_command_prepares(tmp_path: Path) -> None:
    done = run("vtab", "--root", str(tmp_path), "--prepare", "--tasks", "svhn", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "Download SVHN cropped digits, ufldl.stanford.edu/housenumbers" in done.stderr
    done = run("vtab", "--root", str(tmp_path), "--originals", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "Add --prepare" in done.stderr
