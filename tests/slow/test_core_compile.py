"""Compiled and exported models: no compiled code ever runs without the adapters it should have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import refold
from zoo import build, images, perturb

pytestmark = pytest.mark.slow

METHODS = [refold.RepAdapter(rank=4), refold.LoRA(rank=4)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def eager(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the model computes without any compiled code."""
    with torch.compiler.set_stance("force_eager"):
        return model(x).detach()


@pytest.mark.parametrize("style", ["wrapper", "in place"])
@pytest.mark.parametrize("family", ["vit", "open_clip_tower", "efficientnet"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_change_of_state_reaches_compiled_code(style, family, method):
    """The backend runs the traced graph as it is: what is tested is what was traced."""
    model = build(family)
    x = images(model)
    if style == "wrapper":
        run = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        run = model
    seen = []

    def check() -> None:
        expected = eager(model, x)
        torch.testing.assert_close(run(x).detach(), expected, rtol=1e-4, atol=1e-5)
        seen.append(expected)

    check()
    refold.attach(model, method)
    perturb(refold.trainable_parameters(model))
    check()
    refold.attach(model, method, name="second")
    perturb(refold.trainable_parameters(model))
    check()
    refold.activate(model, "default")
    check()
    with refold.disabled(model):
        check()
    check()
    refold.merge(model)
    check()
    refold.switch(model, "second")
    check()
    refold.unmerge(model)
    check()
    refold.detach(model)
    check()
    plain, first, second = seen[0], seen[1], seen[2]
    assert not torch.allclose(plain, first, rtol=1e-3)
    assert not torch.allclose(first, second, rtol=1e-3)
    assert torch.equal(seen[-1], plain)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_inductor_computes_and_trains_the_adapter(method):
    model = refold.attach(build("vit"), method)
    perturb(refold.trainable_parameters(model))
    x = images(model)
    compiled = torch.compile(model)
    torch.testing.assert_close(compiled(x).detach(), eager(model, x), rtol=1e-4, atol=1e-4)
    compiled(x).pow(2).sum().backward()
    found = {n: p.grad.clone() for n, p in refold.trainable_parameters(model).items()}
    model.zero_grad()
    model(x).pow(2).sum().backward()
    for name, parameter in refold.trainable_parameters(model).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_frozen_statistics_stay_in_compiled_training(training):
    model = refold.attach(build("resnet"), refold.RepAdapter(dropout=0.0)).train(training)
    statistics = {n: v.clone() for n, v in model.named_buffers()}
    x = images(model, count=4)
    expected = eager(model, x)
    run = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(run(x).detach(), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, statistics[n]) for n, v in model.named_buffers())
    assert all(m.training == training for m in model.modules())


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
@pytest.mark.parametrize("family", ["vit", "open_clip_tower", "efficientnet"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_export_with_a_dynamic_batch(family, method, merged):
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model))
    if merged:
        refold.merge(model)
    x = images(model, count=3)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    other = images(model, count=7, seed=1)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-4, atol=1e-5)


# Torch's own tracer asks for the gradient of the activation that enters the compiled part.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_compiled_part_can_be_adapted(method):
    model = build("vit")
    x = images(model)
    model.blocks[0].mlp = torch.compile(model.blocks[0].mlp, backend="eager")
    model(x)
    refold.attach(model, method)
    perturb(refold.trainable_parameters(model))
    torch.testing.assert_close(model(x).detach(), eager(model, x), rtol=1e-4, atol=1e-5)
    assert refold.merge(model).rel_l2 < 1e-5
    torch.testing.assert_close(model(x).detach(), eager(model, x), rtol=1e-4, atol=1e-5)
