"""Shared by the trap tests: attach in float64, move the adapter, and prove that merging it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import refold
from refold.probe import tensors_of
from zoo import perturb, relative

__all__ = ["EXACT", "METHODS", "WIDTH", "adapted_rows", "assert_exact", "attached", "outputs", "rows"]

WIDTH = 8
EXACT = 1e-12
#: A map before a layer, one of its weight, and one after it.
METHODS = [refold.RepAdapter(rank=4, scale=0.7, dropout=0.0), refold.LoRA(rank=3), refold.SSF()]


def rows(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4,)), WIDTH, dtype=torch.float64)


def attached(model: nn.Module, method: refold.Method, example: Any, **options: Any) -> nn.Module:
    """The model in float64 at evaluation, its biases and norms away from their start, with a trained adapter."""
    model = model.double().eval()
    perturb({n: p for n, p in model.named_parameters() if p.dim() == 1}, 0.2)
    refold.attach(model, method, example=example, **{"trainable": (), **options})
    perturb(refold.trainable_parameters(model), 0.2)
    return model


def outputs(model: nn.Module, call: Callable[[nn.Module], Any]) -> Tensor:
    """Every floating number the call gives, in one row."""
    with torch.no_grad():
        return torch.cat([t.flatten() for t in tensors_of(call(model)) if t.is_floating_point()])


def assert_exact(model: nn.Module, *calls: Callable[[nn.Module], Any]) -> None:
    """The adapter matters, merged equals unmerged in every call, and both ways back are exact."""
    with refold.disabled(model):
        plain = [outputs(model, call) for call in calls]
    attached_state = {n: v.clone() for n, v in model.state_dict().items()}
    unmerged = [outputs(model, call) for call in calls]
    assert relative(plain[0], unmerged[0]) > 1e-3
    assert refold.merge(model).folded
    for call, wanted in zip(calls, unmerged, strict=True):
        assert relative(outputs(model, call), wanted) <= EXACT
    refold.unmerge(model)
    assert all(torch.equal(v, attached_state[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(outputs(model, call), wanted) for call, wanted in zip(calls, unmerged, strict=True))
    refold.detach(model)
    assert all(torch.equal(outputs(model, call), wanted) for call, wanted in zip(calls, plain, strict=True))


def adapted_rows(model: nn.Module) -> dict[str, Any]:
    return {row.path: row for row in refold.explain(model).rows if row.slot not in ("-", "head")}
