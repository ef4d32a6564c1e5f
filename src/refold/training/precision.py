"""Training in bfloat16 with the frozen weights held in bfloat16, and the exact float32 originals afterwards.

Autocast casts a frozen weight again at every forward pass, for it caches only the casts of weights that
require a gradient. Holding the frozen weights in bfloat16 for the duration of training saves those casts and
half their memory traffic; the products are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["flush_denormals", "has_fast_bfloat16", "reduced_precision", "resolve_precision"]

# Layers whose weights autocast would cast, and their names. Exactly these types: a subclass may do
# arithmetic of its own on its weight (weight standardisation), which must stay in float32.
_CAST: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    nn.modules.linear.NonDynamicallyQuantizableLinear: ("weight", "bias"),
    nn.Conv1d: ("weight", "bias"),
    nn.Conv2d: ("weight", "bias"),
    nn.Conv3d: ("weight", "bias"),
    nn.ConvTranspose1d: ("weight", "bias"),
    nn.ConvTranspose2d: ("weight", "bias"),
    nn.ConvTranspose3d: ("weight", "bias"),
    nn.MultiheadAttention: (
        "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias",
    ),
}  # fmt: skip


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices in hardware (CPU: AMX or AVX512-BF16 instructions)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, but the only way to ask
        return any(getattr(torch.cpu, name, bool)() for name in checks)
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """``"bf16"`` or ``"fp32"``: the setting itself, or what ``"auto"`` means on ``device``."""
    if precision == "auto":
        return "bf16" if has_fast_bfloat16(device) else "fp32"
    return precision


@contextmanager
def reduced_precision(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Hold the frozen weights of linear, convolution and attention layers in ``dtype`` inside the block.

    Parameters keep their identity; only their data is swapped. Trainable parameters, norms, embeddings and
    whatever else autocast leaves alone stay in float32. When the block ends, also by an exception, every
    original is back bit for bit, in the very storage it had on the CPU; originals from another device wait
    on the CPU and return to where their parameter is then. Forward passes inside belong under
    ``torch.autocast``.

    Args:
        model: modified in place for the duration of the block.
        dtype: type to hold them in.
    """
    modules = list(model.modules())
    shared = {id(p) for m in modules for name, p in m._parameters.items() if name not in _castable(m)}
    originals: dict[nn.Parameter, Tensor] = {}
    try:
        for module in modules:
            for name in _castable(module):
                parameter = module._parameters.get(name)
                if parameter is None or parameter in originals or id(parameter) in shared:
                    continue
                if parameter.requires_grad or parameter.dtype != torch.float32:
                    continue
                originals[parameter] = parameter.data.cpu()
                parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, original in originals.items():
            parameter.data = original.to(parameter.device)


def _castable(module: nn.Module) -> tuple[str, ...]:
    return _CAST.get(type(module), ())


@contextmanager
def flush_denormals() -> Iterator[None]:
    """Round denormal numbers to zero inside the block: on CPUs they take a hundred times longer.

    They arise in the optimizer's averages of vanishing gradients. The previous setting returns afterwards.
    """
    smallest = torch.full((1,), 1e-39)
    before = not bool((smallest * 1.0).item())
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
