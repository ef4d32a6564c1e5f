"""Hugging Face data sets as streams: every image once, the same order again, and going on in the middle of it."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import refold
from refold import DataError, Preprocessing
from refold.data import Splits, load_dataset
from refold.data.streams import StreamLoader, StreamSet
from refold.training import TrainConfig, train
from stopping import Stopped, interrupt_at

datasets = pytest.importorskip("datasets")

SIZE = Preprocessing(size=(8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.001)  # seconds, at the end of each pass
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


def encoded(k: int) -> bytes:
    """A picture of one colour, which says which it is: number k in red and green."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (k % 256, k // 256, 100)).save(file, "PNG")
    return file.getvalue()


def parquet(root: Path, sizes: dict[str, list[int]], label: Any = None, values: Any = None, **columns: Any) -> Path:
    """``SPLIT-0000.parquet`` and so on; image k, counted over all, has label k % 2, or ``values(k)``."""
    root.mkdir(parents=True, exist_ok=True)
    kinds = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=["cat", "dog"])} | columns
    k = 0
    for split, counts in sizes.items():
        for number, count in enumerate(counts):
            numbers = range(k, k + count)
            k += count
            rows = {
                "image": [{"bytes": encoded(i), "path": None} for i in numbers],
                "label": [i % 2 if values is None else values(i) for i in numbers],
                **{name: [1] * count for name in columns},
            }
            made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
            made.to_parquet(str(root / f"{split}-{number:04}.parquet"))
    return root


def load(root: Path, **options: Any) -> Splits:
    return load_dataset(f"hf-dataset:{root}", fractions=(1.0, 0.0, 0.0), **options)


def stream(root: Path, **options: Any) -> StreamSet:
    found = load(root, **options).train
    assert isinstance(found, StreamSet)
    return found


def numbers(batches: Any) -> list[int]:
    """Which images came, in order."""
    return [n for images, _ in batches for n in _numbers(images)]


def _numbers(images: Tensor) -> list[int]:
    red, green = ((255 * images[:, c, 0, 0]).round().long() for c in (0, 1))
    return (red + 256 * green).tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 37 images; other splits of one."""
    return parquet(tmp_path_factory.mktemp("set"), {"train": [7, 11, 9, 10], "validation": [9], "test": [5]})


def test_splits_columns_and_classes_are_found(root: Path) -> None:
    parts = load(root)
    assert parts.val is not None
    assert parts.test is not None
    assert (len(parts.train), len(parts.val), len(parts.test)) == (37, 9, 5)
    assert (parts.task, parts.classes) == ("classify", ["cat", "dog"])
    assert parts.val.targets.tolist() == [k % 2 for k in range(37, 46)]
    assert parts.test.paths[4] == f"hf-dataset:{root}/test/4"
    assert _numbers(parts.test.read([3, 0, 3], (8, 8)) / 255) == [49, 46, 49]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_image_once_in_order(root: Path, world: int, workers: int) -> None:
    found = stream(root)
    for rank in range(world):
        loader = StreamLoader(found, SIZE, batch_size=4 * world, workers=workers, rank=rank, world=world)
        batches = list(loader)
        assert numbers(batches) == list(range(rank, 37, world))
        assert torch.cat([targets for _, targets in batches]).tolist() == [k % 2 for k in range(rank, 37, world)]
        assert len(loader) == len(batches)


def test_training_orders(root: Path) -> None:
    """Complete, mixed over shards, other in each epoch, the same for the same seed."""
    found = stream(root)
    loader = StreamLoader(found, SIZE, batch_size=5, shuffle=True, block=6)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert sorted(numbers(batches)) == list(range(37))
        assert all(
            target == n % 2 for images, targets in batches for n, target in zip(_numbers(images), targets, strict=True)
        )
        assert len({0 if n < 7 else 1 if n < 18 else 2 if n < 27 else 3 for n in numbers(batches)[:10]}) > 2
        orders.append(numbers(batches))
    assert len({tuple(order) for order in orders}) == 3
    loader.set_epoch(1)
    assert numbers(loader) == orders[1]
    again = StreamLoader(found, SIZE, batch_size=5, shuffle=True, block=6, workers=3)
    again.set_epoch(2)
    assert numbers(again) == orders[2]
    other = StreamLoader(found, SIZE, batch_size=5, shuffle=True, block=6, seed=1)
    assert numbers(other) != orders[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_images_of_an_epoch(root: Path, world: int) -> None:
    """Full batches alone, equally many for each; where shards are divided, one that has fewer begins again."""
    found = stream(root)
    parts = [
        StreamLoader(
            found, SIZE, batch_size=3 * world, shuffle=True, drop_last=True, block=4, rank=rank, world=world
        )
        for rank in range(world)
    ]  # fmt: skip
    seen = [numbers(part) for part in parts]
    assert {len(part) for part in seen} == {37 // (3 * world) * 3}
    times = Counter(n for part in seen for n in part)
    assert len(times) >= 37 // (3 * world) * 3 * world - 4
    for k, one in enumerate(seen):
        for other in seen[:k]:
            assert not set(one) & set(other)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("block", [1, 4, 6, 100])
def test_going_on_in_the_middle(root: Path, world: int, block: int, workers: int) -> None:
    """After each batch: from the state it left, with its augmentation, and without one, by reading again."""
    found = stream(root)

    def loader() -> StreamLoader:
        return StreamLoader(
            found, SIZE, batch_size=4 * world, shuffle=True, augment="flip", block=block, rank=world - 1, world=world,
            workers=workers, seed=3,
        )  # fmt: skip

    whole = loader()
    whole.set_epoch(1)
    batches, states = [], []
    for batch in whole:
        batches.append(batch)
        states.append(whole.state())
    starts = range(1, len(batches)) if workers == 0 else (3,)
    for start in starts:
        for state in (states[start - 1], None):
            resumed = loader()
            resumed.set_epoch(1, start, state)
            rest = list(resumed)
            assert len(rest) == len(batches) - start
            for (images, targets), (expected, wanted) in zip(rest, batches[start:], strict=True):
                assert torch.equal(images, expected)
                assert torch.equal(targets, wanted)


def test_what_comes_back_of_a_state_reads_no_image_before_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stream(root)
    loader = StreamLoader(found, SIZE, batch_size=4, shuffle=True, block=4)
    for _, batch in zip(range(7), loader, strict=False):
        assert batch is not None
    state = loader.state()
    opened: list[Any] = []
    content = StreamSet.content
    monkeypatch.setattr(StreamSet, "content", lambda self, row: opened.append(row) or content(self, row))
    resumed = StreamLoader(found, SIZE, batch_size=4, shuffle=True, block=4)
    resumed.set_epoch(0, 7, state)
    assert sum(len(targets) for _, targets in resumed) == len(opened) == 37 - 28


@pytest.mark.parametrize(
    ("label", "values", "task", "classes", "targets"),
    [
        ("string", lambda k: "ab"[k % 2], "classify", ["a", "b"], [0, 1, 0, 1]),
        ("int64", lambda k: 2 * (k % 2), "classify", ["0", "1", "2"], [0, 2, 0, 2]),
        ("float32", lambda k: k / 2, "regress", None, [0.0, 0.5, 1.0, 1.5]),
        (["a", "b"], lambda k: [[], [0], [1], [1, 0]][k], "multilabel", ["a", "b"], [[0, 0], [1, 0], [0, 1], [1, 1]]),
    ],
)
def test_kinds_of_labels(tmp_path: Path, label: Any, values: Any, task: str, classes: Any, targets: Any) -> None:
    kind = datasets.List(datasets.ClassLabel(names=label)) if isinstance(label, list) else datasets.Value(label)
    found = load(parquet(tmp_path, {"train": [4]}, kind, values))
    assert (found.task, found.classes) == (task, classes)
    assert found.train.targets.tolist() == targets
    assert isinstance(found.train, StreamSet)
    for images, some in StreamLoader(found.train, SIZE, batch_size=2, shuffle=True):
        assert some.tolist() == [targets[n] for n in _numbers(images)]


def test_a_folder_of_images_is_one_too(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "train" / name / f"{k}.png").write_bytes(encoded(k))
    found = stream(tmp_path)
    assert (found.classes, found.targets.tolist()) == (["ant", "bee"], [0, 0, 0, 1, 1, 1])
    assert numbers(StreamLoader(found, SIZE, batch_size=4)) == [0, 1, 2, 0, 1, 2]


def test_labels_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refold.data import stream_sources

    parquet(tmp_path, {"train": [6]})
    titles: list[str] = []
    original = stream_sources.counted
    monkeypatch.setattr(stream_sources, "counted", lambda rows, title: titles.append(title) or original(rows, title))
    assert stream(tmp_path).targets.tolist() == stream(tmp_path).targets.tolist() == [0, 1] * 3
    assert len(titles) == 1
    parquet(tmp_path, {"train": [8]})
    assert len(stream(tmp_path)) == 8
    assert len(titles) == 2


def test_what_cannot_be_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be opened"):
        load(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"has no split 'training'.*It has: train, validation, test"):
        load(root, train="training")
    (two := tmp_path / "two").mkdir()
    kinds = {"image": datasets.Image()} | {name: datasets.ClassLabel(names=[*name]) for name in ("fine", "raw")}
    rows = {"image": [{"bytes": encoded(0), "path": None}], "fine": [3], "raw": [1]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(str(two / "train.parquet"))
    with pytest.raises(DataError, match=r"does not show a column of labels.*It has: image, fine, raw"):
        load(two)
    assert stream(two, target="raw").classes == ["r", "a", "w"]
    with pytest.raises(DataError, match="does not show the column 'colour'"):
        load(two, target="colour")
    with pytest.raises(DataError, match=r"column 'image' .* holds no labels"):
        load(two, target="image")
    with pytest.raises(DataError, match=r"has no val split, and none is drawn from a stream.*--split 1 0 0"):
        load_dataset(f"hf-dataset:{two}", target="fine")
    with pytest.raises(DataError, match="not looked at before"):
        load(root, skip_bad_images=True)
    hidden = parquet(tmp_path / "hidden", {"train": [3]}, values=lambda k: -1)
    with pytest.raises(DataError, match=r"train/0: an image has the label"):
        load(hidden)
    parquet(hidden, {"train": [3], "test": [2]}, values=lambda k: k if k < 2 else 0 if k == 2 else -1)
    found = load(hidden)
    assert found.test is None
    assert [name for name, _ in found.skipped] == [f"hf-dataset:{hidden}/test"]
    with pytest.raises(DataError, match=r"test/0: an image has the label"):
        load(hidden, test="test")
    for forbidden in (lambda s: s.subset([0]), lambda s: refold.data.Loader(s, SIZE, batch_size=1)):
        with pytest.raises(DataError, match="stream"):
            forbidden(stream(root))


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": b"nothing", "path": "seven.png"}], "label": [0]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(str(tmp_path / "train.parquet"))
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"train, seven\.png: the image cannot be decoded"):
            list(StreamLoader(stream(tmp_path), SIZE, batch_size=1, workers=workers))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    found = stream(parquet(tmp_path, {"train": [40, 40]}))
    path = tmp_path / "train-0001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    choices: list[dict[str, Any]] = [{}, {"shuffle": True}, {"workers": 1}]
    for options in choices:
        with pytest.raises(DataError, match=r"hf-dataset:.*/train: cannot be read"):
            list(StreamLoader(found, SIZE, batch_size=8, **options))


def test_a_run_on_a_stream_goes_on_in_the_middle(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(
        data=f"hf-dataset:{root}", model="timm/test_vit", pretrained=False, image_size=32, epochs=2, batch_size=4,
        method=refold.RepAdapter(rank=4, dropout=0.2), output=str(tmp_path / "whole"), precision="fp32",
        attention="default", augment="flip", checkpoint_every=2,
    )  # fmt: skip
    whole = train(config)
    assert whole.summary["images"] == {"train": 37, "val": 9, "test": 5}
    made = interrupt_at(monkeypatch, 14)
    with pytest.raises(Stopped):
        train(config, output=str(tmp_path / "again"))
    resumed = train(config, output=str(tmp_path / "again"), resume=True)
    assert len(made) == 14 + 18 - 12  # 12 of 13 steps were kept
    assert resumed.metrics == whole.metrics
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    assert len((tmp_path / "again" / "predictions.csv").read_text().splitlines()) == 6
