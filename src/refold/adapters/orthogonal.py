"""OFT's map: a rotation within each block of channels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from refold.adapters.base import ChannelAdapter, autocast_input
from refold.maps import ChannelMap, to_float64

__all__ = ["BlockRotation"]


class BlockRotation(ChannelAdapter):
    """``R x`` with R block-diagonal, each block the Cayley transform ``(I + Q)(I - Q)^-1`` of a skew-symmetric Q.

    Only the entries above Q's diagonal are stored, zero at the start: the identity.

    Args:
        width: channels d.
        block: channels of a block; must divide ``width``.
        channel_dim: position of the channels in the activation, from the end.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        width: int,
        block: int,
        *,
        channel_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.block, self.channel_dim = width, block, channel_dim
        self.skew = nn.Parameter(torch.zeros(width // block, block * (block - 1) // 2, device=device, dtype=dtype))
        rows, columns = torch.triu_indices(block, block, 1, device=device)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def _rotations(self, skew: Tensor) -> Tensor:
        """(blocks, block, block)."""
        upper = skew.new_zeros(len(skew), self.block, self.block)
        upper[:, self.rows, self.columns] = skew
        q = upper - upper.mT
        eye = torch.eye(self.block, dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(eye - q, eye + q)  # the two factors commute

    def forward(self, x: Tensor, *, with_shift: bool = True) -> Tensor:
        x, kind = autocast_input(x), x.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            # Solving has no kernel below single precision.
            precise = torch.promote_types(self.skew.dtype, torch.float32)
            rotations = self._rotations(self.skew.to(precise)).to(x.dtype)
        if self.channel_dim == -1:
            blocks = x.unflatten(-1, (-1, self.block))
            return torch.einsum("gij,...gj->...gi", rotations, blocks).flatten(-2)
        maps = x.flatten(self.channel_dim + 1).unflatten(-2, (-1, self.block))
        return (rotations @ maps).view(x.shape)

    def shift(self) -> Tensor | None:
        return None

    def channel_map(self, cast: Callable[[Tensor], Tensor] = to_float64) -> ChannelMap:
        rotations = self._rotations(cast(self.skew))
        return ChannelMap.dense(torch.block_diag(*rotations), groups=len(rotations))

    def extra_repr(self) -> str:
        return f"{self.width}, block={self.block}"
