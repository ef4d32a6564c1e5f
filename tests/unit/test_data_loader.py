"""Loader: normalisation, order, resuming, sharing between processes; never the global random state."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from refold import DataError, Preprocessing
from refold.data import ImageSet, Loader

PREPROCESSING = Preprocessing(size=(16, 16))


def make(folder, count: int, mode: str = "RGB") -> list:
    generator = np.random.default_rng(0)
    for k in range(count):
        shape = (20, 24, 3) if mode == "RGB" else (20, 24)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{k}.png")
    return [folder / f"{k}.png" for k in range(count)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make(tmp_path_factory.mktemp("images"), 23)


@pytest.fixture
def image_set(paths):
    return ImageSet(paths, torch.arange(23))


def epoch(loader: Loader) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


# -- values -----------------------------------------------------------------------------------------------------


def test_images_are_normalised(image_set):
    images, targets = epoch(Loader(image_set, PREPROCESSING, batch_size=5))
    assert (images.dtype, images.shape) == (torch.float32, (23, 3, 16, 16))
    assert targets.tolist() == list(range(23))
    raw = image_set.read(range(23), (16, 16)).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (PREPROCESSING.mean, PREPROCESSING.std))
    assert torch.allclose(images.double(), (raw - mean) / std, atol=1e-6, rtol=0)


def test_equals_timms_pipeline(image_set, paths):
    from timm.data.transforms_factory import create_transform

    preprocessing = Preprocessing(size=(16, 16), crop="center", crop_fraction=0.875)
    images, _ = epoch(Loader(image_set, preprocessing, batch_size=8))
    transform = create_transform((3, 16, 16), interpolation="bicubic", crop_pct=0.875)
    for mine, path in zip(images, paths, strict=True):
        with Image.open(path) as image:
            assert torch.allclose(mine, transform(image), atol=1e-6)  # type: ignore[arg-type]


def test_one_channel_is_repeated_for_three(tmp_path):
    files = make(tmp_path, 4, "L")
    grey, colour = (ImageSet(files, torch.zeros(4), channels=channels) for channels in (1, 3))
    for augment in ("none", "flip", "light"):
        first, second = (epoch(Loader(s, PREPROCESSING, batch_size=2, augment=augment))[0] for s in (grey, colour))
        assert torch.equal(first, second)


def test_colour_for_a_grey_model(image_set):
    preprocessing = Preprocessing(size=(16, 16), mean=(0.5,), std=(0.25,))
    images, _ = epoch(Loader(image_set, preprocessing, batch_size=4, augment="randaugment"))
    assert images.shape == (23, 1, 16, 16)
    images, _ = epoch(Loader(image_set, preprocessing, batch_size=4))
    with Image.open(image_set.paths[2]) as image:
        expected = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BICUBIC))
    assert torch.allclose(images[2, 0], torch.from_numpy(expected / 255 - 0.5).float() / 0.25, atol=1e-6)


@pytest.mark.parametrize("augment", ["none", "flip", "light", "randaugment"])
def test_memory_stream_and_workers_give_the_same_bits(paths, augment):
    results = []
    for cache, workers in (("memory", 0), ("stream", 0), ("stream", 2)):
        image_set = ImageSet(paths, torch.arange(23), cache=cache)
        loader = Loader(image_set, PREPROCESSING, batch_size=4, augment=augment, shuffle=True, seed=3, workers=workers)
        loader.set_epoch(1)
        results.append(epoch(loader))
    for images, targets in results[1:]:
        assert torch.equal(targets, results[0][1])
        assert torch.equal(images, results[0][0])


# -- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["none", "flip", "light", "randaugment"])
def test_resumed_epoch_is_the_same_to_the_bit(image_set, augment):
    options = {"batch_size": 4, "augment": augment, "shuffle": True, "seed": 7}
    loader = Loader(image_set, PREPROCESSING, **options)
    epochs = []
    for number in range(3):
        loader.set_epoch(number)
        epochs.append(epoch(loader))
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    resumed = Loader(image_set, PREPROCESSING, **options)
    resumed.set_epoch(2)
    images, targets = epoch(resumed)
    assert torch.equal(targets, epochs[2][1])
    assert torch.equal(images, epochs[2][0])
    assert not torch.equal(targets, epochs[1][1])


def test_augmentation_belongs_to_the_sample_not_to_the_batch(image_set):
    results = {}
    for batch_size, shuffle in ((4, True), (6, True), (5, False)):
        loader = Loader(image_set, PREPROCESSING, batch_size=batch_size, augment="flip", shuffle=shuffle, seed=2)
        images, targets = epoch(loader)
        results[batch_size] = images[targets.argsort()]
    assert torch.equal(results[4], results[6])
    assert torch.equal(results[4], results[5])


def test_global_random_state_is_neither_read_nor_changed(image_set):
    def state():
        return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    before = state()
    for augment in ("none", "flip", "light", "randaugment"):
        epoch(Loader(image_set, PREPROCESSING, batch_size=4, augment=augment, shuffle=True))
    after = state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.array_equal(before[2], after[2])


def test_threads_are_left_as_they_were(image_set):
    before = torch.get_num_threads()
    loader = iter(Loader(image_set, PREPROCESSING, batch_size=4))
    next(loader)
    assert torch.get_num_threads() == before
    loader.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


def test_seeds_and_epochs_differ(image_set):
    orders = set()
    for seed in range(3):
        loader = Loader(image_set, PREPROCESSING, batch_size=23, shuffle=True, seed=seed)
        for number in range(3):
            loader.set_epoch(number)
            orders.add(tuple(loader.indices.tolist()))
            assert sorted(loader.indices.tolist()) == list(range(23))
    assert len(orders) == 9


def test_indices_are_those_of_the_coming_epoch(image_set):
    loader = Loader(image_set, PREPROCESSING, batch_size=4, shuffle=True, drop_last=True)
    loader.set_epoch(5)
    assert torch.equal(loader.indices, epoch(loader)[1])
    assert len(loader.indices) == 20


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [10, 10, 3]), (True, [10, 10])])
def test_last_batch(image_set, drop_last, sizes):
    loader = Loader(image_set, PREPROCESSING, batch_size=10, shuffle=True, drop_last=drop_last)
    assert [len(targets) for _, targets in loader] == sizes
    assert len(loader) == len(sizes)


# -- several processes ------------------------------------------------------------------------------------------


def ranks(image_set: ImageSet, world: int, **options) -> list[list[list[int]]]:
    """Targets (which are indices) by process and batch."""
    loaders = [Loader(image_set, PREPROCESSING, rank=rank, world=world, **options) for rank in range(world)]
    batches = [[targets.tolist() for _, targets in loader] for loader in loaders]
    assert [len(mine) for mine in batches] == [len(loader) for loader in loaders]
    return batches


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_sees_every_image_once(image_set, world):
    batches = ranks(image_set, world, batch_size=12)
    counts = [sum(map(len, mine)) for mine in batches]
    assert sorted(k for mine in batches for part in mine for k in part) == list(range(23))
    assert max(counts) - min(counts) <= 1


def test_more_processes_than_images(image_set):
    batches = ranks(image_set.subset([0, 1]), 4, batch_size=4)
    assert batches == [[[0]], [[1]], [], []]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_training_shares_are_equal_and_make_up_the_same_batches(image_set, world, drop_last):
    batches = ranks(image_set, world, batch_size=6, shuffle=True, drop_last=drop_last, seed=1)
    (alone,) = ranks(image_set, 1, batch_size=6, shuffle=True, drop_last=drop_last, seed=1)
    assert len({tuple(map(len, mine)) for mine in batches}) == 1
    for k, together in enumerate(alone[:3]):
        assert sorted(chain.from_iterable(mine[k] for mine in batches)) == sorted(together)
    everything = [index for mine in batches for part in mine for index in part]
    if drop_last:
        assert len(everything) == len(set(everything)) == 18
    else:  # filled up from the front of the order
        first = [mine[0][0] for mine in batches]
        padded = -(-23 // world) * world - 23
        assert sorted(everything) == sorted([*range(23), *first[:padded]])


# -- complaints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5, "world": 2}, "multiple of 2"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank"),
        ({"batch_size": 4, "rank": -1}, "rank"),
        ({"batch_size": 4, "workers": -1}, "workers"),
        ({"batch_size": 4, "seed": -1}, "seed"),
        ({"batch_size": 4, "augment": "mirror"}, "augment"),
        ({"batch_size": 24, "drop_last": True}, "no full batch"),
    ],
)
def test_arguments(image_set, options, words):
    with pytest.raises(DataError, match=words):
        Loader(image_set, PREPROCESSING, **options)


def test_other_complaints(image_set):
    with pytest.raises(DataError, match="is empty"):
        Loader(image_set.subset([]), PREPROCESSING, batch_size=1)
    with pytest.raises(DataError, match="takes 4 channels"):
        Loader(image_set, Preprocessing(mean=(0.5,) * 4, std=(0.5,) * 4), batch_size=1)
    with pytest.raises(DataError, match="epoch -1"):
        Loader(image_set, PREPROCESSING, batch_size=1).set_epoch(-1)


@pytest.mark.parametrize(("cache", "workers"), [("memory", 0), ("stream", 0), ("stream", 1)])
def test_corrupt_file_is_named(tmp_path, cache, workers):
    files = make(tmp_path, 4)
    files[2].write_bytes(files[2].read_bytes()[:100])
    with pytest.raises(DataError) as caught:
        epoch(Loader(ImageSet(files, torch.zeros(4), cache=cache), PREPROCESSING, batch_size=2, workers=workers))
    assert str(caught.value).startswith(f"{files[2]}: the image cannot be decoded")
    assert "skip_bad_images" in str(caught.value)
