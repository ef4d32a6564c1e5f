"""LayerNorm, BatchNorm and GroupNorm: a per-channel map at the output folds into their affine parameters."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from refold.fold.operator import Operator, map_first

__all__ = ["NORMS", "BatchNorm", "NormKind"]

BatchNorm = _BatchNorm
NORMS = (nn.LayerNorm, nn.GroupNorm, BatchNorm)


class NormKind:
    name = "norm"
    run = None
    map_input = staticmethod(map_first)

    def refuses(self, layer: nn.Module) -> str | None:
        if getattr(layer, "weight", None) is None:
            return "the norm has no affine weight to fold into"
        if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
            return "the norm normalises more than the channel dimension"
        if isinstance(layer, nn.LayerNorm) and type(layer).forward is not nn.LayerNorm.forward:
            return f"{type(layer).__name__} overrides LayerNorm.forward, so its channel dimension is not known"
        if getattr(layer, "act", None) is not None and not isinstance(layer.act, nn.Identity):
            return "the norm applies an activation of its own after its affine map"
        return None

    def operator(self, layer: nn.Module) -> Operator:
        assert isinstance(layer.weight, nn.Parameter)
        width = layer.weight.shape[0]
        dim = -1 if isinstance(layer, nn.LayerNorm) else 1
        return Operator("weight", "bias", width, width, groups=width, channel_dim=dim, folds_input=False)
