"""Parameter counts and file sizes on the real ViT-B/16, against the papers' numbers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import refold

#: Outputs and inputs of the four projections of a block.
BLOCK = ((2304, 768), (768, 768), (3072, 768), (768, 3072))


@pytest.fixture
def vit_b16() -> nn.Module:
    """The real architecture without its classifier; built on meta and left at zero, because only shapes matter."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    return model


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in refold.trainable_parameters(model).values())


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in refold.trainable_parameters(model).values() if p.dim() > 1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (refold.RepAdapter(), 239_808),
        (refold.RepAdapter(sites="attention"), 119_904),
        (refold.LoRA(), 294_912),
        (refold.BitFit(), 102_912),
        (refold.LayerNormTune(), 38_400),  # 4 L d + 2 d
        (refold.Partial(), 7_089_408),  # 12 d^2 + 13 d of a block, 2 d of the final norm
        (refold.Partial(blocks=2), 2 * 7_087_872 + 1_536),
        (refold.SSF(), 205_824),
        (refold.VPT(tokens=100), 921_600),
        (refold.VPT(tokens=100, deep=False), 76_800),
        (refold.FacT(form="tt", rank=4), 8_448),
        (refold.FacT(form="tt", rank=8), 21_504),
        (refold.FacT(form="tt"), 61_440),
        (refold.FacT(), 30_976),
        (refold.FacT(rank=32), 86_528),
        (refold.Hydra(), 239_712),
        (refold.KAdaptation(), 50_176),
        (refold.ARC(), 96_432),
        (refold.RLRR(), 288_768),
        (refold.RLRR(ssf=False), 248_832),
        (refold.GLoRA(), 12 * sum(2 * 4 * (o + i) + 4 * (i + 1) + 2 * o for o, i in BLOCK)),
        (refold.PACE(), 12 * sum(10 * (o + i) + 10 * (i + 1) + o for o, i in BLOCK)),
        (refold.KronA(), 12 * 2 * (24 * 24 + 32 * 32)),
        (refold.KronA(size=32, form="block"), 12 * (32 * 32 + 24 * 24 + 1)),
        (refold.Convpass(), 327_552),
        (refold.Convpass(sites="attention"), 163_776),
        (refold.STAdapter(), 14_220_288),
        (refold.STAdapter(sites="mlp"), 7_110_144),
        (refold.FullFineTune(), 85_798_656 - 192 * 768),  # with 224 px there are 192 more positions
    ],
    ids=lambda value: value.describe() if isinstance(value, refold.Method) else "",
)
def test_parameters_on_vit_b16(vit_b16, method, expected):
    refold.attach(vit_b16, method)
    assert count(vit_b16) == expected
    assert refold.explain(vit_b16).trainable == expected
    assert refold.explain(vit_b16).adapter_parameters == expected


def test_weights_of_repadapter_without_biases(vit_b16):
    refold.attach(vit_b16, refold.RepAdapter(rank=8, groups=2))
    assert weights(vit_b16) == 221_184


def test_a_head_counts_apart(vit_b16):
    vit_b16.reset_classifier(37)
    refold.attach(vit_b16, refold.RepAdapter())
    told = refold.explain(vit_b16)
    assert told.trainable - told.adapter_parameters == 37 * 768 + 37
    assert told.adapter_parameters == 239_808
    assert told.total == 85_798_656 - 192 * 768 + 37 * 768 + 37


def test_the_adapter_file_of_vit_b16_is_below_one_megabyte(vit_b16, tmp_path):
    refold.attach(vit_b16, refold.RepAdapter())
    refold.describe(vit_b16, classes=[f"class {i}" for i in range(100)], preprocessing=refold.Preprocessing())
    size = refold.save(vit_b16, tmp_path / "adapter.safetensors").stat().st_size
    assert 239_808 * 4 < size < 1_000_000
