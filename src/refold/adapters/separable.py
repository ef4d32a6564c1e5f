"""Conv-Adapter's map: a convolution within groups of channels, an activation, a pointwise convolution, and a scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.base import Call, WeightAdapter, autocast_input, widened
from refold.adapters.convbottleneck import spatially
from refold.adapters.nonlinear import ACTIVATIONS
from refold.adapters.pointwise import along, mix
from refold.adapters.side import Layout, SideAdapter
from refold.sites import Geometry

__all__ = ["SeparableConv", "SeparableKernel"]

#: Standard deviation of the weights at the start.
_START = 0.02


class SeparableConv(SideAdapter):
    """``gamma * (Up act(Down x + a) + b)``: Down convolves ``hidden`` groups of channels to one each, Up is pointwise.

    Weights start as a truncated normal of std 0.02, biases at zero, gamma, a number for each channel, at one.
    Each token before those of the grid is convolved alone, as an image of one pixel.

    Args:
        geometry: of Down, and the channels in and out.
        hidden: groups; must divide the channels in.
    """

    def __init__(
        self,
        geometry: Geometry,
        hidden: int,
        activation: str = "relu",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.down = nn.Conv2d(
            geometry.in_width,
            hidden,
            geometry.kernel,
            geometry.stride,
            geometry.padding or 0,
            geometry.dilation,
            groups=hidden,
            padding_mode=geometry.mode,
            device=device,
            dtype=dtype,
        )
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Conv2d(hidden, geometry.out_width, 1, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.ones(geometry.out_width, device=device, dtype=dtype))
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=_START)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        return layout.unlast(spatially(self._convolve, layout.last(x), layout))

    def _convolve(self, maps: Tensor) -> Tensor:
        if self.geometry.padding is None:
            maps = self._surrounded(maps)
        added = self.up(self.activation(self.down(maps)))
        return along(self.gamma.to(added.dtype), -3) * added

    def _surrounded(self, maps: Tensor) -> Tensor:
        """With as much around the maps as keeps size / stride, the smaller half in front."""
        form, pads = self.geometry, []
        for axis in (1, 0):  # F.pad begins with the last dimension
            size, step, span = maps.shape[2 + axis], form.stride[axis], form.dilation[axis] * (form.kernel[axis] - 1)
            missing = max((-(-size // step) - 1) * step + span + 1 - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.pad(maps, pads, mode="constant" if form.mode == "zeros" else form.mode)


class SeparableKernel(WeightAdapter):
    """:class:`SeparableConv` without activation, beside a dense convolution whose geometry it takes over.

    ``W + gamma Up Down`` and ``b + gamma (Up a + c)``, a and c the biases of Down and Up.

    Args:
        weight_shape: (out, in, *kernel), not grouped.
        hidden: groups of input channels; must divide them.
        channel_dim: position of the channels in the layer's output, from the end.
        shift: False leaves out both biases, for hosts that have no place for them.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        hidden: int,
        *,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out, inside, *kernel = weight_shape
        self.hidden, self.channel_dim = hidden, channel_dim
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(hidden, inside // hidden, *kernel, **factory))
        self.up = nn.Parameter(torch.empty(out, hidden, **factory))
        self.down_bias = nn.Parameter(torch.zeros(hidden, **factory)) if shift else None
        self.up_bias = nn.Parameter(torch.zeros(out, **factory)) if shift else None
        self.gamma = nn.Parameter(torch.ones(out, **factory))
        for weight in (self.down, self.up):
            nn.init.trunc_normal_(weight, std=_START)

    def _dense(self, like: Tensor) -> Tensor:
        """Down as (hidden, in, *kernel), zero outside its groups."""
        eye = torch.eye(self.hidden, dtype=like.dtype, device=like.device)
        return torch.einsum("hg,gi...->hgi...", eye, self.down.to(like)).flatten(1, 2)

    def _out(self, like: Tensor) -> Tensor:
        """``gamma Up`` as (out, hidden)."""
        return (self.gamma[:, None] * self.up).to(like)

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = widened(weight, self)
        up, down = self._out(wide), self.down.to(wide)
        moved = (wide + torch.einsum("og,gi...->ogi...", up, down).flatten(1, 2)).to(weight.dtype)
        if self.down_bias is None or self.up_bias is None:
            return moved, bias
        shift = up @ self.down_bias.to(wide) + (self.gamma * self.up_bias).to(wide)
        return moved, (shift if bias is None else bias + shift).to(weight.dtype)

    def branch(self, call: Call) -> Tensor:
        x, dim = autocast_input(call.x), self.channel_dim
        hidden = call.run(x, self._dense(x))
        if self.down_bias is None or self.up_bias is None:
            return mix(hidden, self._out(hidden), dim)
        added = mix(hidden + along(self.down_bias.to(hidden), dim), self._out(hidden), dim)
        return added + along((self.gamma * self.up_bias).to(added), dim)

    def extra_repr(self) -> str:
        return f"{tuple(self.down.shape)} -> {self.up.shape[0]}"
