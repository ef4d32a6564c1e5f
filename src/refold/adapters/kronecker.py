"""KronA's maps: a Kronecker product added to a weight, and the block of one with a learned residual."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from refold.adapters.base import Call, ChannelAdapter, WeightAdapter, autocast_input, widened
from refold.adapters.pointwise import mix
from refold.maps import ChannelMap, to_float64

__all__ = ["Kronecker", "KroneckerBlock", "side"]


def side(width: int, limit: int | None) -> int:
    """The largest divisor of ``width`` that is no larger than ``limit``, None for its square root."""
    limit = math.isqrt(width) if limit is None else limit
    return max(n for n in range(1, min(limit, width) + 1) if width % n == 0)


def _spread(x: Tensor, left: Tensor, dim: int) -> Tensor:
    """The channels at ``dim`` as (a2, b2), with ``left`` (a1, a2) applied to the first of the two: (..., a1, b2)."""
    return mix(x.unflatten(dim, (left.shape[1], -1)), left, dim - 1)


class Kronecker(WeightAdapter):
    """``W + scale * A (x) B`` for a weight (out, in, *kernel): A (a1, a2) dense, B (out / a1, in / a2, *kernel).

    For a convolution B keeps the layer's kernel and geometry. ``left`` is A, Kaiming-uniform with a = sqrt(5),
    ``right`` is B, zero.

    Args:
        size: rows and columns of A at most; the largest divisors of out and in, None for those of the square roots.
        channel_dim: position of the channels in the layer's output, from the end.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        size: int | None,
        scale: float,
        *,
        channel_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.channel_dim = scale, channel_dim
        out, inside, *kernel = weight_shape
        rows, columns = side(out, size), side(inside, size)
        factory = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(rows, columns, **factory))
        self.right = nn.Parameter(torch.zeros(out // rows, inside // columns, *kernel, **factory))
        nn.init.kaiming_uniform_(self.left, a=math.sqrt(5))

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = widened(weight, self)
        product = torch.einsum("ab,ij...->aibj...", self.left.to(wide), self.right.to(wide))
        return (wide + self.scale * product.reshape(weight.shape)).to(weight.dtype), bias

    def branch(self, call: Call) -> Tensor:
        x, dim = autocast_input(call.x), self.channel_dim
        spread = _spread(x, self.scale * self.left.to(x), dim)
        lead = spread.shape[:dim]  # the a1 parts go through B side by side, as a batch
        parts = call.run(spread.flatten(0, dim - 1), self.right.to(x))
        return parts.unflatten(0, lead).flatten(dim - 1, dim)

    def extra_repr(self) -> str:
        return f"{tuple(self.left.shape)} x {tuple(self.right.shape)}, scale={self.scale}"


class KroneckerBlock(ChannelAdapter):
    """``rho x + scale * (A (x) B) x`` along the channels; rho, one learned number, is 1 at the start and B zero.

    Args:
        width: channels d.
        size: side of A at most, as in :class:`Kronecker`.
        channel_dim: position of the channels in the activation, from the end.
    """

    def __init__(
        self,
        width: int,
        size: int | None,
        scale: float,
        *,
        channel_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.channel_dim = scale, channel_dim
        a = side(width, size)
        factory = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(a, a, **factory))
        self.right = nn.Parameter(torch.zeros(width // a, width // a, **factory))
        self.residual = nn.Parameter(torch.ones(1, **factory))
        nn.init.kaiming_uniform_(self.left, a=math.sqrt(5))

    def forward(self, x: Tensor, *, with_shift: bool = True) -> Tensor:
        x, dim = autocast_input(x), self.channel_dim
        spread = _spread(x, self.scale * self.left.to(x), dim)
        return self.residual.to(x) * x + mix(spread, self.right.to(x), dim).flatten(dim - 1, dim)

    def shift(self) -> Tensor | None:
        return None

    def channel_map(self, cast: Callable[[Tensor], Tensor] = to_float64) -> ChannelMap:
        left, right, residual = cast(self.left), cast(self.right), cast(self.residual)
        eye = torch.eye(len(left) * len(right), dtype=left.dtype, device=left.device)
        return ChannelMap.dense(residual * eye + self.scale * torch.kron(left, right))

    def extra_repr(self) -> str:
        return f"{tuple(self.left.shape)} x {tuple(self.right.shape)}, scale={self.scale}"
