"""refold's adapters and folds against the formulas of the papers, and the formulas against themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import refold
from reference import formulas
from refold.adapters import LinearBottleneck, LowRank

WIDTH, OUT, RANK = 12, 10, 4


def numpy64(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy()


def random_adapter(groups: int, scale: float, *, shift: bool = True, channel_dim: int = -1) -> LinearBottleneck:
    adapter = LinearBottleneck(
        WIDTH, RANK, groups, scale, 0.0, channel_dim=channel_dim, shift=shift, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return adapter


def matrix_and_shift(adapter: LinearBottleneck) -> tuple[np.ndarray, np.ndarray]:
    return formulas.repadapter(
        numpy64(adapter.down),
        numpy64(adapter.up),
        numpy64(adapter.down_bias),
        numpy64(adapter.up_bias),
        scale=adapter.scale,
        groups=adapter.groups,
    )


def test_block_diagonal_holds_every_group_in_its_place():
    up = np.arange(8.0).reshape(4, 2)
    expected = np.array([[0, 1, 0, 0], [2, 3, 0, 0], [0, 0, 4, 5], [0, 0, 6, 7]], dtype=float)
    np.testing.assert_array_equal(formulas.block_diagonal(up, 2), expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scale", [0.1, -3.0])
@pytest.mark.parametrize("shift", [True, False])
def test_repadapter_is_the_published_map(groups, scale, shift):
    adapter = random_adapter(groups, scale, shift=shift)
    matrix, constant = matrix_and_shift(adapter)
    x = np.random.default_rng(0).normal(size=(5, WIDTH))
    np.testing.assert_allclose(
        adapter(torch.from_numpy(x)).detach().numpy(), x @ matrix.T + constant, rtol=1e-13, atol=1e-13
    )
    found = adapter.channel_map()
    np.testing.assert_allclose(found.matrix().numpy(), matrix, rtol=1e-13, atol=1e-13)
    assert (found.shift is not None) == shift
    if found.shift is not None:
        np.testing.assert_allclose(found.shift.numpy(), constant, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("groups", [1, 2])
def test_repadapter_on_channels_first_is_the_same_map(groups):
    adapter = random_adapter(groups, 0.7, channel_dim=-3)
    matrix, constant = matrix_and_shift(adapter)
    x = np.random.default_rng(0).normal(size=(2, WIDTH, 3, 4))
    expected = np.einsum("ij,bjhw->bihw", matrix, x) + constant[None, :, None, None]
    np.testing.assert_allclose(adapter(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-13, atol=1e-13)


def test_repadapter_merged_into_a_linear_is_the_formula():
    model = nn.Sequential(nn.Linear(WIDTH, OUT)).double()
    weight, bias = numpy64(model[0].weight.clone()), numpy64(model[0].bias.clone())
    refold.attach(
        model, refold.RepAdapter(rank=RANK, groups=2, scale=0.3), example=torch.ones(1, WIDTH).double(), trainable=()
    )
    slot = model[0].get_submodule("refold.default")
    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.normal_()
    matrix, shift = matrix_and_shift(slot)
    folded, moved = formulas.fold_linear(weight, matrix, shift)
    refold.merge(model)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), folded, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(model[0].bias.detach().numpy(), bias + moved, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_repadapter_around_a_convolution_and_its_fold_are_the_formula(padding, stride):
    """The unmerged path is ``conv(M x) + (sum over the kernel of W) c``, merged it is one convolution."""
    model = nn.Sequential(nn.Conv2d(WIDTH, OUT, 3, padding=padding, stride=stride)).double()
    weight, bias = numpy64(model[0].weight.clone()), numpy64(model[0].bias.clone())
    x = np.random.default_rng(0).normal(size=(2, WIDTH, 6, 7))
    refold.attach(model, refold.RepAdapter(rank=RANK, scale=0.7), example=torch.from_numpy(x), trainable=())
    slot = model[0].get_submodule("refold.default")
    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.normal_()
    matrix, shift = matrix_and_shift(slot)
    folded, moved = formulas.fold_conv(weight, matrix, shift)
    mapped = np.einsum("ij,bjhw->bihw", matrix, x)
    unmerged = formulas.conv2d(mapped, weight, bias + moved, padding=padding, stride=stride)
    model.eval()
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach().numpy(), unmerged, rtol=1e-11, atol=1e-11)
    refold.merge(model)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), folded, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(model[0].bias.detach().numpy(), bias + moved, rtol=1e-12, atol=1e-12)
    merged = formulas.conv2d(x, folded, bias + moved, padding=padding, stride=stride)
    np.testing.assert_allclose(merged, unmerged, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(WIDTH, OUT), (2, 5, WIDTH)),
        (nn.Conv1d(WIDTH, OUT, 3, padding=1), (2, WIDTH, 7)),
        (nn.Conv2d(WIDTH, OUT, 3, dilation=2, padding=2, padding_mode="reflect"), (2, WIDTH, 6, 6)),
        (nn.Conv2d(WIDTH, 2 * WIDTH, 3, groups=3), (2, WIDTH, 6, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_lora_merged_is_the_formula(layer, shape):
    model = nn.Sequential(layer).double()
    weight, bias = numpy64(layer.weight.clone()), numpy64(layer.bias.clone())
    method = refold.LoRA(rank=RANK, scale=-1.5, sites="0")
    refold.attach(model, method, example=torch.randn(shape).double(), trainable=())
    slot = layer.get_submodule("refold.default")
    assert isinstance(slot, LowRank)
    with torch.no_grad():
        slot.up.normal_()
    expected = formulas.lora(weight, numpy64(slot.down), numpy64(slot.up), -1.5)
    refold.merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(layer.bias.detach().numpy(), bias)


def test_lora_on_packed_attention_is_the_formula():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x)[0]

    model = Block().double()
    weight = numpy64(model.attn.in_proj_weight.clone())
    refold.attach(model, refold.LoRA(rank=RANK), example=torch.randn(1, 4, WIDTH).double(), trainable=())
    slot = model.attn.get_submodule("refold.default")
    with torch.no_grad():
        slot.up.normal_()
    refold.merge(model)
    expected = formulas.lora(weight, numpy64(slot.down), numpy64(slot.up), 1.0)
    np.testing.assert_allclose(model.attn.in_proj_weight.detach().numpy(), expected, rtol=1e-13, atol=1e-13)


def test_a_batchnorm_absorbs_the_shift_as_the_formula_says():
    model = nn.Sequential(nn.Conv2d(WIDTH, OUT, 3, padding=1, bias=False), nn.BatchNorm2d(OUT)).double().eval()
    model[1].running_mean.normal_()
    weight, mean = numpy64(model[0].weight.clone()), numpy64(model[1].running_mean.clone())
    x = torch.randn(2, WIDTH, 5, 5).double()
    refold.attach(model, refold.RepAdapter(rank=RANK, scale=-2.0), example=x, trainable=())
    assert refold.explain(model).rows[0].shift == "BatchNorm 1"
    slot = model[0].get_submodule("refold.default")
    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.normal_()
    matrix, shift = matrix_and_shift(slot)
    folded, moved = formulas.fold_conv(weight, matrix, shift)
    refold.merge(model)
    np.testing.assert_allclose(model[0].weight.detach().numpy(), folded, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        model[1].running_mean.numpy(), formulas.batchnorm_absorbs(mean, moved), rtol=1e-12, atol=1e-12
    )


def test_the_norm_before_absorbs_the_shift_as_the_formula_says():
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, OUT, bias=False)).double()
    weight, bias = numpy64(model[1].weight.clone()), numpy64(model[0].bias.clone())
    refold.attach(model, refold.RepAdapter(rank=RANK, scale=0.5), example=torch.randn(2, WIDTH).double(), trainable=())
    assert refold.explain(model).rows[0].shift == "norm 0"
    slot = model[1].get_submodule("refold.default")
    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.normal_(std=0.2)
    matrix, shift = matrix_and_shift(slot)
    refold.merge(model)
    np.testing.assert_allclose(model[1].weight.detach().numpy(), weight @ matrix, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        model[0].bias.detach().numpy(), formulas.layer_norm_absorbs(bias, matrix, shift), rtol=1e-11, atol=1e-11
    )


def test_a_published_initialisation():
    """Xavier-uniform down, everything else zero (RepAdapter); Kaiming-uniform down with a = sqrt 5, up zero (LoRA)."""
    rep = LinearBottleneck(768, 8, 2, 1.0, 0.1, channel_dim=-1, shift=True)
    bound = (6 / (768 + 8)) ** 0.5
    assert 0.95 * bound < float(rep.down.detach().abs().max()) <= bound
    assert float(rep.down.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert rep.up.shape == (768, 4)
    assert not any(bool(p.any()) for p in (rep.up, rep.down_bias, rep.up_bias))
    low = LowRank((2304, 768), 8, 1.0, 0.0, channel_dim=-1)
    bound = (6 / ((1 + 5) * 768)) ** 0.5
    assert 0.95 * bound < float(low.down.detach().abs().max()) <= bound
    assert not bool(low.up.any())
