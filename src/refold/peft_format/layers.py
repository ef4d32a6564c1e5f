"""On which layers a PEFT adapter and refold's are the same map."""

from __future__ import annotations

from torch import nn

from refold.fold import kind_of
from refold.fold.conv import CONVS

__all__ = ["difference"]


def difference(layer: nn.Module) -> str | None:
    """Why PEFT's adapter on ``layer`` is no change of the layer's weight that refold could fold; None if it is one."""
    if isinstance(layer, nn.MultiheadAttention):
        return "on MultiheadAttention PEFT adds the change of out_proj twice"
    if not isinstance(layer, (nn.Linear, *CONVS)):
        return f"{type(layer).__name__} is neither a Linear nor a convolution"
    kind = kind_of(layer)
    if kind is None or not kind.is_plain(layer):
        return f"{type(layer).__name__} has a forward of its own, beside which PEFT's adapter is another map"
    if isinstance(layer, nn.Linear):
        return None
    if layer.groups != 1:
        return "on grouped convolutions PEFT's adapter mixes all channels, which a grouped weight cannot hold"
    dilated = any(d != 1 and k != 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    if dilated or layer.padding_mode != "zeros":
        return "PEFT's adapter leaves out the convolution's dilation and padding mode"
    return None
