"""A weight map on some of a layer's output rows: the query and value parts of a joint projection, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from refold.adapters.base import WeightAdapter

__all__ = ["RowBlocks"]


class RowBlocks(WeightAdapter):
    """One weight adapter for each block of output rows; the other rows of weight and bias stay as they are.

    Args:
        blocks: first row, last row + 1 and adapter of each block, in ascending order without overlap.
        channel_dim: position of the channels in the layer's output, from the end.
    """

    def __init__(self, blocks: Sequence[tuple[int, int, WeightAdapter]], *, channel_dim: int) -> None:
        super().__init__()
        self.spans = tuple((start, stop) for start, stop, _ in blocks)
        self.channel_dim = channel_dim
        self.blocks = nn.ModuleList(adapter for _, _, adapter in blocks)

    def _block(self, index: int) -> WeightAdapter:
        adapter = self.blocks[index]
        assert isinstance(adapter, WeightAdapter)
        return adapter

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        parts, moved, end = [], [], 0
        for index, (start, stop) in enumerate(self.spans):
            rows = slice(start, stop)
            block, shift = self._block(index).reparameterize(weight[rows], None if bias is None else bias[rows])
            parts += [weight[end:start], block]
            moved += [] if bias is None or shift is None else [bias[end:start], shift]
            end = stop
        new_bias = bias if bias is None or not moved else torch.cat([*moved, bias[end:]])
        return torch.cat([*parts, weight[end:]]), new_bias

    def branch(
        self,
        x: Tensor,
        run: Callable[[Tensor, Tensor], Tensor],
        output: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        added = torch.zeros_like(output)
        for index, (start, stop) in enumerate(self.spans):
            rows, width = slice(start, stop), stop - start
            part = output.narrow(self.channel_dim, start, width)
            block = self._block(index).branch(x, run, part, weight[rows], None if bias is None else bias[rows])
            added.narrow(self.channel_dim, start, width).copy_(block)
        return added

    def extra_repr(self) -> str:
        return f"rows={self.spans}"
