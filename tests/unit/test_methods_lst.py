"""LST against its formula, on every layout; what it stores, and its counts."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from carriers import attached, numbers, watch
from reference import ladders
from refold.bench.measure import stored_bytes
from refold.hosting import hosted
from zoo import build, images, relative


def steps(model: nn.Module) -> dict[str, dict[str, np.ndarray]]:
    """Path, and the step behind an @ where there are several on one host -> its tensors."""
    found = {}
    for path, slot in hosted(model).items():
        found |= {f"{path}{name.removeprefix('default')}": numbers(adapter) for name, adapter in slot.items()}
    return found


def vit(**options: object) -> nn.Module:
    """Three blocks of 64 channels, a class token and two registers."""
    return timm.create_model("test_vit", img_size=48, num_classes=3, reg_tokens=2, depth=3, **options)


@pytest.mark.parametrize(("reduction", "side"), [(4, 16), (8, 8), (64, 8)])
def test_a_vit_is_the_formula(reduction, side):
    model = attached(vit(), refold.LST(reduction=reduction))
    found = steps(model)
    assert list(found) == ["blocks.0@entry", "blocks.0", "blocks.1", "blocks.2", "blocks.2@exit"]
    assert found["blocks.1"]["down.weight"].shape == (side, 64)
    assert [row.role for row in refold.explain(model).rows[:5]] == ["entry", "rung", "rung", "rung", "exit"]
    stream, adapted = watch(model, "blocks.0", "blocks.2", torch.randn(2, 3, 48, 48, dtype=torch.float64))
    refold.detach(model).requires_grad_(False)
    state = ladders.lst_entry(stream.numpy(), found["blocks.0@entry"])
    for index, block in enumerate(model.blocks):
        stream = block(stream)
        state = ladders.lst_rung(state, stream.numpy(), found[f"blocks.{index}"])
    stream = stream + torch.from_numpy(ladders.lst_exit(state, found["blocks.2@exit"]))
    assert relative(adapted, stream) < 1e-12


def tokens(maps: Tensor, channels_last: bool) -> np.ndarray:
    return (maps if channels_last else maps.permute(0, 2, 3, 1)).flatten(1, 2).numpy()


@pytest.mark.parametrize(
    ("family", "stages", "channels_last"),
    [("swin", ["layers.0", "layers.1"], True), ("convnext", [f"stages.{i}" for i in range(4)], False)],
)
def test_each_stage_has_a_state_that_begins_with_the_one_before(family, stages, channels_last):
    model = attached(build(family), refold.LST(reduction=2))
    found = steps(model)
    last = max(path for path in found if "@" not in path)
    stream, adapted = watch(model, f"{stages[0]}.blocks.0", last, images(model))
    refold.detach(model).requires_grad_(False)
    state, grid = np.zeros(0), (0, 0)
    for path in stages:
        stage = model.get_submodule(path)
        stream = stream if path == stages[0] else stage.downsample(stream)
        here = tuple(stream.shape[1:3] if channels_last else stream.shape[2:])
        entry = found[f"{path}.blocks.0@entry"]
        begun = ladders.lst_entry(tokens(stream, channels_last), entry)
        if path != stages[0]:
            begun = begun + ladders.lst_handed(state, entry["carry.weight"], grid, grid[0] // here[0])
        state, grid = begun, here
        for number, block in enumerate(stage.blocks):
            stream = block(stream)
            state = ladders.lst_rung(state, tokens(stream, channels_last), found[f"{path}.blocks.{number}"])
    added = torch.from_numpy(ladders.lst_exit(state, found[f"{last}@exit"]))
    shaped = added.view(stream.shape) if channels_last else added.transpose(1, 2).reshape(stream.shape)
    assert relative(adapted, stream + shaped) < 1e-12


def test_a_stage_whose_first_block_changes_the_shape_begins_behind_it():
    model = attached(build("resnet"), refold.LST(reduction=4))
    found = steps(model)
    paths = ["layer1.0", "layer2.0", "layer4.0"]
    assert [path.partition("@")[0] for path in found] == ["layer1.0"] * 2 + ["layer2.0"] * 2 + ["layer4.0"] * 3
    seen: dict[str, Tensor] = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.update({path: output.detach()})
        )
    _, adapted = watch(model, "layer1.0", "layer4.0", images(model))
    refold.detach(model)
    model(images(model))  # the backbone's own features: only the last are touched
    entering, _ = watch(model, "layer1.0", "layer1.0", images(model))
    state = ladders.lst_entry(tokens(entering, False), found["layer1.0@entry"])
    for before, path in zip(["", *paths], paths, strict=False):
        if before:
            entry, grid = found[f"{path}@entry"], tuple(seen[before].shape[2:])
            factor = grid[0] // seen[path].shape[2]
            handed = ladders.lst_handed(state, entry["carry.weight"], grid, factor)
            state = ladders.lst_entry(tokens(seen[path], False), entry) + handed
        state = ladders.lst_rung(state, tokens(seen[path], False), found[path])
    added = torch.from_numpy(ladders.lst_exit(state, found["layer4.0@exit"])).transpose(1, 2)
    assert relative(adapted, seen["layer4.0"] + added.reshape(adapted.shape)) < 1e-12


def test_the_start_is_the_backbone_and_everything_learns():
    model, x = vit().train(), torch.randn(4, 3, 48, 48)
    before = model(x).detach()
    refold.attach(model, refold.LST())
    assert torch.equal(model(x), before)
    optimizer, reached = torch.optim.SGD(refold.trainable_parameters(model).values(), lr=0.1), set()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        reached |= {n for n, p in refold.trainable_parameters(model).items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == set(refold.trainable_parameters(model))


def test_the_backbone_records_no_graph_and_little_is_stored():
    model, x = vit(), torch.randn(8, 3, 48, 48)
    frozen = refold.attach(vit(), refold.LoRA())
    lora = stored_bytes(lambda: frozen(x), frozen).activations
    refold.attach(model, refold.LST())
    inside, leaving = [], []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, args, output: inside.append(output.requires_grad))
        block.register_forward_hook(lambda module, args, output: leaving.append(output.requires_grad))
    model(x)
    assert inside == [False, False, False]
    assert leaving == [False, False, True]
    assert stored_bytes(lambda: model(x), model).activations < 0.5 * lora


def test_what_has_no_place_is_refused():
    with pytest.raises(refold.SiteError, match="the forward has no residual blocks"):
        refold.attach(build("byobnet"), refold.LST())
    with pytest.raises(refold.SiteError, match="reduction=0 is not valid"):
        refold.LST(reduction=0)


def test_fewer_blocks_are_the_papers_dropped_layers():
    model = attached(vit(), refold.LST(sites=("blocks.0", "blocks.2")))
    found = steps(model)
    assert list(found) == ["blocks.0@entry", "blocks.0", "blocks.2", "blocks.2@exit"]
    stream, adapted = watch(model, "blocks.0", "blocks.2", torch.randn(2, 3, 48, 48, dtype=torch.float64))
    refold.detach(model).requires_grad_(False)
    state = ladders.lst_entry(stream.numpy(), found["blocks.0@entry"])
    for index, block in enumerate(model.blocks):
        stream = block(stream)
        if index != 1:
            state = ladders.lst_rung(state, stream.numpy(), found[f"blocks.{index}"])
    assert relative(adapted, stream + torch.from_numpy(ladders.lst_exit(state, found["blocks.2@exit"]))) < 1e-12


def test_stages_without_a_grid_are_refused_and_one_of_them_is_not():
    """CaiT's last blocks see the class token alone."""
    model = timm.create_model("cait_xxs24_224", img_size=32, num_classes=3, depth=2)
    before = model.state_dict()
    with pytest.raises(refold.SiteError, match=r"blocks_token_only\.0: nothing shows how its .* Name blocks of one"):
        refold.attach(model, refold.LST())
    assert list(model.state_dict()) == list(before)
    refold.attach(model, refold.LST(sites="blocks"))
    assert refold.explain(model).rows[0].role == "entry"
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_an_attention_pool_has_no_rung():
    """Its features are no tokens any more."""
    model = refold.attach(build("timm_test_vit3"), refold.LST())
    left = {row.path: row.reason for row in refold.explain(model).rows if row.slot == "-"}
    assert left == {"attn_pool": "left out: features of shape (1, 96) have no known channels"}
    assert "blocks.1@exit" in steps(model)


@pytest.mark.parametrize(("reduction", "expected"), [(8, 2_376_492), (4, 7_406_412)])
def test_the_counts_are_the_closed_formula(reduction, expected):
    """The comparisons print 2.38M on ViT-B/16, which is the reduction of 8."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0)
    model = refold.attach(model.to_empty(device="cpu").eval(), refold.LST(reduction=reduction))
    d, w, blocks = 768, 768 // reduction, 12
    assert blocks * (d * w + 12 * w * w + 14 * w + 1) + 2 * d * w + d + 3 * w == expected
    assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == expected
