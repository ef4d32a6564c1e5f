"""LayerNorm, RMSNorm, BatchNorm and GroupNorm: a per-channel map of the output folds into their affine parameters.

Whatever a subclass does around them (channels first, an activation behind) the map acts on these parameters.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from refold.fold.operator import Operator, map_first

__all__ = ["NORMS", "BatchNorm", "NormKind"]

BatchNorm = _BatchNorm
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, BatchNorm)


class NormKind:
    name = "norm"
    returns_product = False
    run = None
    map_input = staticmethod(map_first)

    def refuses(self, layer: nn.Module) -> str | None:
        weight = getattr(layer, "weight", None)
        if weight is None:
            return "the norm has no affine weight to fold into"
        if weight.dim() != 1:
            return "the norm normalises more than the channel dimension"
        return None

    def is_plain(self, layer: nn.Module) -> bool:
        return any(type(layer).forward is base.forward for base in NORMS if isinstance(layer, base))

    def operator(self, layer: nn.Module) -> Operator:
        # Not ``layer.weight``, which is the adapted one while the layer runs.
        weight = layer._parameters["weight"]
        assert weight is not None
        width = weight.shape[0]
        dim = -1 if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) else 1
        return Operator("weight", "bias", width, width, groups=width, channel_dim=dim, folds_input=False)
