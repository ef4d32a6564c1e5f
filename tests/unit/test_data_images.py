"""ImageSet: reading, holding, sharing; the same bits in memory and from files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from refold import DataError
from refold.data import ImageSet
from refold.data.decoding import Rendering
from refold.data.parallel import for_each


@pytest.fixture
def paths(tmp_path):
    random = np.random.default_rng(0)
    for k in range(40):
        shape = (int(random.integers(8, 40)), int(random.integers(8, 40)), 3)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{k}.png")
    return [tmp_path / f"{k}.png" for k in range(40)]


@pytest.fixture
def image_set(paths):
    return ImageSet(paths, torch.arange(40) % 2, classes=["a", "b"])


def test_read_resizes_with_pillow(image_set, paths):
    images = image_set.read([3, 0, 3], (9, 12))
    assert (images.dtype, images.shape) == (torch.uint8, (3, 3, 9, 12))
    with Image.open(paths[3]) as image:
        expected = np.asarray(image.resize((12, 9), Image.Resampling.BICUBIC))
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["squash", "center"])
def test_memory_equals_stream_to_the_bit(paths, channels, crop):
    rendering = Rendering((11, 13), channels, "bilinear", crop, 0.9)
    held, streamed = (
        ImageSet(paths, torch.zeros(40), channels=channels, cache=cache) for cache in ("memory", "stream")
    )
    assert held.hold(rendering)
    assert not streamed.hold(rendering)
    for path in paths:
        path.unlink() if path.name == "0.png" else None
    order = torch.randperm(39) + 1
    assert torch.equal(held.render(order, rendering), streamed.render(order, rendering))
    assert held.render([0], rendering).shape == (1, channels, 11, 13)  # from memory: the file is gone
    with pytest.raises(DataError, match=r"0\.png"):
        streamed.render([0], rendering)


def test_grey_reading(paths):
    grey = ImageSet(paths, torch.zeros(40), channels=1).read([5], (8, 8))
    with Image.open(paths[5]) as image:
        expected = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(grey[0, 0].numpy(), expected)


def test_subset(image_set):
    part = image_set.subset(range(39, -1, -2))
    assert (len(part), part.classes, part.task) == (20, ["a", "b"], "classify")
    assert part.targets.tolist() == [1] * 20
    assert part.paths[1] == image_set.paths[37]
    inner = part.subset(torch.tensor([4, 1]))
    assert torch.equal(inner.read([0, 1], (8, 8)), image_set.read([31, 37], (8, 8)))
    assert len(image_set) == 40
    assert len(image_set.subset([])) == 0


def test_subsets_share_what_is_held(image_set, paths):
    rendering = Rendering((8, 8))
    assert image_set.hold(rendering)
    expected = image_set.render([7, 2], rendering)
    part = image_set.subset([2, 3, 7]).subset([2, 0])
    for path in paths:
        path.unlink()
    assert torch.equal(part.render([0, 1], rendering), expected)
    assert part.hold(rendering)


def test_reading_does_not_expose_the_memory(image_set):
    rendering = Rendering((8, 8))
    image_set.hold(rendering)
    before = image_set.render([0], rendering)
    image_set.render([0], rendering).zero_()
    assert torch.equal(image_set.render([0], rendering), before)


def test_decoded_pixels_are_used_and_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 10), dtype=np.uint8)
    pixels.setflags(write=False)
    image_set = ImageSet([f"{k}.png" for k in range(6)], torch.zeros(6), channels=1, decoded=pixels)
    part = image_set.subset([5, 2])
    assert np.array_equal(part.read([0, 1], (10, 10))[:, 0].numpy(), pixels[[5, 2]])
    assert part.render([0], Rendering((10, 10), 3)).shape == (1, 3, 10, 10)


def memory(monkeypatch, available: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


def test_small_sets_are_held_and_large_ones_streamed(image_set, monkeypatch):
    needed = 40 * 3 * 8 * 8
    memory(monkeypatch, 4 * needed - 4)
    assert not image_set.hold(Rendering((8, 8)))
    memory(monkeypatch, 4 * needed)
    assert image_set.hold(Rendering((8, 8)))


def test_four_gibibytes_at_most(paths, monkeypatch):
    memory(monkeypatch, 1 << 45)
    image_set = ImageSet(paths, torch.zeros(40), channels=1)
    side = int((4 * 2**30 / 40) ** 0.5) + 1
    assert not image_set.hold(Rendering((side, side), 1))


def test_memory_that_is_not_there(paths, monkeypatch):
    memory(monkeypatch, 1000)
    with pytest.raises(DataError, match="GiB are free"):
        ImageSet(paths, torch.zeros(40), cache="memory").hold(Rendering((8, 8)))


@pytest.mark.parametrize("indices", [[40], [-1], torch.zeros(40, dtype=torch.bool), [0.5], torch.zeros(2, 2).long()])
def test_indices_outside(image_set, indices):
    with pytest.raises(DataError, match="indices"):
        image_set.subset(indices)
    with pytest.raises(DataError, match="indices"):
        image_set.read(indices, (8, 8))


def test_contradicting_arguments(paths):
    with pytest.raises(DataError, match="40 images have 3 targets"):
        ImageSet(paths, torch.zeros(3))
    with pytest.raises(DataError, match="1 \\(grey\\) or 3 \\(RGB\\), not 4"):
        ImageSet(paths, torch.zeros(40), channels=4)
    with pytest.raises(DataError, match="cache"):
        ImageSet(paths, torch.zeros(40), cache="disk")


def test_targets_have_the_type_of_their_task(paths):
    assert ImageSet(paths, torch.zeros(40)).targets.dtype == torch.int64
    assert ImageSet(paths, torch.zeros(40, 2).long(), task="multilabel").targets.dtype == torch.float32
    assert ImageSet(paths, torch.zeros(40).double(), task="regress").targets.dtype == torch.float32


def test_first_failure_is_the_one_reported():
    def fail_late(i: int) -> None:
        if i >= 70:
            raise DataError(f"number {i}")

    done = []
    with pytest.raises(DataError, match="number 70"):
        for_each(fail_late, 1000, "counting")
    for_each(done.append, 100, "counting")
    assert sorted(done) == list(range(100))


def test_bar_appears_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("refold.data.parallel._SILENCE", -1.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for_each(lambda i: None, 100, "decoding images")
    assert "decoding images" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    for_each(lambda i: None, 100, "decoding images")
    assert capsys.readouterr().err == ""
