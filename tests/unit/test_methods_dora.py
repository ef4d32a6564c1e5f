"""DoRA: the paper's map on every kind of weight, its gradient, its count, and per-layer ranks shared with LoRA."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

import refold
from reference import formulas
from refold.adapters import Decomposed
from refold.methods import method_from_json
from zoo import build, images, perturb, relative

RANK, SCALE = 3, -1.5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0]


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


def trained(model: nn.Module, example: torch.Tensor, sites: str) -> Decomposed:
    refold.attach(model, refold.DoRA(rank=RANK, scale=SCALE, sites=sites), example=example, trainable=())
    adapter = model.get_submodule(sites).get_submodule("refold.default")
    assert isinstance(adapter, Decomposed)
    perturb(dict(adapter.named_parameters()), 0.3)
    return adapter


def published(adapter: Decomposed, weight: np.ndarray) -> np.ndarray:
    magnitude = numbers(adapter.magnitude) * formulas.channel_norms(weight)
    return formulas.dora(weight, numbers(adapter.down), numbers(adapter.up), magnitude, SCALE)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 10), (2, 5, 12)),
        (nn.Linear(12, 10, bias=False), (2, 12)),
        (nn.Conv1d(12, 10, 3, padding=1), (2, 12, 7)),
        (nn.Conv2d(12, 10, 3, dilation=2, padding=2, stride=2, padding_mode="reflect"), (2, 12, 6, 6)),
        (nn.Conv2d(12, 24, 3, groups=3, bias=False), (2, 12, 6, 6)),
        (nn.Conv3d(12, 10, (1, 3, 3)), (1, 12, 2, 5, 5)),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_unmerged_and_merged_are_the_formula(layer, shape):
    model = nn.Sequential(layer).double()
    x = torch.randn(shape).double()
    weight = numbers(layer.weight)
    adapter = trained(model, x, "0")
    expected = published(adapter, weight)
    unmerged = model(x).detach()
    refold.merge(model)
    np.testing.assert_allclose(numbers(layer.weight), expected, rtol=1e-12, atol=1e-12)
    # The plain layer with the formula's weight is what the unmerged model must have computed.
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(expected))
    assert relative(unmerged, model(x)) < 1e-12


def test_packed_attention_is_the_formula_and_keeps_its_other_rows():
    model = Attention().double()
    weight, out = numbers(model.attn.in_proj_weight), numbers(model.attn.out_proj.weight)
    x = torch.randn(2, 4, 12).double()
    adapter = trained(model, x, "attn")
    expected, unmerged = published(adapter, weight), model(x).detach()
    refold.merge(model)
    np.testing.assert_allclose(numbers(model.attn.in_proj_weight), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(numbers(model.attn.out_proj.weight), out)
    assert relative(unmerged, model(x)) < 1e-12


def test_the_norm_is_a_constant_in_the_gradient():
    """Section 4.3 of the paper, written out: d/dV of m V / n, with n a number."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    x, wanted = torch.randn(7, 12).double(), torch.randn(7, 10).double()
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    adapter = trained(model, x, "0")
    (model(x) * wanted).sum().backward()

    down, up, relative_magnitude = (
        p.detach().clone().requires_grad_() for p in (adapter.down, adapter.up, adapter.magnitude)
    )
    direction = weight + SCALE * up @ down
    norm = direction.detach().pow(2).sum(1).sqrt()
    magnitude = relative_magnitude * weight.pow(2).sum(1).sqrt()
    full = (magnitude / norm)[:, None] * direction
    ((x @ full.T + bias) * wanted).sum().backward()
    for found, expected in ((adapter.down, down), (adapter.up, up), (adapter.magnitude, relative_magnitude)):
        assert relative(found.grad, expected.grad) < 1e-12


def test_a_zero_channel_stays_zero_and_finite():
    model = nn.Sequential(nn.Linear(12, 10)).double()
    with torch.no_grad():
        model[0].weight[3] = 0
    x = torch.randn(2, 12).double()
    trained(model, x, "0")
    unmerged = model(x).detach()
    assert torch.equal(unmerged[:, 3], model[0].bias.detach()[3].expand(2))
    assert bool(torch.isfinite(unmerged).all())
    refold.merge(model)
    assert relative(model(x), unmerged) < 1e-12


def test_parameters_on_vit_b16():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    refold.attach(model, refold.DoRA(rank=8))
    # LoRA's A and B on the joint qkv, and one magnitude for each of its 3 * 768 rows, in 12 blocks.
    expected = 12 * (8 * 768 + 8 * 2304 + 2304)
    assert expected == 322_560
    assert refold.explain(model).adapter_parameters == expected
    assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == expected


# -- ranks and scales of single layers, which DoRA shares with LoRA ----------------------------------------------


@pytest.mark.parametrize("kind", [refold.LoRA, refold.DoRA])
def test_overrides_set_rank_and_scale_of_single_layers(kind, tmp_path):
    method = kind(rank=2, scale=0.5, overrides=(("blocks.1.attn.qkv", 5, -2.0), ("blocks.*", 3, 0.7)))
    model = refold.attach(build("vit"), method)
    found = {row.path: row.parameters for row in refold.explain(model).rows if row.slot == "weight"}
    extra = 96 if kind is refold.DoRA else 0
    assert found == {"blocks.0.attn.qkv": 3 * (32 + 96) + extra, "blocks.1.attn.qkv": 5 * (32 + 96) + extra}
    adapters = [model.get_submodule(f"{path}.refold.default") for path in found]
    assert [(a.rank, a.scale) for a in adapters] == [(3, 0.7), (5, -2.0)]
    perturb(refold.trainable_parameters(model))
    x = images(model)
    expected = model(x).detach()
    path = refold.save(model, tmp_path / "adapter.safetensors")
    other = refold.load(build("vit"), path)
    assert torch.equal(other(x), expected)
    refold.merge(other)
    assert relative(other(x), expected) < 1e-5


@pytest.mark.parametrize("kind", [refold.LoRA, refold.DoRA])
def test_overrides_survive_json(kind):
    method = kind(sites=("a", "b"), overrides=(("a", 3, 1.5),))
    told = {**method.to_json(), "sites": ["a", "b"], "overrides": [["a", 3, 1.5]]}  # what JSON makes of it
    assert method_from_json(told) == method
    assert hash(method_from_json(told)) == hash(method)


@pytest.mark.parametrize(
    "overrides", [3, "a", (("a", 3),), (("a", 0, 1.0),), (("a", True, 1.0),), (("a", 3, 0.0),), (("", 3, 1.0),)]
)
def test_wrong_overrides_are_refused(overrides):
    with pytest.raises(refold.SiteError, match="overrides"):
        refold.LoRA(overrides=overrides)


def test_an_override_without_a_layer_is_refused():
    with pytest.raises(refold.SiteError, match=r"blocks\.9.*none of the adapted layers"):
        refold.attach(build("vit"), refold.LoRA(overrides=(("blocks.9.*", 3, 1.0),)))
