"""GLoRA and PACE: the papers' forwards, every choice of paths, layers without a bias, their starts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import refold
from refold.adapters.modulated import PATHS, Modulated
from refold.hosting import hosted
from refold.methods import method_from_json
from zoo import build, perturb, relative

X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def one_layer(
    method: refold.Method, layer: nn.Module, size: float = 0.3, **options: bool
) -> tuple[nn.Module, Modulated]:
    model = nn.Sequential(layer).double()
    refold.attach(model, method, example=X, trainable=(), **options)
    perturb(refold.trainable_parameters(model), size)
    return model, hosted(model)["0"]["default"]


def test_the_forward_of_glora_is_that_of_the_paper():
    model, adapter = one_layer(refold.GLoRA(rank=3, sites="0"), nn.Linear(12, 10))
    a, b, c = (adapter.paths[name].rows @ adapter.paths[name].columns for name in "abc")
    d, e = (adapter.paths[name].rows for name in "de")
    weight, bias = model[0].weight, model[0].bias
    wanted = X @ (weight + weight * a + b).T + bias + bias * d + e + (weight @ c).squeeze()
    assert relative(model(X), wanted) < 1e-12


def test_the_forward_of_pace_is_that_of_the_paper():
    model, adapter = one_layer(refold.PACE(rank=3, sites="0"), nn.Linear(12, 10))
    assert [n for n, _ in adapter.named_parameters()] == [
        "paths.a.rows", "paths.a.columns", "paths.c.rows", "paths.c.columns", "paths.d.rows"
    ]  # fmt: skip
    factor = adapter.paths["a"].rows @ adapter.paths["a"].columns
    prompt = adapter.paths["c"].rows @ adapter.paths["c"].columns
    weight, bias = model[0].weight, model[0].bias
    wanted = X @ (weight * (1 + factor)).T + bias * (1 + adapter.paths["d"].rows) + (weight @ prompt).squeeze()
    assert relative(model(X), wanted) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
def test_every_choice_of_paths_merges_and_counts(bias):
    """All 4 * 4 * 3 * 3 * 3 of them, but the empty one."""
    rows = {"lora": 2, "vector": 1}
    for forms in itertools.product(*([*PATHS[name], "none"] for name in PATHS)):
        if set(forms) == {"none"}:
            continue
        method = refold.GLoRA(rank=2, **dict(zip(PATHS, forms, strict=True)))
        used = forms if bias else (*forms[:2], "none", "none", "none")
        if set(used) == {"none"}:
            with pytest.raises(refold.SiteError, match=r"nothing to train .*0: the layer has no bias for the chosen"):
                one_layer(method, nn.Linear(12, 10, bias=bias))
            continue
        model, adapter = one_layer(method, nn.Linear(12, 10, bias=bias))
        sizes = [10 * rows.get(f, 0) + 12 * (f == "lora") * 2 + (f == "scalar") for f in used[:2]]
        sizes.append(12 * rows.get(used[2], 0) + 2 * (used[2] == "lora"))
        sizes += [10 * (f == "vector") + (f == "scalar") for f in used[3:]]
        assert sum(p.numel() for p in adapter.parameters()) == sum(sizes), forms
        expected = model(X).detach()
        refold.merge(model)
        assert relative(model(X), expected) < 1e-12, forms


def test_a_new_bias_can_be_added_to_and_not_multiplied():
    model, adapter = one_layer(refold.GLoRA(sites="0"), nn.Linear(12, 10, bias=False), allow_new_bias=True)
    assert list(adapter.paths) == ["a", "b", "c", "e"]
    expected = model(X).detach()
    refold.merge(model)
    assert relative(model(X), expected) < 1e-12
    refold.detach(model)
    model, adapter = one_layer(refold.PACE(sites="0"), nn.Linear(12, 10, bias=False), allow_new_bias=True)
    assert list(adapter.paths) == ["a", "c"]


def test_layers_with_nothing_to_train_are_left_out_or_refused():
    method = refold.GLoRA(a="none", b="none")
    model = refold.attach(build("vit_without_qkv_bias"), method)
    told = {row.path: row.reason for row in refold.explain(model).rows if row.slot == "-"}
    assert told == {f"blocks.{i}.attn.qkv": "left out: the layer has no bias for the chosen paths" for i in range(2)}
    with pytest.raises(refold.SiteError, match=r"blocks\.0\.attn\.qkv: the layer has no bias"):
        refold.attach(build("vit_without_qkv_bias"), refold.GLoRA(a="none", b="none", sites="attention"))


@pytest.mark.parametrize("method", [refold.GLoRA(rank=8), refold.PACE(rank=8)], ids=lambda m: type(m).__name__)
def test_the_start_is_the_backbone(method):
    model = refold.attach(build("vit"), method)
    for slot in hosted(model).values():
        for name, path in slot["default"].paths.items():
            assert not path.rows.any()
            if path.columns is not None:
                bound = math.sqrt(6 / (8 + (1 if name == "c" else path.columns.shape[1])))
                assert path.columns.shape[0] == 8
                assert 0.3 * bound < float(path.columns.detach().abs().max()) <= bound


def test_choices_survive_json():
    method = refold.GLoRA(a="scalar", c="none", sites=("x", "y"))
    assert method_from_json({**method.to_json(), "sites": ["x", "y"]}) == method


@pytest.mark.parametrize(
    "options",
    [{"a": "matrix"}, {"b": None}, {"c": "scalar"}, {"d": "lora"}, {"e": ""}, {"rank": 0}, {"a": "none"}],
    ids=str,
)
def test_wrong_hyper_parameters_are_refused(options):
    wrong = dict.fromkeys("bcde", "none") if options == {"a": "none"} else {}
    with pytest.raises(refold.SiteError, match=f"{next(iter(options))}="):
        refold.GLoRA(**options, **wrong)
