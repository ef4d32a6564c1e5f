"""``nn.Linear``: channels last, weight (out, in)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from refold.fold.operator import Operator, map_first

__all__ = ["LinearKind"]


class LinearKind:
    name = "linear"
    returns_product = True
    map_input = staticmethod(map_first)

    def refuses(self, layer: nn.Module) -> str | None:
        return None

    def is_plain(self, layer: nn.Module) -> bool:
        return type(layer).forward is nn.Linear.forward

    def operator(self, layer: nn.Module) -> Operator:
        assert isinstance(layer, nn.Linear)
        return Operator("weight", "bias", layer.in_features, layer.out_features, groups=1, channel_dim=-1)

    def run(self, layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)
