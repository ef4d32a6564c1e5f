"""Specs, options and what `load` returns, with random weights."""

from __future__ import annotations

import time

import pytest
import torch

from refold import BackboneError, backbones


@pytest.mark.parametrize("spec", ["timm/test_vit", "test_vit"])
def test_a_timm_name_loads_with_and_without_prefix(spec):
    loaded = backbones.load(spec, pretrained=False)
    assert loaded.spec == "timm/test_vit"
    assert not loaded.model.training
    assert loaded.preprocessing.size == (160, 160)
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)
    assert loaded.preprocessing.crop == "squash"
    assert loaded.preprocessing.crop_fraction == 0.95


def test_a_renamed_timm_model_is_found_without_a_warning():
    loaded = backbones.load("timm/vit_tiny_patch16_224_in21k", pretrained=False)
    assert loaded.spec == "timm/vit_tiny_patch16_224.augreg_in21k"


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("in_chans", [1, 4])
def test_channels_size_and_classes_reach_the_model(name, in_chans):
    loaded = backbones.load(name, pretrained=False, in_chans=in_chans, image_size=(96, 64), num_classes=5)
    assert loaded.preprocessing.size == (96, 64)
    assert loaded.preprocessing.channels == in_chans
    with torch.no_grad():
        assert loaded.model(torch.zeros(2, in_chans, 96, 64)).shape == (2, 5)


def test_one_channel_gets_the_average_statistics():
    preprocessing = backbones.load("timm/resnet10t", pretrained=False, in_chans=1).preprocessing
    assert preprocessing.mean == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    assert preprocessing.std == pytest.approx((sum((0.229, 0.224, 0.225)) / 3,))


def test_zero_classes_leave_the_features():
    model = backbones.load("test_vit", pretrained=False, num_classes=0).model
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 64)


def test_drop_path_reaches_the_blocks():
    rates = [
        module.drop_prob
        for module in backbones.load("test_vit", pretrained=False, drop_path=0.2).model.modules()
        if type(module).__name__ == "DropPath"
    ]
    assert max(rates) == pytest.approx(0.2)


def test_no_drop_path_is_none_where_the_architecture_has_a_default():
    rates = {}
    for rate in (0.0, 0.2):
        model = backbones.load("swin_tiny_patch4_window7_224", pretrained=False, drop_path=rate, image_size=224).model
        rates[rate] = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates[0.0] == []
    assert max(rates[0.2]) == pytest.approx(0.2)


def test_drop_path_has_no_effect_where_there_is_none():
    """The training recipe's default must not keep such an architecture from being trained."""
    model = backbones.load("dla46_c", pretrained=False, num_classes=3, in_chans=1, drop_path=0.2).model
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("timm/test_vitt", {}, "Did you mean timm/test_vit"),
        ("timm/resnet50.nonsense", {}, "no pretrained tag 'nonsense'. Known tags: .*a1_in1k"),
        ("timm/vit_base_patch16_gap_224", {}, "no pretrained weights .* --weights FILE"),
        ("timm/test_vit", {"pretrained": False, "image_size": 100}, "16x16 patches. The nearest .* is 96x96"),
        ("timm/test_vit", {"num_classes": -1}, "num_classes: cannot be negative"),
        ("timm/test_vit", {"in_chans": 0}, "in_chans: must be at least 1"),
        ("timm/test_vit", {"image_size": 0}, "image_size: must be positive"),
        ("timm/test_vit", {"drop_path": 1.0}, "drop_path: must be in"),
        ("packaged/vit_small_fokus", {}, "Did you mean packaged/vit_small_focus"),
        ("", {}, "not the name of a backbone"),
        ("checkpoints/best.pth", {}, "not the name of a backbone.*--weights FILE"),
        ("timm/", {}, "not the name of a backbone"),
    ],
)
def test_every_bad_request_is_one_clear_error(spec, options, message):
    started = time.monotonic()
    with pytest.raises(BackboneError, match=message):
        backbones.load(spec, **options)
    assert time.monotonic() - started < 10
