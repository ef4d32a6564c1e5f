"""``nn.MultiheadAttention`` with packed projections: q, k and v are rows of one ``in_proj_weight``.

Its own forward multiplies ``in_proj_weight`` and ``out_proj.weight`` directly: a hook on ``out_proj`` never
fires, so the input side is reached by mapping query, key and value before the call, and the weight side by
shadowing the parameter during the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from refold.fold.operator import Call, Operator

__all__ = ["AttentionKind"]

_INPUTS = ("query", "key", "value")


class AttentionKind:
    name = "attention"
    returns_product = False
    run = None

    def refuses(self, layer: nn.Module) -> str | None:
        assert isinstance(layer, nn.MultiheadAttention)
        if layer.in_proj_weight is None:
            return "separate kdim or vdim projections have no packed in_proj_weight"
        return None

    def is_plain(self, layer: nn.Module) -> bool:
        return type(layer).forward is nn.MultiheadAttention.forward

    def operator(self, layer: nn.Module) -> Operator:
        assert isinstance(layer, nn.MultiheadAttention)
        width = layer.embed_dim
        return Operator("in_proj_weight", "in_proj_bias", width, 3 * width, groups=1, channel_dim=-1)

    def map_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[Tensor], Tensor]) -> Call:
        # The three rows blocks of W M see query, key and value respectively, so mapping each is exact also in
        # cross-attention; one tensor passed three times stays one tensor, which keeps torch's fast paths.
        mapped: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:
            if id(x) not in mapped:
                mapped[id(x)] = fn(x)
            return mapped[id(x)]

        new_args = tuple(once(a) if i < len(_INPUTS) else a for i, a in enumerate(args))
        return new_args, {k: once(v) if k in _INPUTS else v for k, v in kwargs.items()}
