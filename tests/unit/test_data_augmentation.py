"""Augmentations: what they do to pixels, and that nothing but their numbers decides."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from refold import DataError, Preprocessing
from refold.data.augmentation import Light, make_augmentation

PREPROCESSING = Preprocessing(size=(16, 24))
NAMES = [None, "none", "flip", "light", "randaugment", "rand-m5-n3-mstd0.5", "augmix-m3-w2", "3a", "v0", "original"]


def batch(name: str | None, count: int = 6, channels: int = 3, seed: int = 0):
    """An augmentation, images as it wants them, and its random numbers."""
    augmentation = make_augmentation(name, PREPROCESSING, channels)
    source = torch.Generator().manual_seed(seed)
    size = augmentation.rendering.size
    images = torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=source)
    return augmentation, images, torch.rand(count, augmentation.columns, dtype=torch.float64, generator=source)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_pure_function_of_images_and_numbers(name, channels):
    augmentation, images, randomness = batch(name, channels=channels)
    outputs = []
    for noise in (1, 2):
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        torch.manual_seed(noise)
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        first = augmentation(images.clone(), randomness)
        outputs.append(augmentation.finish(first.float(), randomness))
        assert random.getstate() == states[0]
        assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(*outputs)
    assert outputs[0].shape == (6, channels, 16, 24)
    # One image alone comes out as it does among others.
    alone = augmentation(images[4:5].clone(), randomness[4:5])
    assert torch.equal(augmentation.finish(alone.float(), randomness[4:5])[0], outputs[0][4])


@pytest.mark.parametrize("name", ["flip", "light", "randaugment", "3a"])
def test_numbers_matter(name):
    augmentation, images, randomness = batch(name, count=8)
    first = augmentation(images.clone(), randomness)
    other = augmentation(images.clone(), randomness.roll(1, 0))
    assert not torch.equal(first, other)


def test_plain_changes_nothing():
    augmentation, images, randomness = batch(None)
    assert augmentation.rendering.size == PREPROCESSING.size
    assert torch.equal(augmentation(images.clone(), randomness), images)


def test_flips_of_each_image():
    augmentation, images, _ = batch("flip", count=4)
    numbers = torch.tensor([[0.9, 0.9], [0.1, 0.9], [0.9, 0.1], [0.1, 0.1]], dtype=torch.float64)
    out = augmentation(images.clone(), numbers)
    assert torch.equal(out[0], images[0])
    assert torch.equal(out[1], images[1].flip(-1))
    assert torch.equal(out[2], images[2].flip(-2))
    assert torch.equal(out[3], images[3].flip(-1, -2))


def test_half_of_the_images_are_flipped():
    augmentation, images, randomness = batch("flip", count=2000)
    images[:] = torch.arange(images.shape[-1], dtype=torch.uint8)
    flipped = augmentation(images, randomness)[:, 0, 0, 0] != 0
    assert 0.45 < flipped.float().mean() < 0.55


def test_crops_of_light():
    augmentation, images, randomness = batch("light", count=500)
    rows, columns = augmentation.rendering.size
    assert (rows, columns) == (20, 30)  # 16 and 24 over sqrt(0.67), up
    ramp = torch.linspace(0, 255, columns).round().to(torch.uint8)
    images[:] = ramp
    out = augmentation(images, randomness).float()
    span = (out[:, 0, :, -1] - out[:, 0, :, 0]).abs().mean(1) / 255  # share of the width that is seen
    assert span.min() > 0.66  # sqrt(0.67 * 3 / 4) and half a pixel at both ends
    assert span.max() <= 1.0
    assert span.std() > 0.03


def test_crop_boxes_are_the_named_ones():
    """Against torchvision, with the formulas written out for one image."""
    augmentation, images, _ = batch("light", count=1)
    numbers = torch.tensor([[0.5, 0.75, 0.3, 0.9, 0.2]], dtype=torch.float64)
    rows, columns = augmentation.rendering.size
    area, aspect = 0.67 + 0.33 * 0.5, (4 / 3) ** (2 * 0.75 - 1)
    height, width = round(rows * (area / aspect) ** 0.5), round(columns * (area * aspect) ** 0.5)
    top, left = int(0.3 * (rows - height + 1)), int(0.9 * (columns - width + 1))
    expected = functional.resize(
        images[0, :, top : top + height, left : left + width], [16, 24], interpolation=3, antialias=True
    ).flip(-1)  # fmt: skip
    assert torch.equal(augmentation(images, numbers)[0], expected)


def test_extreme_numbers_stay_inside():
    augmentation, images, _ = batch("light", count=1)
    for value in (0.0, 1.0 - 2**-53):
        assert augmentation(images.clone(), torch.full((1, 5), value, dtype=torch.float64)).shape == (1, 3, 16, 24)


def test_center_crops_are_trained_on_the_whole_square():
    preprocessing = Preprocessing(size=(32, 32), crop="center", crop_fraction=0.875, interpolation="bilinear")
    light = make_augmentation("light", preprocessing, 3)
    assert isinstance(light, Light)
    assert light.rendering == ((40, 40), 3, "bilinear", "center", 1.0)


def test_erasing_of_the_few_shot_recipe():
    augmentation, _, _ = batch("randaugment", count=400)
    randomness = torch.rand(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    images = torch.zeros(400, 3, 32, 32)
    erased = augmentation.finish(images, randomness).flatten(1).abs().amax(1) > 0
    assert 0.19 < erased.float().mean() < 0.31


def test_strongest_posterizing_keeps_a_bit():
    """timm's level 10 keeps 0 bits, at which Pillow 13 raises."""
    augmentation = make_augmentation("rand-m10-inc1-n4", PREPROCESSING, 3)
    operations = augmentation._transform.transforms[2].ops  # type: ignore[attr-defined]
    posterize = next(op for op in operations if op.name.startswith("Posterize"))
    posterize.prob = 1.0
    from PIL import Image

    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert set(np.asarray(posterize(image)).flat) == {0, 128}


@pytest.mark.parametrize("name", ["", "mirror", "Rand-m9", "random", "rand-z9"])
def test_unknown_names(name):
    with pytest.raises(DataError, match="augment"):
        make_augmentation(name, PREPROCESSING, 3)
