"""combine: the weighted sum of adapters is W + sum_i w_i (W'_i - W), written out here in float64 from parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.hosting import hosted
from refold.inspection import description
from zoo import build, images, perturb, relative

WEIGHTS = {"pets": 0.7, "birds": -0.4, "cells": 1.3}
METHODS: dict[str, list[refold.Method]] = {
    "LoRA": [refold.LoRA(rank=2, scale=2.0), refold.LoRA(rank=4), refold.LoRA(rank=3, scale=0.5)],
    "RepAdapter": [
        refold.RepAdapter(rank=4, groups=2, scale=0.5),
        refold.RepAdapter(rank=8, groups=4),
        refold.RepAdapter(rank=2, groups=2, scale=3.0),
    ],
    "RepAdapter, dense": [refold.RepAdapter(rank=n, groups=1) for n in (1, 2, 3)],
    "SSF": [refold.SSF()] * 3,
}
FAMILIES = ["vit", "vit_without_qkv_bias", "swin", "convnext", "efficientnet", "open_clip_tower"]


def attached(family: str, kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = build(family, dtype)
    for name, method in zip(WEIGHTS, METHODS[kind], strict=True):
        refold.attach(model, method, name=name)
        perturb(refold.trainable_parameters(model), 0.1)
    return model


# -- the formulas ----------------------------------------------------------------------------------------------


def lora_change(adapter: nn.Module, weight: Tensor) -> Tensor:
    """W'_i - W = s B A."""
    return adapter.scale * torch.einsum("or,r...->o...", adapter.up, adapter.down).view(weight.shape)


def rep_map(adapter: nn.Module) -> tuple[Tensor, Tensor]:
    """M_i - I and c_i of x + s (B (A x + a) + b), B put together block by block."""
    width, rank, groups = adapter.width, adapter.rank, adapter.groups
    up = torch.zeros(width, rank, dtype=torch.float64)
    for g in range(groups):
        rows = slice(g * width // groups, (g + 1) * width // groups)
        up[rows, g * rank // groups : (g + 1) * rank // groups] = adapter.up[rows]
    shift = torch.zeros(width, dtype=torch.float64)
    if adapter.down_bias is not None:
        shift = adapter.scale * (up @ adapter.down_bias + adapter.up_bias)
    return adapter.scale * up @ adapter.down, shift


def ssf_map(adapter: nn.Module) -> tuple[Tensor, Tensor]:
    return adapter.gamma - 1, torch.zeros_like(adapter.gamma) if adapter.beta is None else adapter.beta


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", METHODS)
@torch.no_grad()
def test_every_adapter_is_the_weighted_sum(kind, family):
    model = refold.combine(attached(family, kind), WEIGHTS, name="sum", head="birds")
    slots = hosted(model)
    assert slots
    for path, slot in slots.items():
        if kind == "LoRA":
            weight = torch.zeros(slot.sites["sum"][0].weight_shape, dtype=torch.float64)
            expected = sum(w * lora_change(slot[n], weight) for n, w in WEIGHTS.items())
            found = slot["sum"].reparameterize(weight, None)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13, msg=path)
            continue
        terms = rep_map if kind.startswith("Rep") else ssf_map
        matrix = sum(w * terms(slot[n])[0] for n, w in WEIGHTS.items())
        shift = sum(w * terms(slot[n])[1] for n, w in WEIGHTS.items())
        found = slot["sum"].channel_map()
        identity = torch.eye(found.width, dtype=torch.float64)
        expected = identity + (matrix if kind.startswith("Rep") else torch.diag(matrix))
        torch.testing.assert_close(found.matrix(), expected, rtol=0, atol=1e-12, msg=path)
        given = torch.zeros(found.width, dtype=torch.float64) if found.shift is None else found.shift
        torch.testing.assert_close(given, shift, rtol=0, atol=1e-12, msg=path)


@pytest.mark.parametrize("family", ["vit", "vit_without_qkv_bias", "efficientnet", "open_clip_tower"])
@pytest.mark.parametrize("kind", METHODS)
def test_the_folded_weights_are_the_weighted_sum_of_folded_weights(kind, family):
    """W + sum_i w_i (W'_i - W), biases and statistics alike; a shift in a norm before the layer is M^-1 c instead."""
    plain = build(family, torch.float64).state_dict()
    model = attached(family, kind)
    heads = {row.path for row in refold.explain(model).rows if row.slot == "head"}
    total = {n: v.clone() for n, v in plain.items()}
    for name, weight in WEIGHTS.items():
        refold.activate(model, name)
        refold.merge(model)
        for key, value in model.state_dict().items():
            total[key] = total[key] + weight * (value - plain[key])
        refold.unmerge(model)
    refold.combine(model, WEIGHTS, name="sum", head="birds")
    shifts = {row.shift for row in refold.explain(model).rows}
    moved = {shift.removeprefix("norm ") + ".bias" for shift in shifts if shift.startswith("norm ")}
    assert refold.merge(model).rel_l2 < 1e-10
    changed = 0
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] in heads or key in moved or not value.is_floating_point():
            continue
        torch.testing.assert_close(value, total[key], rtol=1e-11, atol=1e-11, msg=key)
        changed += not torch.equal(value, plain[key])
    assert changed


@pytest.mark.parametrize("kind", METHODS)
def test_one_adapter_with_weight_one_is_itself(kind):
    model = attached("vit", kind, torch.float32)
    refold.activate(model, "birds")
    x = images(model)
    expected = model(x).detach()
    refold.combine(model, {"birds": 1.0}, name="same")
    assert relative(model(x), expected) < 1e-6


def test_weights_that_cancel_are_the_backbone():
    model = build("vit", torch.float64)
    x = images(model)
    plain = model(x).detach()
    refold.attach(model, refold.RepAdapter(rank=4), name="a", trainable=())
    perturb(refold.trainable_parameters(model))
    assert relative(model(x), plain) > 1e-3
    refold.combine(model, {"a": 2.0}, name="twice")
    refold.combine(model, {"twice": 1.0, "a": -2.0}, name="none")
    assert relative(model(x), plain) < 1e-12


# -- an ordinary adapter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_it_saves_loads_merges_and_trains(kind, tmp_path: Path):
    model = attached("vit", kind, torch.float32)
    refold.combine(model, WEIGHTS, name="sum", head="birds")
    assert set(refold.explain(model).rows) != set()
    x = images(model)
    expected = model(x).detach()
    path = refold.save(model, tmp_path / "sum.safetensors")
    other = refold.load(build("vit"), path)
    assert torch.equal(other(x), expected)
    assert description(other)["combined"] == WEIGHTS
    assert refold.merge(other).rel_l2 < 1e-5
    refold.unmerge(other)

    optimizer = torch.optim.SGD(refold.param_groups(other, lr=1e-3))
    before = {n: p.clone() for n, p in refold.trainable_parameters(other).items()}
    other(x).pow(2).sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in refold.trainable_parameters(other).items())


def test_the_adapters_it_is_made_of_stay_as_they_are():
    model = attached("vit", "RepAdapter", torch.float32)
    x = images(model)
    outputs = {}
    for name in WEIGHTS:
        refold.activate(model, name)
        outputs[name] = model(x).detach()
    refold.combine(model, WEIGHTS, name="sum", head="cells")
    summed = model(x).detach()
    for name, expected in outputs.items():
        refold.activate(model, name)
        assert torch.equal(model(x), expected)
        perturb({n: p for n, p in refold.trainable_parameters(model).items() if "refold" in n})
    refold.activate(model, "sum")
    assert torch.equal(model(x), summed)


def test_ranks_that_differ_from_layer_to_layer_add_up(tmp_path: Path):
    model = build("vit", torch.float64)
    for name, overrides in (("a", (("blocks.0.*", 3, 0.5),)), ("b", ())):
        refold.attach(model, refold.LoRA(rank=2, overrides=overrides), name=name, trainable=())
        perturb(refold.trainable_parameters(model))
    refold.combine(model, {"a": 1.0, "b": 1.0}, name="sum")
    assert {p: s["sum"].rank for p, s in hosted(model).items()} == {"blocks.0.attn.qkv": 5, "blocks.1.attn.qkv": 4}
    x = images(model)
    path = refold.save(model, tmp_path / "sum.safetensors")
    assert torch.equal(refold.load(build("vit", torch.float64), path)(x), model(x))


# -- heads -----------------------------------------------------------------------------------------------------


def test_the_head_is_the_named_ones():
    model = attached("vit", "LoRA", torch.float32)
    heads = {}
    for name in WEIGHTS:
        refold.activate(model, name)
        refold.describe(model, classes=[f"{name} {i}" for i in range(3)])
        heads[name] = model.head.weight.detach().clone()
    for chosen in WEIGHTS:
        refold.combine(model, WEIGHTS, name=f"sum_{chosen}", head=chosen)
        assert torch.equal(model.head.weight, heads[chosen])
        assert description(model)["classes"] == [f"{chosen} {i}" for i in range(3)]
        assert model.head.weight.requires_grad


def test_equal_heads_need_no_choice():
    model = build("vit")
    for name in ("a", "b"):
        refold.attach(model, refold.LoRA(rank=2), name=name)
        perturb({n: p for n, p in refold.trainable_parameters(model).items() if "refold" in n})
        refold.describe(model, classes=["x", "y", "z"], task=name)
    refold.combine(model, {"a": 0.5, "b": 0.5}, name="sum")
    assert description(model) == {"classes": ["x", "y", "z"], "combined": {"a": 0.5, "b": 0.5}}


# -- refusals --------------------------------------------------------------------------------------------------


def refuses(model: nn.Module, reason: str, weights: dict[str, float], **options: object) -> None:
    x = images(model)
    output, keys = model(x).detach(), list(model.state_dict())
    with pytest.raises(refold.SiteError, match=reason):
        refold.combine(model, weights, **{"name": "sum", **options})
    assert torch.equal(model(x), output)
    assert list(model.state_dict()) == keys


def two(first: refold.Method, second: refold.Method, **options: object) -> nn.Module:
    model = build("vit")
    refold.attach(model, first, name="a", **options)
    refold.attach(model, second, name="b")
    return model


BOTH = {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (refold.LoRA(), refold.RepAdapter(), "different methods.*a is LoRA, b is RepAdapter.*of one method"),
        (refold.LoRA(), refold.DoRA(), "different methods"),
        (refold.DoRA(), refold.DoRA(), "sum of DoRA adapters is no DoRA adapter.*LoRA, RepAdapter, SSF.*switch"),
        (refold.OFT(block=4), refold.OFT(block=4), "sum of OFT adapters is no OFT adapter"),
        (refold.BitFit(), refold.BitFit(), "sum of BitFit adapters"),
        (refold.LinearProbe(), refold.LinearProbe(), "sum of LinearProbe adapters"),
        (
            refold.LoRA(),
            refold.LoRA(sites="mlp"),
            r"blocks.0.attn.qkv: 'a' and 'b' have different sites.*same sites=",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, refold.Method) else None,
)
def test_what_has_no_sum_is_refused(first, second, reason):
    refuses(two(first, second), reason, BOTH)


def test_different_heads_are_refused_until_one_is_named():
    model = attached("vit", "LoRA", torch.float32)
    refuses(model, r"'pets' and 'birds' have different heads.*head='pets'", WEIGHTS)
    refuses(model, "nobody: is not among the adapters", WEIGHTS, head="nobody")
    refold.combine(model, WEIGHTS, name="sum", head="pets")


def test_a_tensor_trained_in_place_is_refused():
    model = two(refold.LoRA(), refold.LoRA(), trainable=("head", "blocks.0.norm1.weight"))
    with torch.no_grad():
        model.blocks[0].norm1.weight.add_(1.0)
    refuses(model, "different heads", BOTH)
    # Named as part of the head it is taken over with it.
    refold.combine(model, BOTH, name="sum", head="a")


@pytest.mark.parametrize(
    ("weights", "options", "reason"),
    [
        ({}, {}, "no adapters to combine"),
        ({"a": 0.0, "b": 1.0}, {}, "a: 0.0 is no weight"),
        ({"a": float("nan")}, {}, "a: nan is no weight"),
        ({"a": True}, {}, "a: True is no weight"),
        ({"a": 1.0, "c": 1.0}, {}, "no adapter named 'c'"),
        (BOTH, {"name": "b"}, "named 'b' is attached already"),
        (BOTH, {"name": "not a name"}, "cannot be an adapter's name"),
    ],
)
def test_odd_arguments_are_refused(weights, options, reason):
    refuses(two(refold.LoRA(), refold.LoRA()), reason, weights, **options)


def test_a_merged_and_a_plain_model_are_refused():
    model = two(refold.LoRA(), refold.LoRA())
    refold.merge(model)
    refuses(model, "adapter 'b' is merged", BOTH)
    refuses(build("vit"), "no adapter is attached", BOTH)


class Block(nn.Module):
    """Separate projections that read one tensor, which share one adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query(x) @ self.key(x).mT).softmax(-1) @ self.value(x)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Block()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x))


def test_shared_adapters_stay_shared(tmp_path: Path):
    model = Tokens().double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    method = refold.RepAdapter(rank=2, groups=1, sites="attention")
    for name in ("a", "b"):
        refold.attach(model, method, name=name, example=x, trainable=())
        perturb(refold.trainable_parameters(model), 0.1)
    slots = hosted(model)
    matrices = {n: rep_map(slots["attention.query"][n])[0] for n in ("a", "b")}
    refold.combine(model, {"a": 0.5, "b": 2.0}, name="sum")
    slots = hosted(model)
    assert slots["attention.query"]["sum"] is slots["attention.key"]["sum"] is slots["attention.value"]["sum"]
    path = refold.save(model, tmp_path / "sum.safetensors")
    expected = model(x).detach()
    weights = {n: v.clone() for n, v in model.state_dict().items() if ".refold." not in n}
    refold.merge(model)
    change = 0.5 * matrices["a"] + 2.0 * matrices["b"]
    for layer in ("query", "key", "value"):
        base = weights[f"attention.{layer}.weight"]
        found = model.get_parameter(f"attention.{layer}.weight")
        torch.testing.assert_close(found, base + base @ change, rtol=0, atol=1e-13)
    other = Tokens().double().eval()
    other.load_state_dict(weights)
    assert torch.equal(refold.load(other, path, example=x)(x), expected)
