"""LoRand against its formula with both projections written out, its start, its counts, and where it sits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import refold
from by_hand import adapted, counted, large
from reference import side
from refold.adapters.products import ProductBottleneck
from refold.adapters.side import Layout
from refold.hosting import hosted
from zoo import build, images, perturb


@pytest.mark.parametrize("layer_scale", [False, True], ids=["plain", "layer scale"])
@pytest.mark.parametrize("branches", [1, 3])
def test_a_whole_vit_is_the_formula(branches, layer_scale):
    """Behind the projection, and before the layer scale."""
    model, x, tensors, by_hand = adapted(refold.LoRand(rank=2, branches=branches), layer_scale=layer_scale)
    assert set(tensors) == {(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")}
    assert tensors[0, "mlp"]["down.outer"].shape == (branches, 6, 2)
    expected = by_hand(behind=lambda block, role, z: z + side.product_bottleneck(z, tensors[block, role]))
    assert not np.allclose(by_hand(), expected, rtol=1e-2)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (2, 8, 3, 5)], ids=["channels last", "channels first"])
def test_any_layout(shape):
    adapter = ProductBottleneck(8, 4, 2, 3).double()
    x = torch.randn(shape, dtype=torch.float64)
    dim = -1 if shape[-1] == 8 else -3
    t = {name: value.detach().numpy() for name, value in adapter.state_dict().items()}
    expected = np.moveaxis(side.product_bottleneck(np.moveaxis(x.numpy(), dim, -1), t), -1, dim)
    np.testing.assert_allclose(adapter(x, Layout(dim)).detach().numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("branches", "expected"), [(2, 1_203_456), (4, 2_370_816), (8, 4_705_536)])
def test_parameters_on_swin_b(branches, expected):
    """The paper's LoRand (1.20M), LoRand+ and LoRand++."""
    blocks = {128: 2, 256: 2, 512: 18, 1024: 2}
    formula = sum(2 * count * (2 * branches * (8 * d + 8 * 8 + 8 * d // 2) + d // 2 + d) for d, count in blocks.items())
    assert formula == expected
    model = large("swin_base_patch4_window7_224", img_size=64, window_size=2)
    assert counted(model, refold.LoRand(branches=branches)) == expected


def test_the_start_is_the_published_one_and_every_tensor_has_a_gradient():
    adapter = ProductBottleneck(768, 384, 2, 8)
    for name, fan in (("inner", 8), ("core", 8), ("outer", 384), ("bias", 768)):
        found, bound = getattr(adapter.down, name).detach(), 1 / math.sqrt(fan)
        assert 0.9 * bound < float(found.abs().max()) <= bound
        assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert 0.9 / math.sqrt(768) < float(adapter.up.outer.detach().abs().max()) <= 1 / math.sqrt(768)
    model, x, *_ = adapted(refold.LoRand(rank=2), layer_scale=True, size=0.0)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in refold.trainable_parameters(model).values())


def test_it_sits_behind_the_last_projections():
    model = refold.attach(build("swin"), refold.LoRand())
    blocks = ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1")
    assert set(hosted(model)) == {f"{b}.{leaf}" for b in blocks for leaf in ("attn.proj", "mlp.fc2")}


def test_a_file_carries_it_bit_for_bit_and_it_does_not_merge(tmp_path):
    model = refold.attach(build("convnext"), refold.LoRand(rank=3, sites="mlp"))
    perturb(refold.trainable_parameters(model), 0.3)
    x = images(model)
    other = refold.load(build("convnext"), refold.save(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(other(x), model(x))
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)


def test_a_width_of_one_is_no_empty_bottleneck():
    model = nn.Sequential(nn.Conv2d(3, 1, 1))
    refold.attach(model, refold.LoRand(sites="0"), example=torch.randn(1, 3, 4, 4), trainable=())
    assert model[0].get_submodule("refold.default.down").bias.shape == (1,)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"branches": 0}, {"branches": 1.5}, {"sites": 3}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(refold.SiteError, match=f"LoRand: {next(iter(wrong))}="):
        refold.LoRand(**wrong)
