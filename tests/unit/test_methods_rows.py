"""LoRA and DoRA on some output rows: query and value of a joint projection, or any others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import refold
from reference import formulas
from refold.adapters import RowBlocks
from refold.hosting import hosted
from refold.methods import method_from_json
from zoo import build, images, perturb, relative

LORA = refold.LoRA(rank=2, scale=0.5, rows=("q", "v"))


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


@pytest.mark.parametrize("family", ["vit", "swin", "open_clip_tower"])
@pytest.mark.parametrize("kind", [refold.LoRA, refold.DoRA])
def test_query_and_value_are_adapted_and_the_key_is_not(family, kind):
    model = build(family, torch.float64)
    plain = {n: numbers(v) for n, v in model.state_dict().items()}
    refold.attach(model, kind(rank=2, scale=0.5, rows=("q", "v")))
    perturb(refold.trainable_parameters(model))
    x = images(model)
    output = model(x).detach()
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in refold.trainable_parameters(model).values())
    slots = {path: slot["default"] for path, slot in hosted(model).items()}
    assert slots
    refold.merge(model.eval())
    assert relative(model(x), output) < 1e-10
    for path, blocks in slots.items():
        assert isinstance(blocks, RowBlocks)
        leaf = "in_proj_weight" if isinstance(model.get_submodule(path), nn.MultiheadAttention) else "weight"
        before, after = plain[f"{path}.{leaf}"], numbers(model.state_dict()[f"{path}.{leaf}"])
        width = len(before) // 3
        np.testing.assert_array_equal(after[width : 2 * width], before[width : 2 * width])
        for block, part in zip(blocks.blocks, (slice(0, width), slice(2 * width, None)), strict=True):
            down, up, rows = numbers(block.down), numbers(block.up), before[part]
            if kind is refold.LoRA:
                expected = formulas.lora(rows, down, up, 0.5)
            else:
                magnitude = numbers(block.magnitude) * formulas.channel_norms(rows)
                expected = formulas.dora(rows, down, up, magnitude, 0.5)
            np.testing.assert_allclose(after[part], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 10), nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(6, 10, 3, groups=2), nn.ConvTranspose1d(6, 10, 3)],
)
def test_any_rows_of_any_layer(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2)).double().eval()
    spatial = (5,) * (layer.weight.dim() - 2)
    x = torch.randn(2, 6, *spatial, dtype=torch.float64)
    model(x)
    plain = numbers(model[0].weight)
    refold.attach(model, refold.LoRA(rank=2, sites="0", rows=("1:4", "6:10")), example=x, trainable=["2"])
    perturb(refold.trainable_parameters(model))
    output = model(x).detach()
    refold.merge(model)
    assert relative(model(x), output) < 1e-10
    outputs = 1 if isinstance(layer, nn.ConvTranspose1d) else 0
    same = (numbers(model[0].weight) == plain).all(axis=tuple(i for i in range(plain.ndim) if i != outputs))
    assert same.tolist() == [True, False, False, False, True, True, False, False, False, False]


def test_the_count_and_the_file(tmp_path):
    model = refold.attach(build("vit"), LORA)
    perturb(refold.trainable_parameters(model))
    assert refold.explain(model).adapter_parameters == 2 * 2 * (2 * 32 + 32 * 2)
    x = images(model)
    other = refold.load(build("vit"), refold.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(other(x), model(x))
    assert method_from_json(LORA.to_json()) == LORA


@pytest.mark.parametrize("rows", [(), ("qv",), ("4:4",), ("5:2",), (":3",), ("-1:2",), "q", (1,)])
def test_rows_that_mean_nothing_are_refused(rows):
    with pytest.raises(refold.SiteError, match="rows="):
        refold.LoRA(rows=rows)


@pytest.mark.parametrize(("rows", "sites"), [(("q", "0:8"), None), (("90:97",), None), (("q",), "blocks.*.attn.proj")])
def test_rows_that_a_layer_does_not_have_are_refused(rows, sites):
    with pytest.raises(refold.SiteError, match=r"blocks.0.attn.(qkv|proj): rows="):
        refold.attach(build("vit"), replace(LORA, rows=rows, sites=sites))


def test_what_cannot_be_said_of_rows_elsewhere_is_refused(tmp_path):
    model = refold.attach(build("vit"), LORA)
    refold.attach(model, LORA, name="other")
    with pytest.raises(refold.SiteError, match="default: adapters on some rows only"):
        refold.combine(model, {"default": 0.5, "other": 0.5})
    with pytest.raises(refold.StoreError, match="PEFT has no low-rank adapter on some rows"):
        refold.save_peft(model, tmp_path / "peft")


def test_interleaved_parts_are_refused():
    """timm's MaxViT gives query, key and value head by head: thirds of the rows would be parts of all three."""
    model = timm.create_model("test_maxvit")
    with pytest.raises(refold.SiteError, match=r"attn.qkv: its query, key and value are interleaved head by head"):
        refold.attach(model, refold.LoRA(rank=2, rows=("q", "v")))
    with pytest.raises(refold.SiteError, match="interleaved head by head"):
        refold.attach(model, refold.KAdaptation())
    assert refold.explain(refold.attach(model, refold.LoRA(rank=2, rows=("0:8",)))).adapter_parameters > 0
