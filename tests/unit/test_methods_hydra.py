"""Hydra: the paper's forward, its start, its dropout, and layers without a bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import refold
from refold.adapters.branches import Branches
from refold.hosting import hosted
from zoo import build, perturb, relative


def one_layer(layer: nn.Module, x: torch.Tensor, **options: object) -> tuple[nn.Module, Branches]:
    model = nn.Sequential(layer).double()
    refold.attach(model, refold.Hydra(rank=3, scale=1.5, sites="0", **options), example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.3)
    adapter = hosted(model)["0"]["default"]
    assert isinstance(adapter, Branches)
    return model, adapter


def test_the_forward_is_that_of_the_paper_with_dropout_on_both_codes():
    """The parallel branch reads the layer's input, the sequential one its output, bias included."""
    x = torch.randn(5, 12).double()
    model, adapter = one_layer(nn.Linear(12, 10), x, dropout=0.4)
    y = F.linear(x, model[0].weight, model[0].bias)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(0)
        wanted = y
        for branch, source in ((adapter.parallel, x), (adapter.sequential, y)):
            code = F.dropout(F.linear(source, branch.down, branch.down_bias), 0.4, mode)
            wanted = wanted + 1.5 * F.linear(code, branch.up, branch.up_bias)
        torch.manual_seed(0)
        assert relative(model(x), wanted) < 1e-12


def test_the_start_is_the_published_one():
    model = refold.attach(build("vit"), refold.Hydra(rank=8))
    for slot in hosted(model).values():
        for branch in (slot["default"].parallel, slot["default"].sequential):
            bound = math.sqrt(6 / (8 + branch.down.shape[1]))
            assert 0.85 * bound < float(branch.down.detach().abs().max()) <= bound
            assert not any(p.any() for n, p in branch.named_parameters() if n != "down")


def test_places_are_the_last_projections_of_attention_and_mlp():
    model = refold.attach(build("vit"), refold.Hydra())
    found = [(row.path, row.role, row.shift) for row in refold.explain(model).rows if row.slot == "weight"]
    assert found == [
        (f"blocks.{i}.{path}", role, "own bias")
        for i in range(2)
        for path, role in (("attn.proj", "attention_out"), ("mlp.fc2", "mlp_out"))
    ]


def test_a_layer_without_a_bias_gets_branches_without_theirs():
    x = torch.randn(5, 12).double()
    model, adapter = one_layer(nn.Linear(12, 10, bias=False), x)
    assert refold.explain(model).rows[0].shift == "none"
    assert [n for n, _ in adapter.named_parameters()] == [
        "parallel.down",
        "parallel.up",
        "sequential.down",
        "sequential.up",
    ]
    y = x @ model[0].weight.T
    wanted = y + 1.5 * (x @ adapter.parallel.down.T @ adapter.parallel.up.T)
    wanted = wanted + 1.5 * (y @ adapter.sequential.down.T @ adapter.sequential.up.T)
    assert relative(model.eval()(x), wanted) < 1e-12
    refold.merge(model)
    assert model[0].bias is None
    assert relative(model(x), wanted) < 1e-12


@pytest.mark.parametrize("options", [{"rank": 0}, {"scale": 0}, {"dropout": -0.1}, {"sites": ""}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=next(iter(options))):
        refold.Hydra(**options)
