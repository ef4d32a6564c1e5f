"""Research backbones from outside, with awkward traits and names of their own: exact, with no code for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from reference import formulas
from refold.hosting import hooks_left, hosted
from research import MODELS
from research.revcol import RevCol
from zoo import perturb, relative

EXACT = 1e-10
METHODS = {
    "RepAdapter": refold.RepAdapter(rank=4, groups=1, scale=0.7),
    "LoRA": refold.LoRA(rank=4, scale=0.5),
    "LoRA on every layer": refold.LoRA(rank=4, scale=0.5, sites="*"),
    "SSF": refold.SSF(),
    "OFT": refold.OFT(block=4),
}
IMAGE = (3, 32, 32)


@torch.no_grad()
def build(name: str) -> nn.Module:
    """In float64, the same at every call, with biases, norms and layer scales that matter."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("strength"):
            value.uniform_(0.2, 0.6)
        elif value.is_floating_point() and (value.dim() <= 1 or not bool(value.any())):
            value.add_(0.2 * torch.randn_like(value))
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return torch.cat([t.flatten() for t in tensors(model(images()))])


def attached(name: str, method: refold.Method) -> nn.Module:
    model = refold.attach(build(name), method, example=images(1), trainable=("scores",))
    perturb(refold.trainable_parameters(model))
    return model


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_merging_is_exact_and_detaching_restores_every_bit(name, method):
    model, plain = build(name), build(name)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    refold.attach(model, method, example=images(1), trainable=("scores",))
    perturb(refold.trainable_parameters(model))
    unmerged = output(model)
    assert relative(unmerged, output(plain)) > 1e-3
    refold.merge(model)
    assert relative(output(model), unmerged) <= EXACT
    assert hooks_left(model) == 0
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in before.items()}
    refold.detach(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_adapter_is_in_the_path(name, method):
    """An adapter that no output depends on would be a silent no-op."""
    model = attached(name, method)
    torch.cat([t.flatten() for t in tensors(model(images()))]).square().sum().backward()
    for path, slot in hosted(model).items():
        assert any(bool(p.grad is not None and p.grad.any()) for p in slot.parameters()), path


def test_lora_puts_the_papers_formula_into_every_layer(name):
    method = METHODS["LoRA on every layer"]
    model = attached(name, method)
    expected = {}
    for path, slot in hosted(model).items():
        adapter, layer = slot["default"], model.get_submodule(path)
        down, up, weight = (p.detach().numpy() for p in (adapter.down, adapter.up, layer.weight))
        if isinstance(layer, nn.ConvTranspose2d):  # its weight is (in, out, *kernel)
            folded = formulas.lora(weight.swapaxes(0, 1), down, up, method.scale).swapaxes(0, 1)
        else:
            folded = formulas.lora(weight, down, up, method.scale)
        expected[f"{path}.weight"] = folded
    assert len(expected) > 5
    refold.merge(model)
    for key, weight in expected.items():
        assert relative(model.state_dict()[key], torch.from_numpy(weight)) <= 1e-14


def test_adapters_learn_through_a_reversible_backward():
    """RevCol's backward runs each column again: adapters take part, with the gradients of a plain run."""
    gradients = []
    for reversible in (True, False):
        model = build("RevCol")
        assert isinstance(model, RevCol)
        model.reversible = reversible
        refold.attach(model, refold.LoRA(rank=4), example=images(1), trainable=("scores",))
        perturb(refold.trainable_parameters(model))
        model.train()
        model(images()).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    reverse, plain = gradients
    assert set(reverse) == set(plain)
    assert len(plain) > 10
    assert all(relative(reverse[key], plain[key]) <= 1e-9 for key in plain)
