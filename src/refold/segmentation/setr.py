"""SETR, "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers" (arXiv
2012.15840): decoders of a plain ViT's maps z1 to z4, all of one stride.

    naive   two layers on the last map (1x1 convolution with norm and ReLU, 1x1 to the classes), enlarged at once
    pup     four times a 3x3 convolution with norm and ReLU, then twice as large; 1x1 to the classes
    mla     a 1x1 convolution on each map; sums from the last map to the first; three 3x3 convolutions on each sum,
            the last halves the channels; four times as large; all together 1x1 to the classes

Auxiliary heads, in training only, are the two layers of ``naive``: on z1 to z3 for naive, on all four for pup and mla.

Differences: the paper's maps for naive and pup are those of blocks 10, 15, 20 and 24 of 24, ours those at the ends of
the four quarters (as the paper's for mla); ``load_encoder(..., stages=(9, 14, 19, 23))`` gives the paper's. Widths are
those of the released code (256, after the halving 128). Every map first gets a layer norm, as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Mla", "Naive", "Pup"]


class Naive(nn.Module):
    """SETR-Naive: maps (B, C_k, h, w) -> logits (B, classes, h, w), and in training those of the auxiliary heads.

    Args:
        channels: of the maps.
        classes: K.
        width: of the layer before the logits.
    """

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.main = _two_layers(channels[-1], classes, width)
        self.auxiliary = nn.ModuleList(_two_layers(c, classes, width) for c in channels[:-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.main(maps[-1]), *_auxiliary(self, self.auxiliary, maps)]


class Pup(nn.Module):
    """SETR-PUP: logits at 16 times the maps' size, arguments as for :class:`Naive`."""

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        self.norm = _norm(channels[-1])
        self.steps = nn.ModuleList(_layer(channels[-1] if k == 0 else width, width, 3) for k in range(4))
        self.main = nn.Conv2d(width, classes, 1)
        self.auxiliary = nn.ModuleList(_two_layers(c, classes, width) for c in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x = self.norm(maps[-1])
        for step in self.steps:
            x = _enlarge(step(x), 2)
        return [self.main(x), *_auxiliary(self, self.auxiliary, maps)]


class Mla(nn.Module):
    """SETR-MLA: logits at 4 times the maps' size, arguments as for :class:`Naive`."""

    def __init__(self, channels: Sequence[int], classes: int, width: int) -> None:
        super().__init__()
        half = max(width // 2, 1)
        self.reduce = nn.ModuleList(nn.Sequential(_norm(c), _layer(c, width, 1)) for c in channels)
        self.streams = nn.ModuleList(
            nn.Sequential(_layer(width, width, 3), _layer(width, width, 3), _layer(width, half, 3)) for _ in channels
        )
        self.main = nn.Conv2d(half * len(channels), classes, 1)
        self.auxiliary = nn.ModuleList(_two_layers(c, classes, width) for c in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        reduced = [reduce(m) for reduce, m in zip(self.reduce, maps, strict=True)]
        for k in reversed(range(len(reduced) - 1)):
            reduced[k] = reduced[k] + reduced[k + 1]
        streams = [_enlarge(stream(x), 4) for stream, x in zip(self.streams, reduced, strict=True)]
        return [self.main(torch.cat(streams, dim=1)), *_auxiliary(self, self.auxiliary, maps)]


def _auxiliary(owner: nn.Module, heads: nn.ModuleList, maps: Sequence[Tensor]) -> list[Tensor]:
    if not owner.training:
        return []
    return [head(m) for head, m in zip(heads, maps, strict=False)]


def _two_layers(channels: int, classes: int, width: int) -> nn.Sequential:
    return nn.Sequential(_norm(channels), _layer(channels, width, 1), nn.Conv2d(width, classes, 1))


def _layer(channels: int, width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())


def _norm(channels: int) -> nn.Module:
    from timm.layers.norm import LayerNorm2d

    return LayerNorm2d(channels)


def _enlarge(x: Tensor, factor: int) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
