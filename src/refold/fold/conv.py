"""``nn.Conv1d/2d/3d``: channels first, weight (out, in / groups, *kernel), any stride, dilation and padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from refold.fold.operator import Operator, map_first

__all__ = ["CONVS", "ConvKind"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONAL: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def pads_zeros(layer: nn.Module) -> bool:
    """Whether the layer surrounds its input with zeros (other padding modes repeat shifted values)."""
    assert isinstance(layer, CONVS)
    if layer.padding_mode != "zeros":
        return False
    if layer.padding == "same":
        return any(k > 1 for k in layer.kernel_size)
    return layer.padding != "valid" and any(int(p) > 0 for p in layer.padding)


class ConvKind:
    name = "conv"
    returns_product = True
    map_input = staticmethod(map_first)

    def refuses(self, layer: nn.Module) -> str | None:
        return None

    def is_plain(self, layer: nn.Module) -> bool:
        return any(
            type(layer).forward is base.forward and type(layer)._conv_forward is base._conv_forward
            for base in CONVS
            if isinstance(layer, base)
        )

    def operator(self, layer: nn.Module) -> Operator:
        assert isinstance(layer, CONVS)
        return Operator(
            "weight",
            "bias",
            layer.in_channels,
            layer.out_channels,
            groups=layer.groups,
            channel_dim=-len(layer.kernel_size) - 1,
            kernel=tuple(layer.kernel_size),
            pads_zeros=pads_zeros(layer),
        )

    def run(self, layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(layer, CONVS)
        dims, padding = len(layer.kernel_size), layer.padding
        if layer.padding_mode != "zeros":
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
        return _FUNCTIONAL[dims](x, weight, None, layer.stride, padding, layer.dilation, layer.groups)
