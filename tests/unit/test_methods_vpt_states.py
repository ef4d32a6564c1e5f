"""VPT in training, in other precisions, in files and copies, and when a forward breaks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import refold
from prompted import KINDS, attached, made
from refold.hosting import hooks_left, hosted
from refold.state import state_of
from zoo import images, perturb, relative


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("deep", [True, False])
def test_every_token_learns_from_the_first_step(name, deep):
    model = refold.attach(made(name, torch.float32), refold.VPT(tokens=3, deep=deep)).train()
    model(images(model)).pow(2).sum().backward()
    found = {n: p.grad for n, p in refold.trainable_parameters(model).items()}
    assert sum("prompts" in n for n in found) == (len(hosted(model)) if deep else 1)
    assert all(bool(g.abs().amax(-1).gt(0).all()) for n, g in found.items() if "prompts" in n)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_dropout_takes_numbers_from_each_image_and_only_in_training():
    method = refold.VPT(tokens=4, dropout=0.5)
    adapter = method.build(state_of(attached("class_token", method)).record().sites[0], None, None)
    kept = adapter.tokens(64)
    assert set(kept.detach().ne(0).float().mean(0).flatten().gt(0.2).tolist()) == {True}
    assert torch.equal(kept[kept != 0], (2 * adapter.prompts.expand(64, -1, -1))[kept != 0])
    assert 0.45 < float(kept.ne(0).float().mean()) < 0.55
    model = attached("class_token", method)
    x = images(model)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize("name", ["class_token", "rotation", "bias_by_relative_position", "windows"])
@pytest.mark.parametrize("deep", [True, False])
def test_checkpoints_give_the_same_gradient(name, deep):
    model = attached(name, refold.VPT(tokens=3, deep=deep)).train()
    x, grads = images(model), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        if name == "windows" and not deep and checkpointing:
            # A block alone, run again behind the forward, does not see what the block before made of its prompts.
            with pytest.raises(refold.SiteError, match="were not seen in this call"):
                model(x).pow(2).sum().backward()
            return
        model(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in refold.trainable_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_prompts_of_an_earlier_forward_are_never_used_again():
    """Also where a part of the model runs alone, whose end nobody tells."""
    model = attached("windows", refold.VPT(tokens=3, deep=False)).train()
    model.set_grad_checkpointing()
    with pytest.raises(refold.SiteError, match="were not seen in this call"):
        model.forward_features(images(model)).pow(2).sum().backward()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("deep", [True, False])
def test_low_precision_stays_near(name, deep):
    model = attached(name, refold.VPT(tokens=3, deep=deep), torch.float32)
    x = images(model)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(x), exact) < 0.05
    assert next(p for n, p in model.named_parameters() if "prompts" in n).dtype == torch.float32
    low = model.bfloat16()
    assert relative(low(x.bfloat16()), exact) < 0.1
    refold.attach(made(name, torch.bfloat16), refold.VPT(tokens=3, deep=deep))


@pytest.mark.parametrize(
    ("name", "deep"),
    [
        ("class_token", True),
        ("rotation", False),
        ("bias_by_relative_position", True),
        ("windows", True),
        ("windows", False),
    ],
)
def test_it_is_traced_whole(name, deep):
    """By torch.export for any number of images, and by torch.compile without a break."""
    model = attached(name, refold.VPT(tokens=3, deep=deep), torch.float32)
    x, other = images(model), images(model, count=5, seed=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)).module()
    assert relative(program(other), model(other)) < 1e-5
    assert relative(program(other)[:2], program(x)) > 1e-3
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative(compiled(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("deep", [True, False])
def test_files_copies_and_the_way_back(name, deep, tmp_path):
    model = attached(name, refold.VPT(tokens=3, deep=deep))
    x = images(model)
    before = model(x)
    path = refold.save(model, tmp_path / "prompts.safetensors")
    for other in (refold.load(made(name), path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), before)
    plain = made(name)
    with refold.disabled(model), torch.no_grad():
        assert torch.equal(model(x), plain(x))
    with pytest.raises(refold.MergeError, match="VPT"):
        refold.merge(model)
    refold.detach(model)
    assert hooks_left(model) == 0
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert all(ours.__dict__[k] == v for k, v in theirs.__dict__.items() if isinstance(v, (int, tuple)))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


class Interrupt(BaseException):
    """As Ctrl-C is one, torch runs no hook behind it."""


@pytest.mark.parametrize("name", ["rotation", "bias_by_relative_position", "bias_from_an_mlp", "windows"])
@pytest.mark.parametrize("kind", [ValueError, Interrupt])
def test_positions_come_back_when_a_forward_breaks(name, kind):
    model = attached(name, refold.VPT(tokens=3))
    x = images(model)
    before, plain = model(x), made(name)

    def broken(*args):
        raise kind

    block = model.layers[0].blocks[1] if name == "windows" else model.blocks[1]
    handle = block.attn.proj.register_forward_hook(broken)
    with pytest.raises(kind):
        model(x)
    if kind is ValueError:
        assert attributes(model) == attributes(plain)
    handle.remove()
    assert torch.equal(model(x), before)
    assert attributes(model) == attributes(plain)
    block.attn.proj.register_forward_hook(broken)
    with pytest.raises(kind):
        model(x)
    refold.detach(model)
    assert attributes(model) == attributes(plain)


def attributes(model: nn.Module) -> list[tuple[object, ...]]:
    names = ("num_prefix_tokens", "prefix_tokens", "window_area", "window_size", "bias_shape")
    tables = ("relative_position_index", "relative_position_bias_table")
    return [
        (*(m.__dict__.get(n) for n in names), *(n in m.__dict__ and m.__dict__[n] is not None for n in tables))
        for p, m in model.named_modules()
        if "refold" not in p
    ]


@pytest.mark.parametrize("name", ["rotation", "windows"])
def test_two_of_them_take_turns(name):
    """The second with other numbers, from block to block."""
    methods = {"first": refold.VPT(tokens=3), "second": refold.VPT(tokens=5, deep=False)}
    model, alone = made(name), {}
    x = images(model)
    for key, method in methods.items():
        refold.attach(model, method, name=key)
        perturb(refold.trainable_parameters(model), 0.5)
        alone[key] = model(x)
    for key, expected in alone.items():
        refold.activate(model, key)
        assert torch.equal(model(x), expected)
    assert relative(*alone.values()) > 1e-3
    refold.detach(model)
    with torch.no_grad():
        assert torch.equal(model(x), made(name)(x))


@pytest.mark.parametrize("name", ["rotation", "windows"])
@pytest.mark.parametrize("deep", [True, False])
def test_others_in_the_same_blocks_see_prompts_as_tokens(name, deep):
    """Composed with SSF, which changes the norm that prompts of Swin pass, it is VPT on a backbone with SSF folded."""
    method = refold.VPT(tokens=3, deep=deep)
    both = refold.attach(made(name), refold.Compose([method, refold.SSF()]), trainable=())
    perturb(refold.trainable_parameters(both), 0.2)
    values = {key: value for key, value in both.state_dict().items() if "refold" in key}
    merged = refold.attach(made(name), refold.SSF(), trainable=())
    names = {key: key.replace("refold.default.", "refold.default@1.") for key in merged.state_dict() if "refold" in key}
    merged.load_state_dict(merged.state_dict() | {key: values[other] for key, other in names.items()})
    refold.merge(merged)
    folded = made(name)
    folded.load_state_dict(merged.state_dict())
    model = refold.attach(folded, method, trainable=())
    ours = {key: values[key] for key in model.state_dict() if "refold" in key}
    model.load_state_dict(model.state_dict() | ours)
    x = images(model)
    assert relative(both(x), model(x)) < 1e-10
    assert relative(both(x), made(name)(x)) > 1e-3


def test_an_adapter_on_the_grid_does_not_take_prompts_for_it():
    with pytest.raises(refold.SiteError, match="no grid"):
        refold.attach(made("class_token"), refold.Compose([refold.VPT(tokens=9), refold.Convpass()]))


@pytest.mark.parametrize("inside", [True, False])
def test_attach_in_inference_mode(inside):
    with torch.inference_mode(inside):
        model = made("bias_by_relative_position")
    with torch.inference_mode():
        refold.attach(model, refold.VPT(tokens=3))
        assert model(images(model)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokens": 0}, "tokens=0"),
        ({"tokens": 1025}, "up to 1024"),
        ({"overrides": (("blocks.0", 1025),)}, "up to 1024"),
        ({"deep": 1}, "deep=1"),
        ({"dropout": 1.0}, "dropout"),
        ({"overrides": (("blocks.0", 0),)}, "overrides"),
        ({"deep": False, "overrides": (("blocks.0", 2),)}, "shallow prompts are one set"),
        ({"overrides": (("block.0", 2),)}, "none of the adapted layers matches"),
        ({"sites": "layers.0"}, "no block has this path"),
        ({"sites": "patch_embed"}, "no block has this path"),
    ],
)
def test_what_it_is_told_must_make_sense(options, reason):
    with pytest.raises(refold.SiteError, match=reason):
        refold.attach(made("class_token"), refold.VPT(**options))
