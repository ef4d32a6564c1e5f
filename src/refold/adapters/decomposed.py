"""DoRA's map of a weight: a low-rank change of its direction, and a magnitude for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refold.adapters.base import Call, widened
from refold.adapters.lowrank import LowRank

__all__ = ["Decomposed"]


class Decomposed(LowRank):
    """``W' = m (W + s Up Down) / ||W + s Up Down||`` with ``m = magnitude * ||W||``, norms per output channel.

    ``magnitude`` is (out,), ones at the start; the rest is :class:`LowRank`'s. A channel whose frozen weight is zero
    stays zero: it has no direction to change.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        scale: float,
        dropout: float,
        *,
        channel_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight_shape, rank, scale, dropout, channel_dim=channel_dim, device=device, dtype=dtype)
        self.magnitude = nn.Parameter(torch.ones(weight_shape[0], device=device, dtype=dtype))

    def _factor(self, weight: Tensor) -> Tensor:
        """What W + s Up Down is multiplied with, (out,), for a weight no less precise than the adapter."""
        with torch.no_grad():  # a constant in the gradient, section 4.3 of the paper
            before = weight.flatten(1).norm(dim=1)
            after = (weight + self.delta(weight)).flatten(1).norm(dim=1)
            ratio = torch.where(before > 0, before / after, before)
        return self.magnitude.to(weight.dtype) * ratio

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = widened(weight, self)
        factor = self._factor(wide).view(-1, *[1] * (weight.dim() - 1))
        return (factor * (wide + self.delta(wide))).to(weight.dtype), bias

    def branch(self, call: Call) -> Tensor:
        factor, output, bias = self._factor(widened(call.weight, self)), call.output, call.bias
        shape = (-1, *[1] * (-self.channel_dim - 1))
        frozen = output if bias is None else output - bias.to(output.dtype).view(shape)
        moved = (factor - 1).to(output.dtype).view(shape) * frozen
        return moved + self.expand(self.reduce(call), factor.to(self.up.dtype)[:, None] * self.up)
