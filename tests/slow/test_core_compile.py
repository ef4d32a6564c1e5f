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
FAMILIES = ["vit", "swin", "convnext", "resnet", "open_clip_tower"]


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
@pytest.mark.parametrize("family", [*FAMILIES, "efficientnet"])
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


def graph_breaks(model: nn.Module, x: torch.Tensor) -> int:
    return torch._dynamo.explain(model)(x).graph_break_count


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [*METHODS, refold.SSF()], ids=lambda m: type(m).__name__)
def test_no_graph_break_is_added(method, family, training):
    plain = build(family).train(training)
    x = images(plain, count=2)
    expected = graph_breaks(plain, x)
    model = refold.attach(build(family), method).train(training)
    torch.compiler.reset()
    assert graph_breaks(model, x) == expected
    refold.merge(model)
    assert graph_breaks(model, x) == expected


# As above: the tracer asks for the gradient of what hooks pass on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize(
    "method",
    [
        refold.DTL(start=1, plus=True),
        refold.LST(reduction=2),
        refold.E3VA(rank=2, recompute="nothing"),
        refold.E3VA(rank=2),
        refold.E3VA(rank=2, recompute="taps"),
        refold.Adapter(variant="adapter+", dropout=0.0),
        refold.Unified(composition="gated", hidden=4),
        refold.LoRand(rank=2),
        refold.Mona(hidden=4, dropout=0.0),
    ],
    ids=lambda m: m.describe(),
)
def test_adapters_in_a_row_are_traced_whole(method, family):
    """Compiled in one graph, gradients included, and exported."""
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model))
    x = images(model)
    expected = model(x)
    expected.pow(2).sum().backward()
    gradients = {n: p.grad.clone() for n, p in refold.trainable_parameters(model).items()}
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    found.pow(2).sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.filterwarnings("ignore")  # torch's exporter has many to give
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_onnx_while_unmerged(family, method, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model))
    x = images(model)
    expected = model(x).detach()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    with refold.disabled(model):
        assert not torch.allclose(model(x), expected, rtol=1e-2)
    assert torch.equal(model(x), expected)


def compilations() -> int:
    """Graphs that torch.compile has traced so far in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_merge_costs_one_compilation_and_later_calls_and_switches_none(method, family):
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model))
    refold.attach(model, method, name="second")
    perturb(refold.trainable_parameters(model))
    x = images(model)
    run = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        run(x)
        refold.merge(model)
        before = compilations()
        for _ in range(3):
            run(x)
        assert compilations() == before + 1
        for name in ("default", "second", "default"):
            refold.switch(model, name)
            expected = eager(model, x)
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
        assert compilations() == before + 1


def test_a_switch_that_replaces_parameters_is_compiled_anew():
    """A bias of one adapter alone: the compiled code of the other would go on without it."""
    model = build("vit_without_qkv_bias")
    refold.attach(model, refold.RepAdapter(rank=4, sites="attention"), allow_new_bias=True, name="biased")
    perturb(refold.trainable_parameters(model))
    refold.attach(model, refold.LoRA(rank=4, sites="attention"), name="unbiased")
    perturb(refold.trainable_parameters(model))
    x = images(model)
    run = torch.compile(model, backend="eager")
    refold.merge(model)
    with torch.no_grad():
        for name in ("biased", "unbiased", "biased", "unbiased"):
            refold.switch(model, name)
            torch.testing.assert_close(run(x), eager(model, x), rtol=1e-4, atol=1e-5)
