"""A weight map on some of a layer's output rows: the query and value parts of a joint projection, say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from refold.adapters.base import Call, WeightAdapter
from refold.maps import to_dense

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
        parts, shifts, changed, end = [], [], False, 0
        base = weight.new_zeros(len(weight)) if bias is None else bias
        for index, (start, stop) in enumerate(self.spans):
            rows = slice(start, stop)
            before = None if bias is None else bias[rows]
            block, shift = self._block(index).reparameterize(weight[rows], before)
            changed = changed or shift is not before
            parts += [weight[end:start], block]
            shifts += [base[end:start], base[rows] if shift is None else shift]
            end = stop
        return torch.cat([*parts, weight[end:]]), torch.cat([*shifts, base[end:]]) if changed else bias

    def branch(self, call: Call) -> Tensor:
        output, bias = call.output, call.bias
        added, weight = torch.zeros_like(output), to_dense(call.weight)  # a packed weight has no rows to take
        for index, (start, stop) in enumerate(self.spans):
            rows, width = slice(start, stop), stop - start
            part = output.narrow(self.channel_dim, start, width)
            beside = replace(call, output=part, weight=weight[rows], bias=None if bias is None else bias[rows])
            block = self._block(index).branch(beside)
            added.narrow(self.channel_dim, start, width).copy_(block)
        return added

    def extra_repr(self) -> str:
        return f"rows={self.spans}"
