"""The two maps every mergeable adapter reduces to, and their algebra.

A :class:`ChannelMap` acts on activations, ``y = M x + c``; a :class:`WeightMap` acts on a layer's own
weight and bias, ``(W, b) -> (W', b')``. Folding never needs to know which method made the map, and a
method never needs to know which layer receives it.

Composition runs in float64: the rounding of a float32 product is of the order of the adapters themselves
once a few of them are chained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ChannelMap", "WeightMap", "is_quantized", "to_dense", "to_float64"]

#: Types of quantized weights, by where they are defined: neither package need be there.
_QUANTIZED = frozenset(
    {
        "torchao.utils.TorchAOBaseTensor",
        "bitsandbytes.nn.modules.Int8Params",
        "bitsandbytes.nn.modules.Params4bit",
    }
)


def is_quantized(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a quantized weight of torchao or bitsandbytes."""
    if type(tensor) in (Tensor, torch.nn.Parameter):  # most are: torch.compile cannot follow what comes below
        return False
    return any(f"{cls.__module__}.{cls.__qualname__}" in _QUANTIZED for cls in type(tensor).__mro__)


def to_dense(tensor: Tensor) -> Tensor:
    """The floating numbers a quantized weight stands for; any other tensor, or one nothing can read, as it is."""
    if not is_quantized(tensor) or not tensor.is_floating_point():
        return tensor
    return tensor.dequantize()


def to_float64(tensor: Tensor) -> Tensor:
    """``tensor`` detached and in float64, on the CPU where the device has no float64 (Apple's MPS)."""
    device = "cpu" if tensor.device.type == "mps" else tensor.device
    return tensor.detach().to(device=device, dtype=torch.float64)


class WeightMap(Protocol):
    """``(W, b) -> (W', b')`` in the layer's own layout; must be differentiable and work in any float dtype."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class ChannelMap:
    """``y = (diag(scale) + up @ down) x + shift`` over ``d`` channels.

    Attributes:
        scale: (d,) diagonal.
        up: (d, r) or None, the left factor of the low-rank part.
        down: (r, d) or None, the right factor.
        shift: (d,) or None.
        groups: number of equal diagonal blocks that M respects *whatever its values are*: 1 for a dense map,
            ``d`` for a per-channel one. Promised by the adapter's structure, because a test of the values
            would call every freshly initialised map diagonal.
    """

    scale: Tensor
    up: Tensor | None = None
    down: Tensor | None = None
    shift: Tensor | None = None
    groups: int = 1

    @classmethod
    def identity(cls, width: int, *, dtype: torch.dtype = torch.float64) -> ChannelMap:
        return cls(scale=torch.ones(width, dtype=dtype), groups=width)

    @classmethod
    def dense(cls, matrix: Tensor, shift: Tensor | None = None, groups: int = 1) -> ChannelMap:
        """From a full (d, d) matrix, block-diagonal with ``groups`` blocks."""
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return cls(scale=torch.zeros_like(matrix[0]), up=matrix, down=eye, shift=shift, groups=groups)

    @property
    def width(self) -> int:
        return self.scale.shape[0]

    def matrix(self) -> Tensor:
        """M as a (d, d) tensor."""
        full = torch.diag(self.scale)
        return full if self.up is None or self.down is None else full + self.up @ self.down

    def apply(self, x: Tensor, dim: int = -1) -> Tensor:
        """``M x + c`` along the channel dimension ``dim`` of ``x``."""
        y = x.movedim(dim, -1) @ self.matrix().T
        if self.shift is not None:
            y = y + self.shift
        return y.movedim(-1, dim)

    def then(self, after: ChannelMap) -> ChannelMap:
        """The map that applies ``self`` first and ``after`` second, still in structured form."""
        ups, downs = [], []
        if self.up is not None and self.down is not None:
            ups.append(after.scale[:, None] * self.up)
            downs.append(self.down)
        if after.up is not None and after.down is not None:
            pulled = after.down * self.scale
            if self.up is not None and self.down is not None:
                pulled = pulled + (after.down @ self.up) @ self.down
            ups.append(after.up)
            downs.append(pulled)
        shift = after.shift
        if self.shift is not None:
            moved = after.matrix() @ self.shift
            shift = moved if shift is None else moved + shift
        return ChannelMap(
            scale=self.scale * after.scale,
            up=torch.cat(ups, dim=1) if ups else None,
            down=torch.cat(downs, dim=0) if downs else None,
            shift=shift,
            groups=math.gcd(self.groups, after.groups),
        )

    def solve(self, vector: Tensor) -> Tensor:
        """``M^-1 vector``, (d,) -> (d,); raises ``torch.linalg.LinAlgError`` where M is singular."""
        return torch.linalg.solve(self.matrix(), vector)

    def before(self, weight: Tensor, groups: int = 1) -> Tensor:
        """``W M``: the weight that, applied to x, gives what ``weight`` gives applied to ``M x``.

        Args:
            weight: (out, in / groups, *kernel), the layout of Linear and of convolutions.
            groups: the layer's groups; must divide ``self.groups`` so that the result has the same layout.
        """
        flat = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        if groups == 1:
            scaled = flat * self.scale[:, None]
            if self.up is not None and self.down is not None:
                scaled = scaled + torch.einsum("oik,ir,rj->ojk", flat, self.up, self.down)
            return scaled.reshape(weight.shape)
        grouped = flat.unflatten(0, (groups, -1))
        folded = torch.einsum("goik,gij->gojk", grouped, self.blocks(groups))
        return folded.reshape(weight.shape)

    def after(self, weight: Tensor, groups: int = 1) -> Tensor:
        """``M W``: the weight whose output is ``M`` times the output of ``weight``.

        Args:
            weight: (out, ...) with the output channels first; a norm's (d,) weight included.
            groups: the layer's groups; must divide ``self.groups`` (a norm counts as ``d`` groups).
        """
        flat = weight.reshape(weight.shape[0], -1)
        if groups == self.width:
            return (flat * self.blocks(groups).reshape(-1, 1)).reshape(weight.shape)
        grouped = flat.unflatten(0, (groups, -1))
        return torch.einsum("gij,gjk->gik", self.blocks(groups), grouped).reshape(weight.shape)

    def blocks(self, groups: int) -> Tensor:
        """The diagonal blocks of M as (groups, d / groups, d / groups)."""
        if self.groups % groups:
            raise ValueError(f"a map of {self.groups} blocks is not block-diagonal over {groups} groups")
        size = self.width // groups
        if self.up is None or self.down is None:
            return torch.diag_embed(self.scale.view(groups, size))
        low_rank = self.up.view(groups, size, -1) @ self.down.view(-1, groups, size).transpose(0, 1)
        return low_rank + torch.diag_embed(self.scale.view(groups, size))
