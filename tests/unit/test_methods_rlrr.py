"""RLRR: the paper's forward, a part for each of query, key and value, SSF's share, its start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import refold
from refold.adapters import RowBlocks, ScaleShift
from refold.adapters.rescaled import Rescaled
from refold.hosting import hosted
from zoo import build, images, perturb, relative


def test_the_forward_is_that_of_the_paper():
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), torch.randn(5, 12).double()
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    refold.attach(model, refold.RLRR(sites="0"), example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.3)
    adapter = hosted(model)["0"]["default"]
    moved = torch.diag(adapter.rows) @ weight @ torch.diag(adapter.columns)
    assert relative(model(x), x @ (weight + moved).T + bias + adapter.bias) < 1e-12


def test_query_key_and_value_have_vectors_of_their_own():
    model = refold.attach(build("vit"), refold.RLRR(ssf=False))
    kinds = {path.rpartition(".")[2]: slot["default"] for path, slot in hosted(model).items()}
    assert list(kinds) == ["qkv", "proj", "fc1", "fc2"]
    assert isinstance(kinds["qkv"], RowBlocks)
    assert [len(block.columns) for block in kinds["qkv"].blocks] == [32] * 3
    assert refold.explain(model).adapter_parameters == 2 * (4 * 3 * 32 + (32 + 2 * 128) + (128 + 2 * 32))


def test_ssf_follows_every_other_operation():
    model = refold.attach(build("swin"), refold.RLRR())
    found = {path: type(slot["default"]) for path, slot in hosted(model).items()}
    rescaled = [path for path, kind in found.items() if kind is not ScaleShift]
    assert rescaled == [row.path for row in refold.explain(model).rows if row.slot == "weight"]
    assert {path.rpartition(".")[2] for path in rescaled} == {"qkv", "proj", "fc1", "fc2"}
    others = {path for path, kind in found.items() if kind is ScaleShift}
    assert {"patch_embed.proj", "patch_embed.norm", "layers.1.downsample.reduction", "norm"} <= others
    assert others | set(rescaled) == set(hosted(refold.attach(build("swin"), refold.SSF())))
    perturb(refold.trainable_parameters(model))
    x = images(model)
    expected = model(x).detach()
    assert refold.merge(model).rel_l2 < 1e-5
    assert relative(model(x), expected) < 1e-5


def test_named_sites_get_the_map_alone():
    model = refold.attach(build("vit"), refold.RLRR(sites="mlp"))
    assert list(hosted(model)) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]


def test_the_start_is_the_published_one():
    model = nn.Sequential(nn.Linear(400, 300))
    refold.attach(model, refold.RLRR(sites="0"), example=torch.randn(1, 400), trainable=())
    adapter = hosted(model)["0"]["default"]
    assert isinstance(adapter, Rescaled)
    for values, bound in ((adapter.rows, math.sqrt(6)), (adapter.columns, math.sqrt(6 / 400))):
        assert 0.95 * bound < float(values.detach().abs().max()) <= bound
        assert float(values.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not adapter.bias.any()


@pytest.mark.parametrize("options", [{"ssf": 1}, {"sites": ()}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=next(iter(options))):
        refold.RLRR(**options)
