"""WebDataset shards: the images and labels that the webdataset library reads, and what a folder of files would give."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import refold
from refold import DataError, Preprocessing
from refold.data import ImageSet, Loader, load_dataset
from refold.training import TrainConfig, evaluate, train

SIZE = Preprocessing(size=(16, 16))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


def pixels(k: int) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def encoded(k: int, form: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(k)).save(file, form)
    return file.getvalue()


def write(path: Path, samples: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def shards(root: Path, sizes: dict[str, list[int]]) -> Path:
    """``SPLIT-0000.tar`` and so on, by the webdataset library; image k has class k % 3."""
    from webdataset.writer import TarWriter

    k = 0
    root.mkdir(parents=True, exist_ok=True)
    for split, counts in sizes.items():
        for number, count in enumerate(counts):
            with TarWriter(str(root / f"{split}-{number:04}.tar")) as writer:
                for _ in range(count):
                    writer.write({"__key__": f"some/{k:05}", "png": pixels(k), "cls": k % 3})
                    k += 1
    return root


def test_all_samples_are_those_that_webdataset_reads(tmp_path: Path) -> None:
    from webdataset import tariterators

    shards(tmp_path, {"train": [5, 1, 4]})
    found = load_dataset(str(tmp_path / "train-{0000..0002}.tar"), fractions=(1.0, 0.0, 0.0)).train
    expected: list[dict[str, Any]] = []
    for path in sorted(tmp_path.glob("*.tar")):
        with path.open("rb") as file:
            entries: Any = tariterators.tar_file_iterator(cast(Any, file))
            expected += tariterators.group_by_keys({**entry, "__url__": str(path)} for entry in entries)
    assert len(found) == len(expected) == 10
    assert found.targets.tolist() == [int(sample["cls"]) for sample in expected] == [k % 3 for k in range(10)]
    assert found.classes == ["0", "1", "2"]
    for image, sample in zip(found.read(range(10), (20, 24)), expected, strict=True):
        assert image.permute(1, 2, 0).tolist() == np.asarray(Image.open(io.BytesIO(sample["png"]))).tolist()
    assert found.paths[6] == f"{tmp_path}/train-0002.tar/some/00006.png"
    assert len(list(found.paths)) == 10


def test_batches_are_those_of_files(tmp_path: Path) -> None:
    """Shuffled, augmented, in parts, ahead in another process: the same to the bit as one file an image."""
    shards(tmp_path / "shards", {"train": [7, 6]})
    names = [tmp_path / f"{k}.png" for k in range(13)]
    for k, name in enumerate(names):
        Image.fromarray(pixels(k)).save(name)
    targets = torch.arange(13) % 3
    for cache in ("memory", "stream"):
        packed = load_dataset(tmp_path / "shards", fractions=(1.0, 0.0, 0.0), cache=cache).train
        files = ImageSet(names, targets, cache=cache)
        for options in ({}, {"augment": "light", "rank": 1, "world": 2}, {"workers": 1}):
            one, other = (
                Loader(part, SIZE, batch_size=4, shuffle=True, **options)  # type: ignore[arg-type]
                for part in (packed, files)
            )
            for loader in (one, other):
                loader.set_epoch(2, 1)
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a[0], b[0])
                assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("layout", ["prefix", "inside", "folders"])
def test_splits_are_told_by_names(tmp_path: Path, layout: str) -> None:
    for k, split in enumerate(("train", "train", "validation", "test")):
        name = {"prefix": f"{split}-{k}.tar", "inside": f"cars-{split}-{k}.tar", "folders": f"{split}/{k}.tar"}[layout]
        samples = {f"{k}{i}.png": encoded(i) for i in range(k + 1)} | {f"{k}{i}.cls": b"1" for i in range(k + 1)}
        write(tmp_path / name, samples)
    parts = load_dataset(tmp_path)
    assert parts.val is not None
    assert parts.test is not None
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [3, 3, 4]
    assert parts.classes == ["0", "1"]


def test_named_splits_and_drawn_ones(tmp_path: Path) -> None:
    shards(tmp_path, {"train": [30, 30], "extra": [9]})
    parts = load_dataset(tmp_path, train="train-{0000..0001}.tar", test="extra-0000.tar")
    assert parts.val is not None
    assert parts.test is not None
    assert (len(parts.train), len(parts.val), len(parts.test)) == (48, 12, 9)
    assert torch.bincount(parts.val.targets).tolist() == [4, 4, 4]
    both = {*parts.train.paths, *parts.val.paths}
    assert len(both) == 60
    again = load_dataset(tmp_path / "train-{0000..0001}.tar", test=tmp_path / "extra-0000.tar")
    assert list(again.train.paths) == list(parts.train.paths)


def test_what_an_index_costs_is_paid_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refold.data import shards as module

    path = shards(tmp_path, {"train": [6]}) / "train-0000.tar"
    read: list[Path] = []
    original = module._read_tar
    monkeypatch.setattr(module, "_read_tar", lambda file, *rest: read.append(file) or original(file, *rest))
    sets = [load_dataset(path, fractions=(1.0, 0.0, 0.0)).train for _ in range(2)]
    assert read == [path]
    assert torch.equal(sets[0].read(range(6), (8, 8)), sets[1].read(range(6), (8, 8)))
    write(path, {"a.png": encoded(1), "a.cls": b"0"})  # another file of the same name
    assert len(load_dataset(path, fractions=(1.0, 0.0, 0.0)).train) == 1
    assert read == [path, path]


@pytest.mark.parametrize(
    ("labels", "task", "classes", "targets"),
    [
        ([{"label": "cat"}, {"label": "ant"}, {"label": "cat"}], "classify", ["ant", "cat"], [1, 0, 1]),
        ([{"label": 3}, {"label": 0}, {"label": 3}], "classify", ["0", "1", "2", "3"], [3, 0, 3]),
        ([{"labels": ["a", "b"]}, {"labels": []}, {"labels": ["b"]}], "multilabel", ["a", "b"],
         [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]),
        ([{"target": 1.5}, {"target": -2}, {"target": 1.5}], "regress", None, [1.5, -2.0, 1.5]),
    ],
)  # fmt: skip
def test_labels_in_json(
    tmp_path: Path, labels: list[dict[str, Any]], task: str, classes: list[str] | None, targets: list[Any]
) -> None:
    samples: dict[str, bytes] = {"README": b"", ".hidden.png": b"", "k.txt": b"what it shows"}
    for k, label in enumerate(labels):
        samples |= {f"a/{k}.jpg": encoded(k, "JPEG"), f"a/{k}.json": json.dumps({"width": 24, **label}).encode()}
    found = load_dataset(write(tmp_path / "x.tar", samples), fractions=(1.0, 0.0, 0.0))
    assert (found.task, found.classes) == (task, classes)
    assert found.train.targets.tolist() == targets


def test_a_field_is_named(tmp_path: Path) -> None:
    samples = {"0.webp": encoded(0, "WEBP"), "0.cls": b"7", "0.json": b'{"breed": "pug", "age": 2.5}'}
    path = write(tmp_path / "x.tar", samples)
    assert load_dataset(path, fractions=(1.0, 0.0, 0.0)).train.targets.tolist() == [7]
    breed = load_dataset(path, target="breed", fractions=(1.0, 0.0, 0.0))
    assert (breed.task, breed.classes) == ("classify", ["pug"])
    age = load_dataset(path, target="age", fractions=(1.0, 0.0, 0.0))
    assert (age.task, age.train.targets.tolist()) == ("regress", [2.5])
    with pytest.raises(DataError, match=r"x\.tar, 0\.json: has no field 'colour'.*It has: breed, age"):
        load_dataset(path, target="colour")


GOOD = {"0.png": encoded(0), "0.cls": b"0"}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"0.png": encoded(0)}, r"x\.tar, 0\.png: the image has no label"),
        ({"0.cls": b"1", "1.png": encoded(0), "1.cls": b"0"}, r"x\.tar, 0: the sample has a label and no image"),
        ({**GOOD, "0.jpg": encoded(0, "JPEG")}, r"0\.jpg: the sample has another image, '0\.png'"),
        ({"0.txt": b"nothing"}, r"x\.tar: the shard holds no image"),
        ({"0.png": encoded(0), "0.cls": b" "}, r"0\.cls: the label is empty"),
        ({"0.png": encoded(0), "0.json": b"{"}, r"0\.json: is no JSON"),
        ({"0.png": encoded(0), "0.json": b'{"label": 0, "target": 1}'}, "has the fields label and target"),
        ({"0.png": encoded(0), "0.json": b'{"label": -1}'}, "neither an index nor a name"),
        ({**GOOD, "1.png": encoded(0), "1.json": b'{"target": 1}'}, "holds labels to classify and regress"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, samples: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(write(tmp_path / "x.tar", samples))


def test_bad_shards_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x-0.tar", {**GOOD, "1.png": encoded(1), "1.cls": b"0"})
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"x-7\.tar: there is no such shard"):
        load_dataset(str(tmp_path / "x-{0,7}.tar"))
    (tmp_path / "x-0.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"compressed shard.*Unpack it"):
        load_dataset(tmp_path / "x-0.tar.gz")
    with pytest.raises(DataError, match=r"on disk.*hf-dataset:"):
        load_dataset("https://example.org/x-{0..7}.tar")
    path.write_bytes(whole[: len(whole) // 4])
    with pytest.raises(DataError, match=r"x-0\.tar: the shard cannot be read"):
        load_dataset(path)
    write(path, {"0.png": b"no image", "0.cls": b"0", "1.png": encoded(1), "1.cls": b"0"})
    found = load_dataset(path, fractions=(1.0, 0.0, 0.0))
    with pytest.raises(DataError, match=r"x-0\.tar/0\.png: the image cannot be decoded"):
        found.train.read([0], (8, 8))
    left = load_dataset(path, fractions=(1.0, 0.0, 0.0), skip_bad_images=True)
    assert list(left.train.paths) == [f"{path}/1.png"]
    assert [name for name, _ in left.skipped] == [f"{path}/0.png"]
    write(tmp_path / "train-1.tar", GOOD)
    with pytest.raises(DataError, match=r"x-0\.tar: the name tells no split, and others do"):
        load_dataset(tmp_path)


def test_an_archive_beside_class_folders_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels(0)).save(tmp_path / "a" / "0.png")
    write(tmp_path / "backup.tar", {"anything": b""})
    assert load_dataset(tmp_path, fractions=(1.0, 0.0, 0.0)).classes == ["a"]


def test_a_run_on_shards_from_start_to_end(tmp_path: Path) -> None:
    """With a mid-epoch stop, as the same images in files: files and shards are told apart by nothing but paths."""
    shards(tmp_path / "shards", {"train": [9, 9], "val": [6], "test": [7]})
    config = TrainConfig(
        data=str(tmp_path / "shards"), model="timm/test_vit", pretrained=False, image_size=32, epochs=2, batch_size=4,
        method=refold.RepAdapter(rank=4), output=str(tmp_path / "run"), precision="fp32", attention="default",
    )  # fmt: skip
    result = train(config)
    assert result.summary["images"] == {"train": 18, "val": 6, "test": 7}
    rows = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [
        f"{tmp_path}/shards/test-0000.tar/some/{k:05}.png" for k in range(24, 31)
    ]
    scored = evaluate(result.model, str(tmp_path / "shards" / "test-{0000..0000}.tar"), split="test")
    assert scored.metrics["accuracy"] == result.metrics["test"]["accuracy"]
