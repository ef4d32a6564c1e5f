"""``nn.ConvTranspose1d/2d/3d``: channels first, weight (in, out / groups, *kernel), any geometry.

Channel maps act on each tap of the kernel alone, so they fold as into any convolution once the layout is turned.
A constant is another matter: with strides, and at borders, an output position sees a part of the taps only.
"""

from __future__ import annotations

from torch import nn

from refold.fold.operator import Operator, map_first

__all__ = ["TRANSPOSED", "TransposedKind"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def sees_every_tap(layer: nn.Module) -> bool:
    """Whether each output position sums over the whole kernel: no stride, and borders cropped away."""
    assert isinstance(layer, TRANSPOSED)
    # With a dilation, forward(x, output_size) could still put back positions that were cropped.
    plain = all(s == 1 for s in layer.stride) and all(d == 1 for d in layer.dilation)
    return plain and all(int(p) >= k - 1 for k, p in zip(layer.kernel_size, layer.padding, strict=True))


class TransposedKind:
    name = "transposed"
    returns_product = True
    map_input = staticmethod(map_first)
    #: ``forward(x, output_size)`` may choose another output padding at every call: the weight itself is mapped.
    run = None

    def refuses(self, layer: nn.Module) -> str | None:
        return None

    def is_plain(self, layer: nn.Module) -> bool:
        return any(type(layer).forward is base.forward for base in TRANSPOSED if isinstance(layer, base))

    def operator(self, layer: nn.Module) -> Operator:
        assert isinstance(layer, TRANSPOSED)
        return Operator(
            "weight",
            "bias",
            layer.in_channels,
            layer.out_channels,
            groups=layer.groups,
            channel_dim=-len(layer.kernel_size) - 1,
            kernel=tuple(layer.kernel_size),
            pads_zeros=not sees_every_tap(layer),
            transposed=True,
        )
