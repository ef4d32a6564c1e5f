"""Exact folding, one file per kind of layer. A new kind is one file here and one line in ``KINDS``."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from refold.fold.attention import AttentionKind
from refold.fold.conv import CONVS, ConvKind
from refold.fold.linear import LinearKind
from refold.fold.norm import NORMS, BatchNorm, NormKind
from refold.fold.operator import LayerKind, Operator, fold_input, fold_output, input_shift

__all__ = [
    "KINDS",
    "NORMS",
    "BatchNorm",
    "LayerKind",
    "Operator",
    "fold_input",
    "fold_output",
    "input_shift",
    "kind_of",
    "refusal",
    "replaces_weight",
]

KINDS: dict[str, LayerKind] = {kind.name: kind for kind in (LinearKind(), ConvKind(), NormKind(), AttentionKind())}

_TYPES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear,), LinearKind.name),
    (CONVS, ConvKind.name),
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
    if reason is None and layer._parameters.get(kind.operator(layer).weight) is None:
        reason = "the layer's weight is not a parameter of its own (a weight-norm or spectral-norm hook computes it)"
    return reason


def replaces_weight(layer: nn.Module) -> bool:
    """Whether a weight map must compute the whole adapted weight, as no equal path over activations exists."""
    kind = kind_of(layer)
    return kind is None or kind.run is None or kind.operator(layer).groups != 1
