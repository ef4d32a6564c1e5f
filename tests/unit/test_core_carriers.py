"""What adapters in a row hand on within one forward: exact in every surrounding, or refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import refold
from carriers import attached, checkpointed_gradients, gradients, same_gradients
from refold.adapters.ladder import Carrier
from zoo import build, images, perturb, relative

METHODS = {
    "DTL": refold.DTL(beta=20.0, start=2),
    "DTL+": refold.DTL(beta=20.0, start=1, plus=True),
    "LST": refold.LST(reduction=2),
}
FAMILIES = ["timm_test_vit4", "swin", "convnext"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return METHODS[request.param]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def carriers(model: nn.Module) -> list[Carrier]:
    return [module for module in model.modules() if isinstance(module, Carrier)]


def kept(model: nn.Module) -> int:
    """How much of a forward is still there."""
    found = carriers(model)
    assert len(found) > 1
    return sum((a._state is not None) + (a._received is not None) + len(a._taken or ()) for a in found)


def test_checkpoints_around_blocks_are_exact(family, method):
    """Two forwards, then one backward, which runs every block of both again."""
    expected, found = checkpointed_gradients(attached(build(family), method))
    same_gradients(found, expected)
    assert len(expected) > 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model_is_exact(family, method, reentrant):
    model = attached(build(family), method)
    x, other = images(model).requires_grad_(), images(model, seed=1).requires_grad_()
    expected = gradients(model, model(x), model(other))
    found = gradients(model, *(checkpoint(model, i, use_reentrant=reentrant) for i in (x, other)))
    same_gradients(found, expected)


def test_a_checkpoint_around_several_blocks_is_refused(method):
    model = attached(build("timm_test_vit4"), method)
    blocks = model.blocks
    x, first = images(model), model.blocks[0]
    pair = nn.Sequential(*blocks[:2])
    with torch.no_grad():
        expected = model(x)

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(pair, x, use_reentrant=False)

    forward = model.forward
    model.blocks = nn.Sequential(Pair())
    output = forward(x)
    assert first is pair[0]
    torch.testing.assert_close(output, expected)
    with pytest.raises(refold.SiteError, match=r"was not seen in this call.*gradient checkpoints around single blocks"):
        output.sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_around_blocks_is_refused(method, monkeypatch):
    """Its forward runs without gradients: what the blocks hand on would have none, in silence."""
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    model = attached(build("timm_test_vit4"), method)
    model.set_grad_checkpointing(True)
    with pytest.raises(refold.SiteError, match=r"runs without gradients within .* use_reentrant=False"):
        model(images(model))
    with torch.no_grad():
        assert model(images(model)).isfinite().all()


def test_a_block_alone_is_refused_and_the_rows_first_parts_are_not(method):
    model = attached(build("timm_test_vit4"), method)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected)
        tokens = torch.randn(2, 5, 96, dtype=torch.float64)
        with pytest.raises(refold.SiteError, match=r"blocks\.1: what the adapter before it hands on was not seen"):
            model.blocks[1](tokens)
        assert torch.equal(model(x), expected)


def test_nothing_is_left_of_a_forward(method):
    model = attached(build("timm_test_vit4"), method)
    x = images(model)
    output = model(x)
    assert sum(a._state is not None for a in carriers(model)) == 0
    output.sum().backward()
    del output
    gc.collect()
    assert kept(model) == 0

    def fail(*args: Any) -> None:
        raise KeyError("within the forward")

    handle = model.blocks[1].attn.register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(x)
    handle.remove()
    gc.collect()
    assert kept(model) == 0
    assert model(x).requires_grad
    refold.detach(model)
    model(x)
    assert not carriers(model)


def test_gradients_do_not_leak_memory(method):
    """No entry outlives its graph, also without the cycle collector."""
    model = attached(build("timm_test_vit4"), method)
    gc.disable()
    try:
        for seed in range(3):
            gradients(model, model(images(model, seed=seed)))
            assert kept(model) == 0
    finally:
        gc.enable()


def test_copies_and_pickles_within_a_graphs_life(method):
    model = attached(build("swin"), method)
    x = images(model)
    output = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    expected = gradients(model, output)
    for other in copies:
        perturbed = copy.deepcopy(other)
        perturb(refold.trainable_parameters(perturbed))  # a copy's row is its own
        assert relative(perturbed(x), output) > 1e-3
        same_gradients(gradients(other, other(x)), expected)
    torch.testing.assert_close(model(x), output)


def test_low_precision_follows_float32(family, method):
    model = attached(build(family), method).float()
    x = images(model)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x), expected) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    low = copy.deepcopy(model).bfloat16()
    assert relative(low(x.bfloat16()), expected) < 0.1


def test_two_rows_on_one_model(method):
    """The adapter in use alone runs, and takes from its own row."""
    model = attached(build("timm_test_vit4"), method)
    x = images(model)
    expected = model(x).detach()
    refold.attach(model, METHODS["DTL"], name="other")
    assert relative(model(x), expected) > 1e-6
    refold.activate(model, "default")
    assert torch.equal(model(x), expected)
    refold.detach(model)
    assert torch.equal(model(x), build("timm_test_vit4", torch.float64)(x))


def test_merging_is_refused(method):
    with pytest.raises(refold.MergeError):
        refold.merge(refold.attach(build("vit"), method))
