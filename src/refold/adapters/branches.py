"""Hydra's map: a low-rank branch beside the layer and one behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.base import Call, WeightAdapter, autocast_input, widened
from refold.adapters.pointwise import along, mix

__all__ = ["Branches"]


class _Branch(nn.Module):
    """``Up (Down x + a) + b``: Down (r, in, *kernel) Xavier-uniform, Up (out, r) and both biases zero."""

    def __init__(
        self,
        shape: tuple[int, ...],
        rank: int,
        shift: bool,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, *shape[1:], **factory))
        self.up = nn.Parameter(torch.zeros(shape[0], rank, **factory))
        self.down_bias = nn.Parameter(torch.zeros(rank, **factory)) if shift else None
        self.up_bias = nn.Parameter(torch.zeros(shape[0], **factory)) if shift else None
        nn.init.xavier_uniform_(self.down)

    def product(self, like: Tensor) -> Tensor:
        """``Up Down`` as (out, in, *kernel)."""
        return torch.einsum("or,r...->o...", self.up.to(like), self.down.to(like))

    def times(self, tensor: Tensor) -> Tensor:
        """``Up Down`` times the first dimension of ``tensor``."""
        code = torch.einsum("ri,i...->r...", self.down.to(tensor), tensor)
        return torch.einsum("or,r...->o...", self.up.to(tensor), code)

    def constant(self, like: Tensor) -> Tensor | None:
        """``Up a + b`` as (out,)."""
        if self.down_bias is None or self.up_bias is None:
            return None
        return self.up.to(like) @ self.down_bias.to(like) + self.up_bias.to(like)


class Branches(WeightAdapter):
    """``W + s (Up_p Down_p + Up_s Down_s W)``, ``b + s (c_p + c_s + Up_s Down_s b)`` with ``c = Up a + b'`` of each.

    The parallel branch (p) reads the layer's input by the layer's own geometry, the sequential one (s) its output.

    Args:
        weight_shape: (out, in, *kernel), not grouped.
        dropout: on the rank-r code of each branch, in training only.
        channel_dim: position of the channels in the layer's output, from the end.
        shift: False leaves out the branches' biases, for hosts that have no place for them.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        scale: float,
        dropout: float,
        *,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout, self.channel_dim = rank, scale, dropout, channel_dim
        out = weight_shape[0]
        self.parallel = _Branch(weight_shape, rank, shift, device, dtype)
        self.sequential = _Branch((out, out), rank, shift, device, dtype)

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide, behind = widened(weight, self), self.sequential
        moved = (wide + self.scale * (self.parallel.product(wide) + behind.times(wide))).to(weight.dtype)
        constants = self.parallel.constant(wide), behind.constant(wide)
        if constants[0] is None or constants[1] is None:
            return moved, bias
        shift = constants[0] + constants[1]
        if bias is None:
            return moved, (self.scale * shift).to(weight.dtype)
        return moved, (bias + self.scale * (shift + behind.times(bias.to(wide)))).to(weight.dtype)

    def branch(self, call: Call) -> Tensor:
        x, dim = autocast_input(call.x), self.channel_dim
        output = call.output.to(x.dtype)
        parallel = self._expand(self.parallel, call.run(x, self.parallel.down.to(x)))
        return parallel + self._expand(self.sequential, mix(output, self.sequential.down.to(x), dim))

    def _expand(self, part: _Branch, code: Tensor) -> Tensor:
        dim = self.channel_dim
        if part.down_bias is not None:
            code = code + along(part.down_bias.to(code), dim)
        code = F.dropout(code, self.dropout, self.training)
        expanded = mix(code, self.scale * part.up.to(code), dim)
        return expanded if part.up_bias is None else expanded + along(self.scale * part.up_bias.to(code), dim)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale}, dropout={self.dropout}"
