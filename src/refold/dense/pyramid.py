"""The simple feature pyramid of ViTDet, "Exploring Plain Vision Transformer Backbones for Object Detection"
(arXiv 2203.16527): maps of strides 4, 8, 16 and 32 from the last map of a plain ViT.

    stride 4: two transposed convolutions 2x2, a norm and GELU between them;  8: one;  16: as it is;  32: max pooling;
    each then through a 1x1 and a 3x3 convolution, with a norm after each.

Difference: a map that is no stride-16 map with an even number of rows and columns (a ViT/14's) is first resampled to
the nearest such size, so that every level is exactly twice the next, whatever the patch size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from refold.dense.stages import PYRAMID
from refold.errors import BackboneError

__all__ = ["SimplePyramid"]


class SimplePyramid(nn.Module):
    """Maps of one stride -> a pyramid of strides 4, 8, 16 and 32, from the last of them. Trainable, never merged.

    Args:
        channels, strides: of an encoder whose maps have one stride.
        out_channels: of every level.

    Attributes:
        channels, strides: of the four levels.

    Raises:
        BackboneError: the strides differ.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], out_channels: int = 256) -> None:
        from timm.layers.norm import LayerNorm2d

        super().__init__()
        if len(set(strides)) != 1:
            raise BackboneError(
                f"maps of strides {tuple(strides)} are a pyramid already",
                where="SimplePyramid",
                remedy="Use it on a plain ViT",
            )
        self.channels = (out_channels,) * len(PYRAMID)
        self.strides = PYRAMID
        self._stride = strides[-1]
        width = channels[-1]
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        scaled: list[tuple[nn.Module, int]] = [
            (
                nn.Sequential(
                    nn.ConvTranspose2d(width, half, 2, stride=2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ),
                quarter,
            ),
            (nn.ConvTranspose2d(width, half, 2, stride=2), half),
            (nn.Identity(), width),
            (nn.MaxPool2d(2), width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(size, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for scale, size in scaled
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, h, w), of which the last counts -> four of (B, out_channels, 4h', 4w') to (h'/2, w'/2)."""
        x = maps[-1]
        middle, coarse = self.strides[-2], self.strides[-1]
        # In pixels of stride 16; even, so that the pooled level is exactly half of it.
        size = [coarse // middle * max(1, round(side * self._stride / coarse)) for side in x.shape[-2:]]
        if size != list(x.shape[-2:]):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)
        return [level(x) for level in self.levels]
