"""A matrix times the channels of an activation, wherever these are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["along", "mix"]


def mix(x: Tensor, matrix: Tensor, channel_dim: int) -> Tensor:
    """``matrix`` (o, i) times the i channels of ``x`` at ``channel_dim``, counted from the end."""
    if channel_dim == -1:
        return F.linear(x, matrix)
    maps = x.flatten(channel_dim + 1)
    return (matrix @ maps).view(*x.shape[:channel_dim], len(matrix), *x.shape[channel_dim + 1 :])


def along(vector: Tensor, channel_dim: int) -> Tensor:
    """A value per channel (d,), shaped to meet activations whose channels are at ``channel_dim``."""
    return vector.view(-1, *[1] * (-channel_dim - 1))
