"""Batches of images and masks: changed together, and a function of seed, epoch and image alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refold import Preprocessing
from refold.errors import DataError
from refold.segmentation import IGNORE, Labels, MaskLoader, MaskSet, evaluation_pairs

CROP = Preprocessing(size=(32, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation="bilinear")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> MaskSet:
    """Seven images of different sizes: black where the mask is 0, white where it is 1, in blocks."""
    root = tmp_path_factory.mktemp("scenes")
    random = np.random.default_rng(0)
    images, masks = [], []
    for k in range(7):
        shape = (40 + 8 * k, 96 - 8 * k)
        labels = np.kron(random.integers(0, 2, (shape[0] // 8, shape[1] // 8)), np.ones((8, 8))).astype(np.uint8)
        images.append(str(root / f"{k}.png"))
        masks.append(str(root / f"{k}_mask.png"))
        Image.fromarray(255 * labels).convert("RGB").save(images[-1])
        Image.fromarray(labels).save(masks[-1])
    return MaskSet(images, masks, Labels.plain(["dark", "light"]))


def _all(loader: MaskLoader, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader.set_epoch(epoch)
    images, masks = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(masks)


@pytest.mark.parametrize("augment", ["none", "flip", "standard"])
def test_images_and_masks_are_changed_together(scenes: MaskSet, augment: str) -> None:
    images, masks = _all(MaskLoader(scenes, CROP, batch_size=3, augment=augment), epoch=1)
    assert images.shape == (7, 3, 32, 48)
    assert images.dtype == torch.float32
    assert masks.shape == (7, 32, 48)
    assert masks.dtype == torch.int64
    agreement = []
    for image, mask in zip(images, masks, strict=True):
        pixels = (image * torch.tensor(CROP.std)[:, None, None] + torch.tensor(CROP.mean)[:, None, None]).mean(0)
        labelled = mask != IGNORE
        values = pixels[labelled]
        # Photometric changes keep dark darker than light; edges are blurred by the resizing.
        light = values > (values.min() + values.max()) / 2
        agreement.append((light == (mask[labelled] == 1)).float().mean())
    assert float(torch.stack(agreement).mean()) > 0.95
    assert set(masks.unique().tolist()) <= {0, 1, IGNORE}


def test_the_standard_crops_show_parts_at_several_scales_and_padding(scenes: MaskSet) -> None:
    loader = MaskLoader(scenes, CROP, batch_size=7, augment="standard")
    masks = torch.cat([_all(loader, epoch)[1] for epoch in range(6)])
    padded = (masks == IGNORE).flatten(1).float().mean(1)
    assert float(padded.max()) > 0.3
    assert float(padded.min()) == 0.0
    plain = Preprocessing(size=(32, 48), mean=(0.5,), std=(0.5,), interpolation="bilinear")
    images, masks = _all(MaskLoader(scenes, plain, batch_size=7, augment="standard"), 0)
    outside = images[:, 0][masks == IGNORE].unique()
    # Padded with the mean colour, before the photometric changes shift it by image.
    assert 1 <= len(outside) <= 2 * 7


def test_plain_batches_by_hand(scenes: MaskSet) -> None:
    images, masks = _all(MaskLoader(scenes, CROP, batch_size=2), epoch=0)
    for k in range(7):
        with Image.open(scenes.masks[k]) as file:
            expected = np.asarray(file)
        rows = ((np.arange(32) + 0.5) * expected.shape[0] / 32).astype(int)
        columns = ((np.arange(48) + 0.5) * expected.shape[1] / 48).astype(int)
        assert np.array_equal(masks[k].numpy(), expected[rows][:, columns])
    assert float(images.min()) == pytest.approx((0 - 0.5) / 0.2)
    assert float(images[:, 0].max()) == pytest.approx((1 - 0.5) / 0.2)


def test_seed_epoch_and_image_decide_alone(scenes: MaskSet) -> None:
    def batches(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        settings = {"batch_size": 7, "augment": "standard", "seed": 5} | options
        return _all(MaskLoader(scenes, CROP, **settings), epoch=settings.pop("epoch", 2))

    images, masks = batches()
    state = torch.get_rng_state()
    for options in ({}, {"batch_size": 2}, {"workers": 1, "batch_size": 4}):
        again = batches(**options)
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], masks)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(batches(seed=6)[1], masks)
    loader = MaskLoader(scenes, CROP, batch_size=7, augment="standard", seed=5)
    assert not torch.equal(_all(loader, 3)[1], masks)

    # Shuffled, or shared by two processes, every image still gets the same crop.
    shuffled = MaskLoader(scenes, CROP, batch_size=7, augment="standard", seed=5, shuffle=True)
    ours = {tuple(mask.flatten().tolist()) for mask in masks}
    assert {tuple(mask.flatten().tolist()) for mask in _all(shuffled, 2)[1]} == ours
    shares = [
        _all(MaskLoader(scenes, CROP, batch_size=2, augment="standard", seed=5, rank=rank, world=2), 2)[1]
        for rank in (0, 1)
    ]
    assert torch.equal(shares[0], masks[0::2])
    assert torch.equal(shares[1], masks[1::2])


def test_evaluation_keeps_shape_and_full_masks(scenes: MaskSet) -> None:
    pairs = list(evaluation_pairs(scenes, CROP))
    assert len(pairs) == 7
    for k, (images, masks) in enumerate(pairs):
        height, width = 40 + 8 * k, 96 - 8 * k
        assert masks.shape == (1, height, width)
        assert min(images.shape[-2:]) == 32
        assert images.shape[-2] / images.shape[-1] == pytest.approx(height / width, rel=0.03)
    native = next(iter(evaluation_pairs(scenes, CROP, short_side=0)))[0]
    assert native.shape == (1, 3, 40, 96)
    assert len(list(evaluation_pairs(scenes, CROP, rank=1, world=2))) == 3


def test_grey_models_get_one_channel(scenes: MaskSet) -> None:
    grey = Preprocessing(size=(16, 16), mean=(0.5,), std=(0.5,))
    for augment in ("none", "standard"):
        images, _ = next(iter(MaskLoader(scenes, grey, batch_size=2, augment=augment)))
        assert images.shape == (2, 1, 16, 16)


def test_bad_settings_and_files_are_one_error(scenes: MaskSet, tmp_path: Path) -> None:
    for options, complaint in (
        ({"batch_size": 0}, "batch_size: must be a positive multiple"),
        ({"batch_size": 3, "world": 2}, "batch_size: must be a positive multiple of 2"),
        ({"batch_size": 8, "drop_last": True}, "7 images are no full batch of 8"),
        ({"batch_size": 1, "augment": "mixup"}, "unknown augmentation 'mixup'"),
        ({"batch_size": 1, "workers": -1}, "workers: must be 0 or more"),
        ({"batch_size": 1, "rank": 1}, "rank: must be at least 0"),
    ):
        with pytest.raises(DataError, match=complaint):
            MaskLoader(scenes, CROP, **options)
    with pytest.raises(DataError, match="short_side: must be 0 or more"):
        next(evaluation_pairs(scenes, CROP, short_side=-1))
    gone = MaskSet([str(tmp_path / "none.png")], scenes.masks[:1], scenes.labels)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"none.png: the image cannot be decoded"):
            next(iter(MaskLoader(gone, CROP, batch_size=1, workers=workers)))
