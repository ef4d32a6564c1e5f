"""Which attention kernel trains fastest here: measured on the model's own queries, keys and values.

PyTorch picks the kernel of ``scaled_dot_product_attention`` by rule. On CPUs its choice can be wrong by a factor of
five: in bfloat16 the backward pass of the fused kernel loses to plain matrix products at short sequences, and wins at
long ones. The answer depends on device, type and length, so :func:`choose_attention` times them.

=============  ==========================================================================================
``default``    what PyTorch picks
``math``       plain matrix products; bfloat16 inputs are computed in float32
``math-bf16``  plain matrix products in bfloat16, as autocast did before fused kernels (see
               :mod:`refold.training.products`): scores are rounded to bfloat16 before the softmax, so the error
               is about twice that of rounding the result
=============  ==========================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from refold.training.products import MatrixProducts

__all__ = ["KERNELS", "attention_kernel", "choose_attention"]

KERNELS: tuple[str, ...] = ("default", "math", "math-bf16")

_MARGIN = 0.97  # another kernel must be at least this much faster: a tie keeps PyTorch's choice
_HOPELESS = 1.5  # a kernel that takes so many times the fastest one's time is not timed again


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Run attention inside the block under the kernel ``name``: ``"default"``, ``"math"`` or ``"math-bf16"``."""
    if name == "default":
        yield
        return
    low = name == "math-bf16"
    flags = torch.backends.cuda  # their name notwithstanding, these settings hold on every device
    before = flags.fp16_bf16_reduction_math_sdp_allowed()
    flags.allow_fp16_bf16_reduction_math_sdp(low)
    try:
        with sdpa_kernel(SDPBackend.MATH), MatrixProducts() if low else nullcontext():
            yield
    finally:
        flags.allow_fp16_bf16_reduction_math_sdp(before)


def choose_attention(forward: Callable[[], object], device: torch.device, *, rounds: int = 3) -> str:
    """The fastest kernel; PyTorch's own choice where none is clearly faster, or where there is no attention.

    ``forward`` runs once while the inputs of its attention calls are collected, one set for each shape; then
    the attention alone is timed on them under every kernel, in turns, with the backward pass where the inputs
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
            seconds: dict[str, float] = dict.fromkeys(KERNELS, 0.0)
            for call in collector.calls.values():
                for name, best in _time(call, device, rounds).items():
                    seconds[name] += call.count * best
        except torch.OutOfMemoryError:  # plain matrix products store every attention matrix
            return "default"
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < _MARGIN * seconds["default"] else "default"


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
    """Seconds of one call under every kernel; those that are clearly beaten are timed once."""
    best: dict[str, float] = dict.fromkeys(KERNELS, float("inf"))
    exact = call.inputs[0].dtype == torch.float32
    if exact:
        del best["math-bf16"]
    for round_ in range(rounds + 1):
        limit = _HOPELESS * min(best.values())
        for name in [name for name in best if round_ < 2 or best[name] < limit]:
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
    return best | ({"math-bf16": best["math"]} if exact else {})


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
