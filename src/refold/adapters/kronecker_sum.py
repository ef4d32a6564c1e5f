"""KAdaptation's map: a sum of Kronecker products of rank-one matrices, the left ones shared by the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from refold.adapters.base import Call, WeightAdapter, autocast_input, widened
from refold.adapters.pointwise import along, mix

__all__ = ["KroneckerSum", "SharedBias", "SlowWeights"]


class SlowWeights(nn.Module):
    """The n matrices ``A_i = u_i v_i^T`` (n, n) of all layers: rows of ``u`` and ``v`` (n, n), uniform in +-0.01."""

    def __init__(self, terms: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(terms, terms, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(terms, terms, device=device, dtype=dtype))
        nn.init.uniform_(self.u, -0.01, 0.01)
        nn.init.uniform_(self.v, -0.01, 0.01)


class SharedBias(nn.Module):
    """One vector (out,) that is added to the query's and to the value's bias; zero at the start."""

    def __init__(self, width: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))


class KroneckerSum(WeightAdapter):
    """``W + scale * sum_i (u_i v_i^T) (x) (p_i q_i^T)``, ``b + c``, for a weight (out, in, *kernel).

    A Kronecker product of matrices of rank one is one itself, ``(u_i (x) p_i) (v_i (x) q_i)^T``: the n terms act as one
    product of (out, n) and (n, in). For a convolution q keeps the kernel and with it the layer's geometry. ``p`` is
    (n, out / n), Xavier-uniform; ``q`` (n, in / n, *kernel), zero.

    ``slow`` and ``constant`` are shared: children of one adapter, which others refer to, see
    :func:`refold.methods.weight.share`.

    Args:
        terms: n at most; the largest divisor of out and in is taken.
        group: adapters of one group have their ``slow`` weights in common.
        place: adapters of one place have their bias in common.
        channel_dim: position of the channels in the layer's output, from the end.
        shift: False leaves out c, for hosts that have no place for it.
    """

    slow: SlowWeights
    constant: SharedBias

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        terms: int,
        scale: float,
        *,
        group: str,
        place: str,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.channel_dim, self.shift = scale, channel_dim, shift
        self.out, inside, *kernel = weight_shape
        self.terms = math.gcd(terms, self.out, inside)
        self.group, self.place = (group, self.terms), (place, self.out)
        factory = {"device": device, "dtype": dtype}
        self.p = nn.Parameter(torch.empty(self.terms, self.out // self.terms, **factory))
        self.q = nn.Parameter(torch.zeros(self.terms, inside // self.terms, *kernel, **factory))
        nn.init.xavier_uniform_(self.p)

    @staticmethod
    def slow_weights(adapters: Sequence[KroneckerSum]) -> SlowWeights:
        """Fresh ones for adapters of one group."""
        first = adapters[0]
        return SlowWeights(first.terms, device=first.p.device, dtype=first.p.dtype)

    @staticmethod
    def shared_bias(adapters: Sequence[KroneckerSum]) -> SharedBias:
        """A fresh one for adapters of one place."""
        first = adapters[0]
        return SharedBias(first.out, device=first.p.device, dtype=first.p.dtype)

    def _up(self, like: Tensor) -> Tensor:
        """Columns ``u_i (x) p_i``: (out, n)."""
        return torch.einsum("na,nb->abn", self.slow.u.to(like), self.p.to(like)).flatten(0, 1)

    def _down(self, like: Tensor) -> Tensor:
        """Rows ``v_i (x) q_i``: (n, in, *kernel)."""
        return torch.einsum("na,nb...->nab...", self.slow.v.to(like), self.q.to(like)).flatten(1, 2)

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = widened(weight, self)
        change = torch.einsum("on,n...->o...", self.scale * self._up(wide), self._down(wide))
        moved = (wide + change).to(weight.dtype)
        if not self.shift:
            return moved, bias
        constant = self.constant.value.to(weight)
        return moved, constant if bias is None else bias + constant

    def branch(self, call: Call) -> Tensor:
        x = autocast_input(call.x)
        added = mix(call.run(x, self._down(x)), self.scale * self._up(x), self.channel_dim)
        return added + along(self.constant.value.to(x), self.channel_dim) if self.shift else added

    def extra_repr(self) -> str:
        return f"terms={self.terms}, p={tuple(self.p.shape)}, q={tuple(self.q.shape)}, scale={self.scale}"
