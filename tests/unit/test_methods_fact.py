"""FacT: one set of factors for each width, its start, its dropout. The formula itself is in the contract tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import refold
from refold.adapters.factored import Factored
from refold.hosting import hosted
from zoo import build, images, perturb, relative

FORMS = ["tt", "tk"]


def adapters(model: nn.Module) -> dict[str, Factored]:
    return {path: slot["default"] for path, slot in hosted(model).items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_layers_of_one_width_share_their_factors(form):
    model = refold.attach(build("swin"), refold.FacT(rank=2, form=form))
    found = adapters(model)
    by_width = {}
    for adapter in found.values():
        by_width.setdefault(adapter.width, set()).add(id(adapter.factors))
    assert {width: len(parts) for width, parts in by_width.items()} == {16: 1, 32: 1}
    assert [a.slices for a in list(found.values())[:4]] == [(3, 1), (1, 1), (4, 1), (1, 4)]
    # Twelve slices in a block; one block of width 16 and two of 32.
    own = {16: 12, 32: 24}
    tt = sum(2 * 2 * width + n * 2 * 2 for width, n in own.items())
    tk = sum(2 * 2 * width + n * 2 + 2**3 for width, n in own.items())
    assert refold.explain(model).adapter_parameters == {"tt": tt, "tk": tk}[form]
    names = [n for n in refold.trainable_parameters(model) if "factors" in n]
    assert names == [
        f"layers.{stage}.blocks.0.attn.qkv.refold.default.factors.{leaf}"
        for stage in range(2)
        for leaf in (["down", "up", "core"] if form == "tk" else ["down", "up"])
    ]


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    model = refold.attach(build("vit"), refold.FacT(rank=16))
    found = list(adapters(model).values())
    factors = found[0].factors
    assert not factors.up.any()
    assert 0.9 / math.sqrt(32) < float(factors.down.detach().abs().max()) <= 1 / math.sqrt(32)
    bound = math.sqrt(6 / (2 * 16 * 16))
    assert 0.95 * bound < float(factors.core.detach().abs().max()) <= bound
    codes = torch.cat([a.codes.detach().flatten() for a in found])
    bound = math.sqrt(6 / (16 + 24))  # P is r x 24: twelve slices in each of two blocks
    assert codes.numel() == 16 * 24
    assert 0.95 * bound < float(codes.abs().max()) <= bound
    cores = [a.codes for a in adapters(refold.attach(build("vit"), refold.FacT(rank=16, form="tt"))).values()]
    for core, inputs in zip(cores[:4], (16, 16, 16, 64), strict=True):  # as nn.Linear(inputs, ...) starts
        assert 0.9 / math.sqrt(inputs) < float(core.detach().abs().max()) <= 1 / math.sqrt(inputs)


def test_dropout_acts_on_the_code_in_training_alone():
    model, x = nn.Sequential(nn.Linear(12, 36)).double(), torch.randn(7, 12).double()
    refold.attach(model, refold.FacT(rank=4, form="tt", scale=2.0, dropout=0.5, sites="0"), example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.3)
    adapter = adapters(model)["0"]
    code = x @ adapter.factors.down.T @ adapter.codes.T
    frozen = F.linear(x, model[0].weight, model[0].bias)

    def expected(code: torch.Tensor) -> torch.Tensor:
        return frozen + 2.0 * torch.cat([part @ adapter.factors.up.T for part in code.chunk(3, dim=-1)], dim=-1)

    torch.manual_seed(3)
    dropped = expected(F.dropout(code, 0.5))
    torch.manual_seed(3)
    assert relative(model.train()(x), dropped) < 1e-12
    assert relative(model.eval()(x), expected(code)) < 1e-12
    assert relative(dropped, expected(code)) > 1e-2


def test_dropout_has_no_place_where_the_weight_is_replaced():
    model = refold.attach(build("open_clip_tower"), refold.FacT(rank=2))
    told = {row.path: row.reason for row in refold.explain(model).rows}
    assert "no dropout" in told["visual.transformer.resblocks.0.attn"]
    assert "no dropout" in told["visual.transformer.resblocks.0.attn.out_proj"]
    assert "no dropout" not in told["visual.transformer.resblocks.0.mlp.c_fc"]
    perturb(refold.trainable_parameters(model))
    expected = model(images(model)).detach()
    refold.merge(model)
    assert relative(model(images(model)), expected) < 1e-5


def test_grouped_convolutions_are_left_out():
    model = nn.Sequential(nn.Conv2d(12, 12, 3, groups=3), nn.Conv2d(12, 12, 1))
    refold.attach(model, refold.FacT(), example=torch.randn(1, 12, 4, 4), trainable=())
    assert list(hosted(model)) == ["1"]


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"form": "cp"}, {"scale": 0.0}, {"dropout": 1.0}, {"sites": ()}, {"rank": True}]
)
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=next(iter(options))):
        refold.FacT(**options)
