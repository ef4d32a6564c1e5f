"""A linear bottleneck beside a layer, from what it reads to what it gives: LoRA's map with biases and groups."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refold.adapters.base import Call
from refold.adapters.lowrank import LowRank
from refold.adapters.pointwise import along

__all__ = ["BesideBottleneck"]


class BesideBottleneck(LowRank):
    """``W' = W + s Up Down`` and ``b' = b + s (Up a + c)``, Up block-diagonal over ``groups``.

    ``down`` is Xavier-uniform, everything else zero. ``up`` is (out, rank / groups).

    Args:
        groups: divides the layer's outputs and ``rank``.
        shift: False leaves out a and c, for layers that have no place for them.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        groups: int,
        scale: float,
        dropout: float,
        *,
        channel_dim: int,
        shift: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(weight_shape, rank, scale, dropout, channel_dim=channel_dim, **factory)
        self.groups = groups
        self.up = nn.Parameter(torch.zeros(weight_shape[0], rank // groups, **factory))
        self.down_bias = nn.Parameter(torch.zeros(rank, **factory)) if shift else None
        self.up_bias = nn.Parameter(torch.zeros(weight_shape[0], **factory)) if shift else None
        nn.init.xavier_uniform_(self.down)

    def _dense_up(self) -> Tensor:
        return torch.block_diag(*self.up.chunk(self.groups))

    def _constant(self) -> Tensor | None:
        if self.down_bias is None or self.up_bias is None:
            return None
        return self.scale * (self._dense_up() @ self.down_bias + self.up_bias)

    def delta(self, weight: Tensor) -> Tensor:
        up, down = self._dense_up().to(weight), self.down.to(weight)
        return ((self.scale * up) @ down.flatten(1)).view(weight.shape)

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        constant = self._constant()
        if constant is not None:
            bias = constant.to(weight) if bias is None else bias + constant.to(bias)
        return weight + self.delta(weight), bias

    def branch(self, call: Call) -> Tensor:
        added, constant = self.expand(self.reduce(call), self._dense_up()), self._constant()
        return added if constant is None else added + along(constant, self.channel_dim).to(added.dtype)
