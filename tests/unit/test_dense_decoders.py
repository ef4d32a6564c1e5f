"""Decoders and detectors named with their settings, as in "mask_rcnn(channels=64, rois=64)"."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

import refold
from dense_runs import settings
from refold.calls import read_call
from refold.dense.building import build, default_decoder
from refold.dense.encoder import load_encoder
from refold.dense.shapes import shapes
from refold.training import train


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("fpn", "fpn", {}),
        (" mask_rcnn( ) ", "mask_rcnn", {}),
        ("a(b=1, c=-2.5, d=('x', None), e=True)", "a", {"b": 1, "c": -2.5, "d": ("x", None), "e": True}),
    ],
)
def test_a_call_is_a_name_and_values(text, name, values):
    assert read_call(text) == (name, values)


@pytest.mark.parametrize(
    "text",
    ["", "a b", "a.b(c=1)", "a(1)", "a(**b)", "a(b=c)", "a(b=open('f'))", "a()()", "a(b={[]: 1})", "-" * 1999 + "1",
     "(" * 999, "a" * 9999],
)  # fmt: skip
def test_anything_else_is_no_call(text):
    with pytest.raises(ValueError, match="cannot read"):
        read_call(text)


def test_a_decoder_has_one_spelling_and_a_default():
    assert default_decoder("segment", None) == "upernet"
    assert default_decoder("segment", "fpn( width=64)") == "fpn(width=64)"
    assert default_decoder("instance", "mask_rcnn()") == "mask_rcnn"


def test_the_settings_reach_the_detector():
    loaded = load_encoder("timm/test_resnet", pretrained=False, image_size=64)
    decoder = "mask_rcnn(channels=16, hidden=24, rois=9, detections=7, score_threshold=0.2, anchor_scale=3)"
    model = build("instance", decoder, loaded, loaded.preprocessing, ["a", "b"])
    assert model.backbone.out_channels == 16
    assert model.roi_heads.box_predictor.cls_score.in_features == 24
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 9
    assert model.roi_heads.detections_per_img == 7
    assert model.roi_heads.score_thresh == 0.2
    assert model.rpn.anchor_generator.sizes[0] == (12.0,)  # three strides of four pixels


@pytest.mark.parametrize(
    ("task", "decoder", "told"),
    [
        ("segment", "fpn(rois=3)", "fpn has no setting 'rois'. Known: width"),
        ("segment", "fpn(width='wide')", "fpn's width: must be a whole number from 0 to 65536, not 'wide'"),
        ("segment", "fpn(width=True)", "must be a whole number"),
        ("segment", "fpn(width=1e9)", "must be a whole number"),
        ("segment", "fpn(width=10**9)", "cannot read"),
        ("detect", "fcos(score_threshold=-0.1)", "must be a number from 0"),
        ("detect", "mask_rcnn", "'mask_rcnn' is not for detect"),
        ("detect", "faster-rcnn", "cannot read 'faster-rcnn'.*settings behind it"),
    ],
)
def test_what_is_no_decoder_is_refused(task, decoder, told):
    with pytest.raises(refold.DataError, match=told):
        default_decoder(task, decoder)


@pytest.mark.parametrize(
    ("task", "decoder", "where"),
    [("segment", "linear(width=0)", "width"), ("detect", "faster_rcnn(detections=0)", "detections"),
     ("detect", "faster_rcnn(score_threshold=1)", "score_threshold")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(task, decoder, where):
    loaded = load_encoder("timm/test_resnet", pretrained=False, image_size=64)
    with pytest.raises(refold.DataError, match=f"^{where}: must be"):
        build(task, decoder, loaded, loaded.preprocessing, ["a", "b"])


def test_a_file_brings_its_decoders_settings_back(tmp_path):
    data = shapes(tmp_path, counts=(4, 2, 2), side=64).root
    decoder = "faster_rcnn(channels=16, rois=9)"
    config = settings(data, tmp_path / "run", task="detect", decoder=decoder, epochs=1)
    torch.manual_seed(0)
    backbone = tmp_path / "backbone.safetensors"
    save_file(timm.create_model("test_convnext", pretrained=False).state_dict(), backbone)
    result = train(config.replace(weights=str(backbone), pretrained=True))
    assert result.summary["decoder"] == decoder
    again = refold.from_pretrained(result.adapter, weights=backbone)
    assert again.backbone.out_channels == 16
    assert again.roi_heads.fg_bg_sampler.batch_size_per_image == 9
