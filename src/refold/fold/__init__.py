"""Exact folding, one file per kind of layer. A new kind is one file here and one line in ``KINDS``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from refold.fold.attention import AttentionKind
from refold.fold.conv import CONVS, ConvKind
from refold.fold.linear import LinearKind
from refold.fold.norm import NORMS, BatchNorm, NormKind
from refold.fold.operator import LayerKind, Operator, fold_input, fold_output, fold_weight, input_shift
from refold.fold.transposed import TRANSPOSED, TransposedKind
from refold.maps import is_quantized

__all__ = [
    "KINDS",
    "NORMS",
    "BatchNorm",
    "LayerKind",
    "Operator",
    "fold_input",
    "fold_output",
    "fold_weight",
    "input_shift",
    "kind_of",
    "refusal",
    "replaces_weight",
]

KINDS: dict[str, LayerKind] = {
    kind.name: kind for kind in (LinearKind(), ConvKind(), TransposedKind(), NormKind(), AttentionKind())
}

_TYPES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear,), LinearKind.name),
    (CONVS, ConvKind.name),
    (TRANSPOSED, TransposedKind.name),
    (NORMS, NormKind.name),
    ((nn.MultiheadAttention,), AttentionKind.name),
)


def kind_of(layer: nn.Module) -> LayerKind | None:
    """The kind of a layer by its type, or None for a layer refold cannot fold into."""
    for types, name in _TYPES:
        if isinstance(layer, types):
            return KINDS[name]
    return None


def refusal(layer: nn.Module) -> str | None:
    """Why nothing can be folded into ``layer`` (None if something can)."""
    kind = kind_of(layer)
    if kind is None:
        return f"{type(layer).__name__} is not a layer refold can fold into"
    if parametrize.is_parametrized(layer):
        return "the layer is parametrized, so its weight is computed at every call and cannot hold a fold"
    reason = kind.refuses(layer)
    if reason is not None:
        return reason
    op = kind.operator(layer)
    weight = layer._parameters.get(op.weight)
    if weight is None:
        return "the layer's weight is not a parameter of its own (a weight-norm or spectral-norm hook computes it)"
    if is_quantized(weight):
        return None  # adapters act beside it; merging decides what becomes of it
    for leaf in (op.weight, op.bias):
        tensor = layer._parameters.get(leaf)
        reason = None if tensor is None else _unfit(leaf, tensor)
        if reason is not None:
            return reason
    if op.canonical(weight).shape != op.weight_shape:
        return f"its weight has the shape {tuple(weight.shape)}, which is not that of its kind"
    return None


def _unfit(leaf: str, tensor: Tensor) -> str | None:
    """Why a parameter cannot hold a fold, whatever layer it belongs to."""
    if not tensor.is_floating_point():
        return f"its {leaf} holds {tensor.dtype} numbers, and folds are real and floating"
    if tensor.layout is not torch.strided:
        return f"its {leaf} is sparse ({tensor.layout}), and a fold fills it"
    if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        return f"its {leaf} is expanded, so several entries are one number of memory: make it contiguous first"
    return None


def replaces_weight(layer: nn.Module) -> bool:
    """Whether a weight map must compute the whole adapted weight, as no equal path over activations exists."""
    kind = kind_of(layer)
    return kind is None or kind.run is None or kind.operator(layer).groups != 1
