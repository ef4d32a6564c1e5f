"""KAdaptation: what is shared by whom, its start, its counts; and which rows of a projection are query and value."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import refold
from refold.adapters import RowBlocks
from refold.hosting import hosted
from refold.methods.parts import rows_of
from refold.sites import Site
from zoo import build, images, perturb


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
    )
    return transformers.ViTForImageClassification(config)


def test_layers_share_the_slow_weights_of_their_part_and_a_block_its_bias():
    model = refold.attach(build("vit"), refold.KAdaptation(rank=8))
    joint = [slot["default"] for slot in hosted(model).values()]
    assert all(isinstance(adapter, RowBlocks) for adapter in joint)
    (q0, v0), (q1, v1) = (adapter.blocks for adapter in joint)
    assert q0.slow is q1.slow
    assert v0.slow is v1.slow
    assert q0.slow is not v0.slow
    assert q0.constant is v0.constant
    assert q0.constant is not q1.constant
    assert [row.shift for row in refold.explain(model).rows if row.slot == "weight"] == ["own bias"] * 2
    assert refold.explain(model).adapter_parameters == 2 * (4 * 8 * 4 + 32) + 4 * 8 * 8


def test_separate_projections_share_alike():
    model = refold.attach(transformers_vit(), refold.KAdaptation(rank=8))
    slots = {path.removeprefix("vit.layers."): slot["default"] for path, slot in hosted(model).items()}
    assert list(slots) == [f"{i}.attention.{letter}_proj" for i in range(2) for letter in "qv"]
    q0, v0, q1, v1 = slots.values()
    assert q0.slow is q1.slow is not v0.slow
    assert v0.slow is v1.slow
    assert q0.constant is v0.constant is not q1.constant
    assert q1.constant is v1.constant
    assert refold.explain(model).adapter_parameters == 2 * (4 * 8 * 4 + 32) + 4 * 8 * 8


def test_without_a_bias_in_the_layer_there_is_none_to_share():
    model = refold.attach(build("vit_without_qkv_bias"), refold.KAdaptation(rank=8))
    assert refold.explain(model).adapter_parameters == 2 * 4 * 8 * 4 + 4 * 8 * 8
    model = refold.attach(build("vit_without_qkv_bias"), refold.KAdaptation(rank=8), allow_new_bias=True)
    assert refold.explain(model).adapter_parameters == 2 * (4 * 8 * 4 + 32) + 4 * 8 * 8
    perturb(refold.trainable_parameters(model), 0.1)
    assert refold.merge(model).rel_l2 < 1e-5
    key = model.blocks[0].attn.qkv.bias[32:64]
    assert not key.any()


def test_the_start_is_the_backbone_and_no_factor_is_dead():
    model = build("vit", torch.float64)
    x = images(model)
    before = model(x).detach()
    refold.attach(model, refold.KAdaptation(rank=16))
    assert torch.equal(model(x), before)
    for slot in hosted(model).values():
        for block in slot["default"].blocks:
            assert not block.q.any()
            assert not block.constant.value.any()
            bound = math.sqrt(6 / (16 + 2))
            assert 0.8 * bound < float(block.p.detach().abs().max()) <= bound
            for slow in (block.slow.u, block.slow.v):
                assert 0.009 < float(slow.detach().abs().max()) <= 0.01
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=1.0))
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        found.append({n.rpartition(".")[2] for n, p in refold.trainable_parameters(model).items() if p.grad.any()})
        optimizer.step()
    assert {"q", "value"} <= found[0]
    assert {"u", "v", "p", "q", "value"} <= found[1]


@pytest.mark.parametrize(("width", "out", "terms"), [(768, 768, 32), (20, 30, 2), (36, 48, 4), (7, 9, 1)])
def test_the_number_of_terms_divides_both_widths(width, out, terms):
    model = nn.Sequential(nn.Linear(width, out))
    refold.attach(model, refold.KAdaptation(sites="0"), example=torch.randn(1, width), trainable=())
    adapter = hosted(model)["0"]["default"]
    assert adapter.slow.u.shape == (terms, terms)
    assert adapter.p.shape == (terms, out // terms)
    assert adapter.q.shape == (terms, width // terms)


@pytest.mark.parametrize("options", [{"rank": 0}, {"scale": 0.0}, {"sites": 3}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=next(iter(options))):
        refold.KAdaptation(**options)


# -- query, key and value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "width", "out", "role", "wanted", "expected"),
    [
        ("blocks.0.attn.qkv", 8, 24, "attention", "qv", {"q": (0, 8), "v": (16, 24)}),
        ("blocks.0.attn.qkv", 8, 24, "", "qkv", {"q": (0, 8), "k": (8, 16), "v": (16, 24)}),
        ("blocks.0.attn.qkv", 8, 32, "attention", "qv", None),  # values wider than keys
        ("visual.resblocks.1.attn", 8, 24, "attention", "v", {"v": (16, 24)}),
        ("blocks.0.attn.kv", 8, 16, "attention", "qv", {"v": (8, 16)}),
        ("blocks.0.attn.qk", 8, 16, "attention", "qv", {"q": (0, 8)}),
        ("layers.0.self_attn.q_proj", 8, 8, "attention", "qv", {"q": (0, 8)}),
        ("layers.0.self_attn.v_proj", 8, 4, "attention", "qv", {"v": (0, 4)}),
        ("layers.0.self_attn.k_proj", 8, 8, "attention", "qv", {}),
        ("layers.0.self_attn.k_proj", 8, 8, "", "qv", None),  # named by the user: meant
        ("encoder.layer.0.attention.attention.key", 8, 8, "attention", "qv", {}),
        ("encoder.layer.0.attention.attention.value", 8, 8, "attention", "qv", {"v": (0, 8)}),
        ("stages.0.blocks.0.modulation.f", 8, 19, "attention", "qv", None),
        ("blocks.0.mlp.fc1", 8, 24, "mlp", "qv", None),
    ],
)
def test_which_rows_are_query_and_value(path, width, out, role, wanted, expected):
    site = Site(path, "weight", "linear", width, out, -1, (out, width), role=role)
    assert rows_of(site, wanted) == expected


def test_explain_says_where_nothing_tells_the_rows():
    model = nn.ModuleDict({"token_mixer": nn.ModuleDict({"qkv": nn.Linear(8, 40)}), "head": nn.Linear(40, 2)})
    model.forward = lambda x: model["head"](model["token_mixer"]["qkv"](x))  # type: ignore[method-assign]
    refold.attach(model, refold.KAdaptation(rank=4), example=torch.randn(1, 8))
    row = refold.explain(model).rows[0]
    assert row.path == "token_mixer.qkv"
    assert "its query, key and value are not told apart: all rows are adapted" in row.reason
