"""Comparing a model's outputs before and after a merge: on which inputs, in which precision, how equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refold.maps import to_float64
from refold.probe import Example, forward, preserved, tensors_of

__all__ = ["LIMITS", "compute_dtype", "difference", "probe_examples", "run_probes"]

#: Largest relative L2 distance between merged and unmerged outputs that counts as equal.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The lowest floating precision among the parameters: it bounds what outputs can show."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return min(dtypes or {torch.float32}, key=lambda d: -torch.finfo(d).eps)


def probe_examples(model: nn.Module, example: Example) -> list[Example]:
    """The attach-time example and one of fresh noise in its shapes, on the model's device and dtype."""
    reference = next(p for p in model.parameters() if p.is_floating_point())

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(reference.device, reference.dtype if tensor.is_floating_point() else tensor.dtype)

    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    return [example.map(place), example.map(noise).map(place)]


@torch.no_grad()
def run_probes(model: nn.Module, example: Example) -> list[Tensor]:
    """The model's outputs at evaluation on :func:`probe_examples`, flattened to float64."""
    with preserved(model):
        return [
            to_float64(tensor).flatten()
            for probe in probe_examples(model, example)
            for tensor in tensors_of(forward(model, probe))
            if tensor.is_floating_point()
        ]


def difference(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """Largest absolute difference and relative L2 distance of two lists of outputs, ``b`` the reference."""
    left, right = torch.cat(a), torch.cat(b)
    max_abs = float((left - right).abs().max())
    return max_abs, float((left - right).norm() / right.norm().clamp_min(torch.finfo(torch.float64).tiny))
