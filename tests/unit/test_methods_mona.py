"""Mona against its formula on tokens, windows and maps, its start, its counts, and where it cannot be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import refold
from by_hand import adapted, counted, large, numbers
from reference import side
from refold.adapters.multiscale import MultiScaleBottleneck
from refold.hosting import hosted
from zoo import build, images, perturb

GRID = (3, 5)


@pytest.mark.parametrize("layer_scale", [False, True], ids=["plain", "layer scale"])
def test_a_whole_vit_is_the_formula(layer_scale):
    """Behind both sums; the class token passes the filters alone."""
    model, x, tensors, by_hand = adapted(refold.Mona(hidden=5), layer_scale=layer_scale)
    assert set(tensors) == {(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")}
    expected = by_hand(after=lambda block, role, s: side.mona(s, tensors[block, role], GRID, prefix=1))
    assert not np.allclose(by_hand(), expected, rtol=1e-2)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


def blocks_of(family: str, block: str, branches: tuple[str, ...]) -> tuple[Tensor, list[Tensor], dict[str, nn.Module]]:
    """What an adapted block is given, and what its adapters' hosts and it itself then give."""
    model = refold.attach(build(family, torch.float64), refold.Mona(hidden=3))
    perturb({n: p for n, p in refold.trainable_parameters(model).items() if "head" not in n}, 0.2)
    seen: list[Tensor] = []
    module = model.get_submodule(block)
    module.register_forward_hook(lambda module, args, output: seen.extend((args[0].detach(), output.detach())))
    with torch.no_grad():
        model(images(model))
    return seen[0], seen[1:], {name: model.get_submodule(f"{block}.{name}") for name in branches}


def test_windows_are_no_borders():
    """On Swin the filters see whole maps, (B, H, W, C) behind the attention and tokens behind the MLP."""
    stream, (found,), parts = blocks_of(
        "swin", "layers.1.blocks.1", ("norm1", "norm2", "mlp", "drop_path1", "drop_path2")
    )
    model = build("swin", torch.float64)
    block, (height, width) = model.layers[1].blocks[1], stream.shape[1:3]
    with torch.no_grad():
        x = stream + block._attn(block.norm1(stream))
        x = x.reshape(len(x), height * width, -1)
        x = x + added(parts["drop_path1"], x, (height, width))
        x = x + block.mlp(block.norm2(x))
        x = x + added(parts["drop_path2"], x, (height, width))
    np.testing.assert_allclose(found.reshape(x.shape).numpy(), x.numpy(), rtol=1e-11, atol=1e-12)


def test_maps_of_a_convolutional_backbone():
    stream, (found,), parts = blocks_of("convnext", "stages.1.blocks.0", ("drop_path",))
    block = build("convnext", torch.float64).stages[1].blocks[0]
    with torch.no_grad():
        x = block(stream)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + added(parts["drop_path"], tokens, (x.shape[2], x.shape[3]))
    np.testing.assert_allclose(found.flatten(2).transpose(1, 2).numpy(), tokens.numpy(), rtol=1e-11, atol=1e-12)


def added(host: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return torch.from_numpy(side.mona(tokens.numpy(), numbers(host.get_submodule("refold.default")), grid, prefix=0))


@pytest.mark.parametrize(
    ("name", "widths", "expected"),
    [("swin_base_patch4_window7_224", 128, 3_667_456), ("swin_large_patch4_window7_224", 192, 5_267_712)],
)
def test_parameters_on_swin(name, widths, expected):
    """Swin-L's is the count in the released training log."""
    blocks = {widths: 2, 2 * widths: 2, 4 * widths: 18, 8 * widths: 2}
    inner = 64 * (9 + 25 + 49) + 3 * 64 + 64 * 64 + 64
    formula = sum(2 * count * (2 * d + 2 * d + (64 * d + 64) + inner + (64 * d + d)) for d, count in blocks.items())
    assert formula == expected
    depths = {"depths": (1, 1, 1, 1)} if widths == 192 else {}  # each block of a stage has the same
    model = large(name, img_size=64, window_size=2, **depths)
    if depths:
        expected = sum(2 * (133 * d + 9_728) for d in blocks)
    assert counted(model, refold.Mona()) == expected


def test_the_start_is_the_published_one_and_every_tensor_has_a_gradient():
    adapter = MultiScaleBottleneck(768, 64, 0.1)
    assert torch.equal(adapter.norm_scale, torch.full((768,), 1e-6))
    assert torch.equal(adapter.stream_scale, torch.ones(768))
    for layer in (adapter.down, adapter.up):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
        assert not bool(layer.bias.any())
    for kernel, layer in zip((3, 5, 7), adapter.filters, strict=True):
        assert layer.weight.shape == (64, 1, kernel, kernel)
        assert float(layer.weight.detach().std()) == pytest.approx(1 / kernel / math.sqrt(3), rel=0.1)
    model, x, *_ = adapted(refold.Mona(hidden=3), layer_scale=True, size=0.0)
    model(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in refold.trainable_parameters(model).values())


def test_dropout_is_off_in_evaluation():
    model, x, *_ = adapted(refold.Mona(hidden=5, dropout=0.5), layer_scale=False)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_what_has_no_grid_is_left_out():
    """The pooling of test_vit3 attends from one token."""
    model = refold.attach(build("timm_test_vit3"), refold.Mona(hidden=3))
    assert not any(path.startswith("attn_pool") for path in hosted(model))
    left_out = [row.path for row in refold.explain(model).rows if row.slot == "-"]
    assert any(path.startswith("attn_pool") for path in left_out)


def test_a_file_carries_it_bit_for_bit_and_it_does_not_merge(tmp_path):
    model = refold.attach(build("swin"), refold.Mona(hidden=3))
    perturb(refold.trainable_parameters(model), 0.3)
    x = images(model)
    other = refold.load(build("swin"), refold.save(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(other(x), model(x))
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"dropout": 1.0}, {"sites": ()}])
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(refold.SiteError, match=f"Mona: {next(iter(wrong))}="):
        refold.Mona(**wrong)
