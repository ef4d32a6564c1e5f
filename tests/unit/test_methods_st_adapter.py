"""ST-Adapter against its formula: frames of a clip mix, clips and class tokens do not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import refold
from reference import conv_side
from refold.adapters.side import Layout
from refold.adapters.temporal import TemporalBottleneck
from refold.hosting import hosted
from zoo import build, perturb, relative

METHOD = refold.STAdapter(hidden=6, frames=3)
vit = partial(
    VisionTransformer,
    img_size=32,
    patch_size=16,
    embed_dim=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    reg_tokens=1,
    dynamic_img_size=True,
)


def numbers(model: nn.Module) -> dict[str, dict]:
    slots = {path: slot["default"] for path, slot in hosted(model).items()}
    return {p: {n: v.detach().double().numpy().copy() for n, v in a.state_dict().items()} for p, a in slots.items()}


def attached(method: refold.Method = METHOD) -> nn.Module:
    model = refold.attach(vit().double().eval(), method)
    perturb(refold.trainable_parameters(model), 0.2)
    return model


@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_a_block_is_the_formula(activation):
    """Before the attention and before the MLP, on the stream that also goes past them."""
    model = attached(refold.STAdapter(hidden=6, frames=3, activation=activation))
    found = numbers(model)
    assert list(found) == [f"blocks.{i}.drop_path{j}" for i in (0, 1) for j in (1, 2)]
    seen: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(torch.randn(6, 3, 32, 48, dtype=torch.float64))  # another size than at attach
    stream, adapted = (t.detach() for t in seen)
    refold.detach(model)
    block, act = model.blocks[1], conv_side.gelu if activation == "gelu" else lambda x: x
    with torch.no_grad():
        for norm, branch, path in ((block.norm1, block.attn, "drop_path1"), (block.norm2, block.mlp, "drop_path2")):
            added = conv_side.st_adapter(stream.numpy(), found[f"blocks.1.{path}"], 3, prefix=2, act=act)
            stream = stream + torch.from_numpy(added)
            stream = stream + branch(norm(stream))
    assert relative(adapted, stream) < 1e-12


def test_clips_do_not_see_each_other_and_frames_do():
    model = attached()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    before = model(x).detach()
    other = x.clone()
    other[5] = 0
    moved = (model(other).detach() - before).abs().amax(dim=1) > 1e-9
    assert moved.tolist() == [False, False, False, True, True, True]


def test_maps_are_mixed_like_tokens():
    torch.manual_seed(0)
    adapter = TemporalBottleneck(4, 3, 2, dtype=torch.float64)
    perturb(dict(adapter.named_parameters()), 0.3)
    maps = torch.randn(4, 4, 5, 3, dtype=torch.float64)
    tokens = maps.flatten(2).transpose(1, 2)
    expected = torch.from_numpy(
        conv_side.st_adapter(tokens.numpy(), {n: v.numpy() for n, v in adapter.state_dict().items()}, 2, 0)
    )
    first, last = adapter(maps, Layout(-3)), adapter(maps.permute(0, 2, 3, 1), Layout(-1))
    assert relative(first.flatten(2).transpose(1, 2), expected) < 1e-12
    assert relative(last.flatten(1, 2), expected) < 1e-12
    assert relative(adapter(tokens, Layout(-1, 0, (5, 3))), expected) < 1e-12


@pytest.mark.parametrize(("pool", "late"), [("token", "blocks.1.drop_path2."), ("avg", "nothing")])
def test_the_start_is_the_backbone_and_every_part_trains(pool, late):
    """But the last before an MLP, where the head reads a class token that patches no longer reach."""
    model = vit(global_pool=pool).eval()
    x = torch.randn(6, 3, 32, 32)
    before = model(x)
    refold.attach(model, METHOD)
    assert torch.equal(model(x), before)
    model.train()
    trainable = refold.trainable_parameters(model)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        reached |= {n for n, p in trainable.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == {name for name in trainable if not name.startswith(late)}


def test_a_batch_without_whole_clips_is_refused():
    model = attached()
    with pytest.raises(refold.SiteError, match="a batch of 4 images is no whole number of clips of 3 frames"):
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    with refold.disabled(model):
        model(torch.randn(4, 3, 32, 32, dtype=torch.float64))


def test_attach_needs_no_clip_as_its_example():
    single = refold.attach(vit(), METHOD, example=torch.randn(1, 3, 32, 32))
    whole = refold.attach(vit(), METHOD, example={"x": torch.randn(6, 3, 32, 32)})
    assert [r.path for r in refold.explain(single).rows] == [r.path for r in refold.explain(whole).rows]


def test_stochastic_depth_drops_the_branch_and_not_what_is_added():
    """In training, too, the sum reaches the stream whole: a block all of whose branches are dropped adds it alone."""
    model = attached()
    block, found = model.blocks[0], numbers(model)
    for drop in (block.attn.proj_drop, block.mlp.drop2):
        drop.train().p = 1.0
    stream = torch.randn(3, 6, 16, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    block.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(torch.randn(3, 3, 32, 32, dtype=torch.float64))
    stream, adapted = (t.detach() for t in seen)
    for path in ("drop_path1", "drop_path2"):
        added = conv_side.st_adapter(stream.numpy(), found[f"blocks.0.{path}"], 3, prefix=2)
        stream = stream + torch.from_numpy(added)
    assert relative(adapted, stream) < 1e-12


def test_checkpointing_low_precision_export_and_files(tmp_path):
    model = vit().eval()
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    refold.attach(model, METHOD)
    perturb(refold.trainable_parameters(model))
    x, found = torch.randn(6, 3, 32, 32), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()(x).square().sum().backward()
        found.append([p.grad.clone() for p in refold.trainable_parameters(model).values() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found, strict=True))
    model.eval().set_grad_checkpointing(False)
    exact = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x), exact) < 2e-2
    assert torch.equal(torch.export.export(model, (x,)).module()(x), exact)
    path = refold.save(model, tmp_path / "a.safetensors")
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)
    refold.detach(model)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(model.state_dict()[n], v) for n, v in plain.items())
    assert torch.equal(refold.load(model, path)(x), exact)
    low = refold.attach(vit().eval().bfloat16(), METHOD)
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_a_backbone_without_branches_is_refused():
    with pytest.raises(refold.SiteError, match="the forward has no residual branches"):
        refold.attach(build("efficientnet"), METHOD)


@pytest.mark.parametrize("options", [{"hidden": 0}, {"frames": 0}, {"frames": 2.0}, {"activation": "x"}, {"sites": ()}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=f"{next(iter(options))}="):
        refold.STAdapter(**options)
