"""Which attention kernel trains fastest here: measured on the model's own queries, keys and values.

PyTorch picks the kernel of ``scaled_dot_product_attention`` by rule. On CPUs its choice can be wrong by a
factor of two: in bfloat16 the backward pass of the fused kernel loses to plain matrix products at short
sequences, and wins at long ones. The answer depends on device, type and length, so
:func:`choose_attention` times both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["attention_kernel", "choose_attention"]

_MARGIN = 0.97  # the other kernel must be at least this much faster: a tie keeps PyTorch's choice


def attention_kernel(name: str) -> AbstractContextManager[Any]:
    """The context in which attention runs under the kernel ``name``: ``"default"`` or ``"math"``."""
    return sdpa_kernel(SDPBackend.MATH) if name == "math" else nullcontext()


def choose_attention(forward: Callable[[], object], device: torch.device, *, rounds: int = 3) -> str:
    """``"math"`` where plain matrix products beat PyTorch's own choice of kernel, else ``"default"``.

    ``forward`` runs once while the inputs of its attention calls are collected, one set for each shape; then
    the attention alone is timed on them under both kernels, in turns, with the backward pass where the inputs
    need gradients. The random state is left as it was.

    Args:
        forward: one forward pass as training makes it: full batch, mode, autocast.
        device: of the model.
        rounds: timings of each kernel and shape; the fastest counts.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        with _Collector() as collector:
            forward()
        try:
            seconds = {"default": 0.0, "math": 0.0}
            for call in collector.calls.values():
                for name, fastest in _time(call, device, rounds).items():
                    seconds[name] += call.count * fastest
        except torch.OutOfMemoryError:  # the math kernel stores every attention matrix
            return "default"
    return "math" if seconds["math"] < _MARGIN * seconds["default"] else "default"


@dataclass
class _Call:
    """Calls of one kind: the inputs of the first, their gradient needs, other arguments, and how many."""

    inputs: tuple[Tensor, Tensor, Tensor]
    gradients: tuple[bool, bool, bool]
    options: dict[str, Any]
    count: int = 0


class _Collector(TorchFunctionMode):
    """Groups the attention calls of a forward pass by everything that their speed depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[object, _Call] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            self._record(*args, **kwargs)
        return func(*args, **kwargs)

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **other: Any,
    ) -> None:
        inputs = (query, key, value)
        gradients = (query.requires_grad, key.requires_grad, value.requires_grad)
        kind = (
            tuple((t.shape, t.stride(), t.dtype) for t in inputs),
            None if attn_mask is None else (attn_mask.shape, attn_mask.dtype),
            gradients,
            dropout_p > 0,
            is_causal,
        )
        if kind not in self.calls:
            mask = None if attn_mask is None else attn_mask.detach()
            options = {"attn_mask": mask, "dropout_p": dropout_p, "is_causal": is_causal, **other}
            detached = (query.detach(), key.detach(), value.detach())
            self.calls[kind] = _Call(detached, gradients, options)
        self.calls[kind].count += 1


def _time(call: _Call, device: torch.device, rounds: int) -> dict[str, float]:
    best = {"default": float("inf"), "math": float("inf")}
    for round_ in range(rounds + 1):
        for name in best:
            inputs = [
                tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(call.inputs, call.gradients, strict=True)
            ]
            start = _now(device)
            with attention_kernel(name):
                output = scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], **call.options)
            if output.requires_grad:
                output.backward(torch.ones_like(output))
            if round_:  # the first round warms up
                best[name] = min(best[name], _now(device) - start)
    return best


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
