"""ARC: the paper's forward, what is shared, its start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import refold
from refold.hosting import hosted
from zoo import build, perturb, relative


def test_the_forward_is_that_of_the_paper_with_dropout_on_the_code():
    model, x = nn.Sequential(nn.Linear(12, 10)).double(), torch.randn(5, 12).double()
    refold.attach(model, refold.ARC(rank=4, dropout=0.4, sites="0"), example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.3)
    adapter = hosted(model)["0"]["default"]
    down = adapter.shared.matrix
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(0)
        code = F.dropout(x @ down.T * adapter.coefficients, 0.4, mode)
        wanted = F.linear(x + code @ down + adapter.bias, model[0].weight, model[0].bias)
        torch.manual_seed(0)
        assert relative(model(x), wanted) < 1e-12


def test_one_projection_before_the_attention_and_one_before_the_mlp():
    model = refold.attach(build("vit"), refold.ARC(rank=4))
    shared = {path: slot["default"].shared for path, slot in hosted(model).items()}
    assert shared["blocks.0.attn.qkv"] is shared["blocks.1.attn.qkv"]
    assert shared["blocks.0.mlp.fc1"] is shared["blocks.1.mlp.fc1"]
    assert shared["blocks.0.attn.qkv"] is not shared["blocks.0.mlp.fc1"]
    assert refold.explain(model).adapter_parameters == 2 * 4 * 32 + 4 * (4 + 32)


def test_one_of_each_for_every_width():
    model = refold.attach(build("swin"), refold.ARC(rank=4))
    widths = {}
    for slot in hosted(model).values():
        widths.setdefault(slot["default"].width, set()).add(id(slot["default"].shared))
    assert {width: len(parts) for width, parts in widths.items()} == {16: 2, 32: 2}


def test_separate_projections_of_one_attention_use_one_adapter():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
    )
    model = refold.attach(transformers.ViTForImageClassification(config), refold.ARC(rank=4))
    assert refold.explain(model).adapter_parameters == 2 * 4 * 32 + 4 * (4 + 32)
    perturb(refold.trainable_parameters(model), 0.2)
    assert refold.merge(model).rel_l2 < 1e-5


def test_the_start_is_the_backbone_with_a_random_projection():
    model = refold.attach(build("vit"), refold.ARC(rank=8))
    for slot in hosted(model).values():
        adapter = slot["default"]
        bound = math.sqrt(6 / (8 + 32))
        assert 0.9 * bound < float(adapter.shared.matrix.detach().abs().max()) <= bound
        assert not adapter.coefficients.any()
        assert not adapter.bias.any()


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1}, {"sites": ("",)}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=next(iter(options))):
        refold.ARC(**options)
