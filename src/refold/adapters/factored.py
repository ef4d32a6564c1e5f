"""FacT's map: every slice of every weight is a small core between two factors that all layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.base import Call, WeightAdapter, autocast_input, widened
from refold.adapters.pointwise import mix

__all__ = ["Factored", "Factors"]


class Factors(nn.Module):
    """What the layers of one width share: U as ``down`` (r, d), V as ``up`` (d, r), and TK's ``core`` (r, r, r).

    ``up`` starts at zero, ``down`` as a Linear does, ``core`` (first index k, of the codes) Xavier-uniform.
    """

    core: nn.Parameter | None

    def __init__(
        self,
        width: int,
        rank: int,
        form: str,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, width, **factory))
        self.up = nn.Parameter(torch.zeros(width, rank, **factory))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        if form == "tk":
            self.core = nn.Parameter(torch.empty(rank, rank, rank, **factory))
            nn.init.xavier_uniform_(self.core)
        else:
            self.register_parameter("core", None)


class Factored(WeightAdapter):
    """``W + scale * V S_i U`` for every slice i of W, a square of the layer's narrower width d.

    The wider side is cut into slices of d; the last is cut short where d does not divide it, and every tap of a
    kernel is a slice of its own. ``codes`` is what the layer has for itself: S side by side, (rows r, columns r,
    *kernel), in form "tt"; in form "tk" P, (rows, columns, *kernel, r), with ``S_i = sum_k P_ik C_k``.

    ``factors`` is shared: a child of one adapter of each width, which the others refer to, see :meth:`tie`.

    Args:
        weight_shape: (out, in, *kernel).
        dropout: on the rank-r code behind S, in training only.
        channel_dim: position of the channels in the layer's output, from the end.
    """

    factors: Factors

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        form: str,
        scale: float,
        dropout: float,
        *,
        channel_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out, self.inside, *taps = weight_shape
        self.width = min(self.out, self.inside)
        self.slices = -(-self.out // self.width), -(-self.inside // self.width)
        self.rank, self.form, self.scale, self.dropout, self.channel_dim = rank, form, scale, dropout, channel_dim
        rows, columns = self.slices
        shape = (rows * rank, columns * rank, *taps) if form == "tt" else (rows, columns, *taps, rank)
        self.codes = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.codes, a=math.sqrt(5))

    @staticmethod
    def tie(adapters: Sequence[Factored]) -> Factors:
        """Fresh factors for adapters of one width; TK's codes of all of them start as one Xavier-uniform P (r, N)."""
        first = adapters[0]
        if first.form == "tk":
            slices = sum(adapter.codes[..., 0].numel() for adapter in adapters)
            bound = math.sqrt(6 / (first.rank + slices))
            for adapter in adapters:
                nn.init.uniform_(adapter.codes, -bound, bound)
        return Factors(first.width, first.rank, first.form, device=first.codes.device, dtype=first.codes.dtype)

    def _core(self, like: Tensor) -> Tensor:
        """Every S of the layer, as a weight (rows r, columns r, *kernel) from codes to codes."""
        codes, core = self.codes.to(like), self.factors.core
        if core is None:
            return codes
        return torch.einsum("ab...k,kij->aibj...", codes, core.to(like)).flatten(0, 1).flatten(1, 2)

    def delta(self, weight: Tensor) -> Tensor:
        """``scale * V S U``, slice by slice, in the shape and dtype of ``weight``."""
        up, down = self.scale * self.factors.up.to(weight), self.factors.down.to(weight)
        rows, columns = self.slices
        core = self._core(weight).unflatten(1, (columns, self.rank)).unflatten(0, (rows, self.rank))
        full = torch.einsum("op,apbq...,qi->aobi...", up, core, down).flatten(0, 1).flatten(1, 2)
        return full[: self.out, : self.inside]

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = widened(weight, self)
        return (wide + self.delta(wide)).to(weight.dtype), bias

    def branch(self, call: Call) -> Tensor:
        x, dim = autocast_input(call.x), self.channel_dim
        rows, columns = self.slices
        missing = columns * self.width - self.inside
        if missing:
            x = F.pad(x, (*[0, 0] * (-dim - 1), 0, missing))
        reduced = mix(x.unflatten(dim, (columns, self.width)), self.factors.down.to(x), dim).flatten(dim - 1, dim)
        codes = F.dropout(call.run(reduced, self._core(x)), self.dropout, self.training)
        up = self.scale * self.factors.up.to(codes)
        expanded = mix(codes.unflatten(dim, (rows, self.rank)), up, dim).flatten(dim - 1, dim)
        return expanded.narrow(dim, 0, self.out)

    def extra_repr(self) -> str:
        return f"{self.form}, slices={self.slices} of {self.width}, rank={self.rank}, scale={self.scale}"
