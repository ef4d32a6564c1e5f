"""Convpass against its formula, on every layout; its start, counts, and what surrounds it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import refold
from reference import conv_side
from refold.adapters.convbottleneck import ConvBottleneck
from refold.adapters.side import Layout
from refold.hosting import hosted
from zoo import build, images, perturb, relative

METHOD = refold.Convpass(hidden=4, scale=0.7)
#: A grid of 3 x 2, a class token and two registers.
oblong = partial(
    VisionTransformer,
    img_size=(48, 32),
    patch_size=16,
    embed_dim=16,
    depth=1,
    num_heads=2,
    num_classes=3,
    reg_tokens=2,
    dynamic_img_size=True,
    drop_path_rate=0.0,
)


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy().copy() for name, value in module.state_dict().items()}


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    return {path: slot["default"] for path, slot in hosted(model).items()}


def attached(model: nn.Module, method: refold.Method = METHOD) -> nn.Module:
    refold.attach(model.double().eval(), method)
    perturb(refold.trainable_parameters(model), 0.2)
    return model


@pytest.mark.parametrize("size", [(48, 32), (32, 80)])
def test_a_block_is_the_formula_for_any_grid_and_any_prefix_tokens(size):
    """Also in another image size than the one at attach."""
    model = attached(oblong())
    found = {path: numbers(adapter) for path, adapter in adapters(model).items()}
    assert list(found) == ["blocks.0.drop_path1", "blocks.0.drop_path2"]
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(torch.randn(2, 3, *size, dtype=torch.float64))
    stream, adapted = (t.detach() for t in seen)
    grid = (size[0] // 16, size[1] // 16)
    refold.detach(model)
    block = model.blocks[0]
    with torch.no_grad():
        for norm, branch, path in ((block.norm1, block.attn, "drop_path1"), (block.norm2, block.mlp, "drop_path2")):
            normed = norm(stream)
            added = conv_side.convpass(normed.numpy(), found[f"blocks.0.{path}"], grid, prefix=3)
            stream = stream + branch(normed) + 0.7 * torch.from_numpy(added)
    assert relative(adapted, stream) < 1e-12


def test_windows_are_no_borders():
    """On Swin the bypass reads whole maps, (B, H, W, C) beside the attention and tokens beside the MLP."""
    model = attached(build("swin"))
    found = {path: numbers(adapter) for path, adapter in adapters(model).items()}
    block, seen = model.layers[1].blocks[1], []
    block.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(images(model))
    stream, adapted = (t.detach() for t in seen)
    refold.detach(model)
    prefix = "layers.1.blocks.1"
    with torch.no_grad():
        normed = block.norm1(stream)
        added = conv_side.convpass(normed.flatten(1, 2).numpy(), found[f"{prefix}.drop_path1"], (4, 4), 0)
        stream = stream + block._attn(normed) + 0.7 * torch.from_numpy(added).view(stream.shape)
        normed = block.norm2(stream)
        added = conv_side.convpass(normed.flatten(1, 2).numpy(), found[f"{prefix}.drop_path2"], (4, 4), 0)
        stream = stream + block.mlp(normed) + 0.7 * torch.from_numpy(added).view(stream.shape)
    assert relative(adapted, stream) < 1e-12


def test_channels_first_and_last_are_one_map():
    torch.manual_seed(0)
    adapter = ConvBottleneck(6, 4, identity=False, dtype=torch.float64)
    perturb(dict(adapter.named_parameters()), 0.2)
    maps = torch.randn(2, 6, 5, 3, dtype=torch.float64)
    tokens = maps.flatten(2).transpose(1, 2)
    expected = torch.from_numpy(conv_side.convpass(tokens.numpy(), numbers(adapter), (5, 3), 0))
    first = adapter(maps, Layout(-3))
    last = adapter(maps.permute(0, 2, 3, 1), Layout(-1))
    assert relative(adapter(tokens, Layout(-1, 0, (5, 3))), expected) < 1e-12
    assert relative(first.flatten(2).transpose(1, 2), expected) < 1e-12
    assert relative(last.flatten(1, 2), expected) < 1e-12


def test_convnext_has_one_bypass_a_block_around_the_whole_of_it():
    model = attached(build("convnext"))
    found = {path: numbers(adapter) for path, adapter in adapters(model).items()}
    assert list(found) == [f"stages.{i}.blocks.0.drop_path" for i in range(4)]
    block, seen = model.stages[2].blocks[0], []
    block.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(images(model))
    stream, adapted = (t.detach() for t in seen)
    refold.detach(model)
    tokens = stream.flatten(2).transpose(1, 2).numpy()
    added = conv_side.convpass(tokens, found["stages.2.blocks.0.drop_path"], tuple(stream.shape[2:]), 0)
    added = torch.from_numpy(added).transpose(1, 2).reshape(stream.shape)
    assert relative(adapted, block(stream) + 0.7 * added) < 1e-12


@pytest.mark.parametrize("start", ["identity", "xavier"])
def test_the_start_is_the_published_one(start):
    torch.manual_seed(0)
    model = oblong().eval()
    x = torch.randn(2, 3, 48, 32)
    before = model(x)
    refold.attach(model, refold.Convpass(hidden=4, start=start))
    assert torch.equal(model(x), before)
    adapter = adapters(model)["blocks.0.drop_path1"]
    assert float(adapter.down.weight.detach().abs().max()) <= (6 / (16 + 4)) ** 0.5
    assert float(adapter.down.weight.detach().std()) > 0.2
    zero = (adapter.up.weight, adapter.up.bias, adapter.down.bias, adapter.conv.bias)
    assert not any(bool(value.any()) for value in zero)
    kernel = adapter.conv.weight.detach()
    if start == "identity":
        assert torch.equal(kernel[:, :, 1, 1], torch.eye(4))
        assert int(kernel.count_nonzero()) == 4
    else:
        assert float(kernel.abs().max()) <= (6 / (4 * 9 + 4 * 9)) ** 0.5
        assert int(kernel.count_nonzero()) == kernel.numel()


def test_dropout_and_gradients():
    model = refold.attach(oblong(num_classes=0), refold.Convpass(hidden=4, dropout=0.5)).train()
    x = torch.randn(4, 3, 48, 32)
    optimizer = torch.optim.SGD(refold.trainable_parameters(model).values(), lr=0.1)
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        reached |= {n for n, p in refold.trainable_parameters(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == set(refold.trainable_parameters(model))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_checkpointing_gives_the_same_gradients():
    model = refold.attach(oblong(depth=3), refold.Convpass(hidden=4, dropout=0.0)).train()
    perturb(refold.trainable_parameters(model))
    x, found = torch.randn(2, 3, 48, 32), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(x).square().sum().backward()
        found.append([p.grad.clone() for p in refold.trainable_parameters(model).values()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found, strict=True))


def test_low_precision_export_and_files(tmp_path):
    plain = oblong().eval()
    kept = {n: v.clone() for n, v in plain.state_dict().items()}
    model = refold.attach(plain, METHOD)
    perturb(refold.trainable_parameters(model))
    x = torch.randn(2, 3, 48, 32)
    exact = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x), exact) < 2e-2
    assert torch.equal(torch.export.export(model, (x,)).module()(x), exact)
    path = refold.save(model, tmp_path / "a.safetensors")
    refold.detach(model)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in kept.items())
    assert model.state_dict().keys() == kept.keys()
    assert torch.equal(refold.load(model, path)(x), exact)
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)
    low = refold.attach(oblong().eval().bfloat16(), METHOD)
    assert {p.dtype for n, p in low.named_parameters() if "refold" in n} == {torch.float32}
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_weights_that_another_module_reads_do_not_hide_the_width():
    """BEiT's attention multiplies by the weight of its qkv itself, which three widths leave."""
    model = Beit(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    told = refold.explain(refold.attach(model.eval(), METHOD)).rows
    assert [row.width for row in told if row.slot != "head"] == [16, 16]


def test_the_grid_is_seen_before_the_branch_runs():
    """A stage of PVT returns its maps behind the blocks that would need to know their size."""
    model = timm.create_model("pvt_v2_b0", num_classes=3, depths=(1, 1, 1, 1), drop_path_rate=0.0).eval()
    refold.attach(model, METHOD, example=torch.randn(1, 3, 64, 64))
    assert len(adapters(model)) == 8
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 3)


def test_branches_without_a_grid_are_left_out():
    """The pooling in front of test_vit3's head is a residual MLP on one token."""
    left = [row for row in refold.explain(refold.attach(build("timm_test_vit3"), METHOD)).rows if row.slot == "-"]
    assert [row.path.startswith("attn_pool.mlp.") for row in left] == [True]
    assert left[0].reason == "left out: nothing shows how its tokens lie on a grid"
    with pytest.raises(refold.SiteError, match="nothing shows how its tokens lie on a grid"):
        refold.attach(build("timm_test_vit3"), refold.Convpass(sites="attn_pool"))


@pytest.mark.parametrize(
    "options", [{"hidden": 0}, {"scale": 0}, {"start": "zero"}, {"activation": "x"}, {"dropout": 1}]
)
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=f"{next(iter(options))}="):
        refold.Convpass(**options)
