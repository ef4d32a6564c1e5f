"""KronA: its places, its sizes, its start, and the block with a learned residual."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import refold
from reference.weight_maps import kron
from refold.adapters import RowBlocks
from refold.adapters.kronecker import side
from refold.hosting import hosted
from zoo import build, images, perturb, relative


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


@pytest.mark.parametrize(
    ("width", "limit", "expected"),
    [(768, None, 24), (768, 32, 32), (768, 31, 24), (7, 5, 1), (12, 100, 12), (1, None, 1)],
)
def test_the_size_is_the_largest_divisor(width, limit, expected):
    assert side(width, limit) == expected


def test_query_and_value_are_adapted_and_the_key_is_not():
    model = build("vit", torch.float64)
    before = numbers(model.blocks[0].attn.qkv.weight)
    refold.attach(model, refold.KronA(scale=0.5))
    perturb(refold.trainable_parameters(model))
    blocks = hosted(model)["blocks.0.attn.qkv"]["default"]
    assert isinstance(blocks, RowBlocks)
    assert [row.path for row in refold.explain(model).rows if "rows of query and value" in row.reason] == list(
        hosted(model)
    )
    products = [kron(numbers(b.left), numbers(b.right)) for b in blocks.blocks]
    refold.merge(model)
    after = numbers(model.blocks[0].attn.qkv.weight)
    np.testing.assert_allclose(after[:32], before[:32] + 0.5 * products[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(after[32:64], before[32:64])
    np.testing.assert_allclose(after[64:], before[64:] + 0.5 * products[1], rtol=1e-12, atol=1e-14)


def test_a_product_has_full_rank_where_the_sizes_allow():
    model = refold.attach(
        nn.Sequential(nn.Linear(36, 36)), refold.KronA(sites="0"), example=torch.randn(2, 36), trainable=()
    )
    adapter = hosted(model)["0"]["default"]
    perturb(dict(adapter.named_parameters()), 1.0)
    assert adapter.left.shape == adapter.right.shape == (6, 6)
    change = adapter.reparameterize(torch.zeros(36, 36), None)[0]
    assert int(torch.linalg.matrix_rank(change.double())) == 36


def test_the_start_is_a_linears_and_zero():
    model = refold.attach(build("vit"), refold.KronA())
    for slot in hosted(model).values():
        for block in slot["default"].blocks:
            bound = 1 / math.sqrt(block.left.shape[1])
            assert 0.5 * bound < float(block.left.detach().abs().max()) <= bound
            assert not block.right.any()


# -- the block ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "swin", "open_clip_tower", "torchvision_vit", "convnext_conv_mlp", "resnet"])
def test_the_block_is_a_map_before_the_mlp_and_folds(family):
    model = build(family, torch.float64)
    plain, x = {n: numbers(v) for n, v in model.state_dict().items()}, images(model)
    untouched = model(x).detach()
    refold.attach(model, refold.KronA(form="block", scale=0.5))
    assert relative(model(x), untouched) < 1e-12
    perturb({n: p for n, p in refold.trainable_parameters(model).items() if ".refold." in n}, 0.2)
    expected = {}
    for path, slot in hosted(model).items():
        block = slot["default"]
        width = block.left.shape[0] * block.right.shape[0]
        matrix = float(block.residual.detach()) * np.eye(width)
        matrix += 0.5 * kron(numbers(block.left), numbers(block.right))
        weight = plain[f"{path}.weight"]
        expected[f"{path}.weight"] = np.einsum("oj...,ji->oi...", weight, matrix)
    assert expected
    unmerged = model(x).detach()
    assert relative(unmerged, untouched) > 1e-3
    refold.merge(model)
    assert relative(model(x), unmerged) < 1e-10
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(numbers(value), expected.get(name, plain[name]), rtol=1e-11, atol=1e-13)


def test_the_block_learns_its_residual():
    model = refold.attach(build("vit"), refold.KronA(form="block"))
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=0.1))
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        model(images(model)).square().sum().backward()
        reached |= {n for n, p in refold.trainable_parameters(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == set(refold.trainable_parameters(model))
    names = {n.rpartition(".")[2] for n in reached if "refold" in n}
    assert names == {"left", "right", "residual"}


def test_a_block_before_a_grouped_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(12, 12, 3, groups=3))
    with pytest.raises(refold.SiteError, match="0: a channel-mixing map before a convolution of 3 groups"):
        refold.attach(model, refold.KronA(form="block", sites="0"), example=torch.randn(1, 12, 4, 4), trainable=())


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 2.0}, {"form": "res"}, {"scale": float("nan")}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=next(iter(options))):
        refold.KronA(**options)
