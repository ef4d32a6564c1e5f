"""Frozen weights held in bfloat16, the originals back, and the choice of the attention kernel."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import refold
from refold.training import attention
from refold.training.attention import attention_kernel, choose_attention
from refold.training.precision import flush_denormals, has_fast_bfloat16, reduced_precision, resolve_precision

CPU = torch.device("cpu")


def attached(name: str = "test_vit", method: refold.Method | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3)
    refold.attach(model, method or refold.RepAdapter(rank=4))
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_originals_return_bit_for_bit_in_their_own_storage(name: str) -> None:
    model = attached(name)
    before, parameters = bits(model), dict(model.named_parameters())
    places = {n: p.data_ptr() for n, p in parameters.items()}
    with reduced_precision(model):
        held = {n for n, p in parameters.items() if p.dtype == torch.bfloat16}
        assert held
        assert not any(parameters[n].requires_grad for n in held)
    assert dict(model.named_parameters()) == parameters
    assert {n: p.data_ptr() for n, p in parameters.items()} == places
    assert_same_bits(model, before)


def test_originals_return_after_an_exception() -> None:
    model = attached()
    before = bits(model)
    with pytest.raises(ZeroDivisionError), reduced_precision(model):
        _ = 1 / 0
    assert_same_bits(model, before)


def test_what_autocast_leaves_alone_stays_float32() -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(4),
            "embedding": nn.Embedding(8, 4),
            "tied": nn.Linear(4, 8, bias=False),
            "frozen": nn.Linear(4, 4),
            "trained": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        }
    )
    model.requires_grad_(False)
    model["tied"].weight = model["embedding"].weight
    model["trained"].bias.requires_grad_(True)
    with reduced_precision(model):
        held = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert held == {
        "frozen.weight",
        "frozen.bias",
        "trained.weight",
        "attention.in_proj_weight",
        "attention.in_proj_bias",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    }


@pytest.mark.parametrize("method", [refold.RepAdapter(rank=4, dropout=0.0), refold.BitFit(), refold.FullFineTune()])
def test_held_weights_give_the_gradients_of_plain_autocast(method: refold.Method) -> None:
    plain = attached(method=method).eval()
    held = copy.deepcopy(plain)
    images, labels = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 2, 0])
    for model, context in ((plain, nullcontext()), (held, reduced_precision(held))):
        with context:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
    wanted = refold.trainable_parameters(plain)
    for name, parameter in refold.trainable_parameters(held).items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=0, atol=0)


def test_auto_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not has_fast_bfloat16(CPU)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("auto", CPU) == "bf16"
    assert resolve_precision("fp32", CPU) == "fp32"
    assert not has_fast_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("before", [False, True])
def test_denormals_flush_only_inside(before: bool) -> None:
    smallest = torch.full((8,), 1e-39)  # made while denormals count
    try:
        torch.set_flush_denormal(before)
        with flush_denormals():
            assert float((smallest * 1.0).sum()) == 0
        assert (float((smallest * 1.0).sum()) == 0) is before
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("chosen", attention.KERNELS)
@pytest.mark.parametrize("saved", [0.5, 0.01])
def test_the_fastest_attention_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch, chosen: str, saved: float) -> None:
    """A kernel that is fast by construction wins; within the margin PyTorch's own choice stays."""
    clock = [0.0]
    costs: list[float] = []

    def kernel(name: str) -> AbstractContextManager[None]:
        costs.append(1.0 - saved if name == chosen else 1.0)
        return nullcontext()

    def now(device: torch.device) -> float:
        clock[0] += costs.pop() if costs else 0.0
        return clock[0]

    monkeypatch.setattr(attention, "attention_kernel", kernel)
    monkeypatch.setattr(attention, "_now", now)
    model = attached()
    state = torch.get_rng_state()

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 160, 160))

    assert choose_attention(forward, CPU) == (chosen if saved > 0.1 else "default")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_attention_calls_are_counted_with_their_need_for_gradients() -> None:
    model = attached()
    with attention._Collector() as collector:
        model(torch.randn(2, 3, 160, 160))
    (call,) = collector.calls.values()
    assert call.count == len(model.blocks)
    assert call.gradients == (True, True, True)
    times = attention._time(call, CPU, rounds=1)
    assert set(times) == set(attention.KERNELS)
    assert all(0 < seconds < 60 for seconds in times.values())
    assert times["math-bf16"] == times["math"]  # float32 inputs: one and the same

    probe = attached(method=refold.LinearProbe())
    with attention._Collector() as collector:
        probe(torch.randn(2, 3, 160, 160))
    (call,) = collector.calls.values()
    assert call.gradients == (False, False, False)


def test_a_model_without_attention_keeps_the_default() -> None:
    assert choose_attention(lambda: attached("test_convnext")(torch.randn(1, 3, 64, 64)), CPU) == "default"


@pytest.mark.parametrize(("name", "limit"), [("default", 0.006), ("math", 0.006), ("math-bf16", 0.012)])
def test_every_kernel_computes_attention(name: str, limit: float) -> None:
    """Against the formula in float64; rounding the result to bfloat16 alone is an error of 0.002."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 4, 33, 16).bfloat16()
    q, k, v = inputs.double().unbind()
    wanted = (q @ k.mT / 4).softmax(-1) @ v
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with attention_kernel(name):
        found = F.scaled_dot_product_attention(*inputs.unbind())
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() / wanted.norm() < limit
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == before


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_products_have_the_gradients_of_attention(needed: tuple[bool, ...], scale: float | None) -> None:
    """Against autograd through the formula in float64, for queries, keys and values of different sizes."""
    torch.manual_seed(0)
    shapes = ((2, 4, 9, 16), (2, 4, 33, 16), (2, 4, 33, 8))
    inputs = [torch.randn(shape).bfloat16().requires_grad_(need) for shape, need in zip(shapes, needed, strict=True)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gradient = torch.randn(2, 4, 9, 8).bfloat16()
    q, k, v = exact
    wanted = (q @ k.mT * (scale or 0.25)).softmax(-1) @ v
    wanted.backward(gradient.double())
    with attention_kernel("math-bf16"):
        found = F.scaled_dot_product_attention(*inputs, scale=scale)
    found.backward(gradient)
    assert (found.double() - wanted).norm() / wanted.norm() < 0.012
    for tensor, reference, need in zip(inputs, exact, needed, strict=True):
        assert (tensor.grad is not None) is need
        if tensor.grad is not None and reference.grad is not None:
            assert tensor.grad.dtype == torch.bfloat16
            assert (tensor.grad.double() - reference.grad).norm() / reference.grad.norm() < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril(-1)},  # its first row is masked throughout
        {"attn_mask": torch.randn(9, 9).bfloat16()},
        {"is_causal": True},
        {"enable_gqa": True},
    ],
)
def test_plain_products_leave_other_attention_to_pytorch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query, value = torch.randn(2, 4, 9, 16).bfloat16(), torch.randn(2, 4, 9, 16).bfloat16()
    if "enable_gqa" in options:
        value = value[:, :2]
    wanted = F.scaled_dot_product_attention(query, value, value, **options)
    with attention_kernel("math-bf16"):
        found = F.scaled_dot_product_attention(query, value, value, **options)
    assert found.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_plain_products_follow_autocast_and_leave_float32_alone() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 4, 9, 16)
    exact = F.scaled_dot_product_attention(*inputs.unbind())
    with attention_kernel("math-bf16"):
        torch.testing.assert_close(F.scaled_dot_product_attention(*inputs.unbind()), exact)
        with torch.autocast("cpu", torch.bfloat16):
            low = F.scaled_dot_product_attention(*inputs.unbind())
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() / exact.norm() < 0.012
