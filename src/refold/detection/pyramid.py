"""What torchvision's detectors need around an encoder: a feature pyramid, and anchors and box codes that are exact.

torchvision infers the strides from the sizes of images and maps. Of a level that reaches over the padded image (the
coarsest) the anchors come too close together, and RoI pooling, which looks at the sizes before padding and remembers
what it inferred first, is wrong by a factor of two after a batch of images of 40 pixels. Here strides are given.

Under autocast torchvision computes boxes in the dtype of the head's output. bfloat16 has 8 bits: at 800 pixels boxes
would move by up to 2. Here anchors and decoded boxes are float32 always. So are the two coarsest levels of one-stage
detectors: a convolution of stride 2 over a map of one pixel has a wrong gradient in bfloat16 on CPUs with AMX, numbers
from memory that nobody wrote (seen with torch 2.15's oneDNN).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7
from torchvision.ops.poolers import LevelMapper

from refold.dense.encoder import Encoder
from refold.dense.pyramid import SimplePyramid
from refold.errors import BackboneError

__all__ = ["ExactBoxCoder", "ExactLinearCoder", "ExactP6P7", "Pyramid", "StridedAnchors", "roi_align_on"]


class Pyramid(nn.Module):
    """An encoder and a feature pyramid network (FPN, arXiv 1612.03144): the ``backbone`` of torchvision's detectors.

    Under the FPN of a plain ViT, whose maps have one stride, is a :class:`refold.dense.SimplePyramid`.

    Args:
        encoder: gives maps of one stride, or of strides that double from one to the next.
        channels: of every level.
        finest: maps of a smaller stride are left out.
        extra: makes coarser levels, two strides apart each, from the last one.
        extra_levels: how many.

    Attributes:
        encoder: as above.
        out_channels: as ``channels``; torchvision's name.
        strides: pixels of the input per pixel, of each level, the extra ones included.
        levels: how many of them come from the encoder.
        multiple: what height and width of the images must be multiples of.

    Raises:
        BackboneError: the encoder lacks such maps; at the forward, maps of another size than the strides say.
    """

    def __init__(
        self, encoder: Encoder, channels: int, *, finest: int, extra: ExtraFPNBlock, extra_levels: int
    ) -> None:
        super().__init__()
        self.encoder = encoder
        simple = None if encoder.is_pyramid else SimplePyramid(encoder.channels, encoder.strides, channels)
        source = simple or encoder
        self._used = [k for k, stride in enumerate(source.strides) if stride >= finest]
        kept = [source.strides[k] for k in self._used]
        if len(kept) < 2 or any(b != 2 * a for a, b in pairwise(kept)):
            raise BackboneError(
                f"a detector's pyramid needs maps whose strides double, from {finest} on, and this encoder gives the "
                f"strides {', '.join(map(str, source.strides))}",
                where="encoder",
                remedy="Use a backbone with stages (Swin, ConvNeXt, ResNet) or a plain ViT, with its default stages",
            )
        self.simple = simple
        self.fpn = FeaturePyramidNetwork([source.channels[k] for k in self._used], channels, extra_blocks=extra)
        self.out_channels = channels
        self.strides = (*kept, *(kept[-1] * 2 ** (n + 1) for n in range(extra_levels)))
        self.levels = len(kept)
        self.multiple = math.lcm(encoder.multiple, kept[-1])

    @property
    def names(self) -> list[str]:
        """Keys of the encoder's levels in the forward's result."""
        return [str(k) for k in range(self.levels)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> level name to (B, channels, H / stride, W / stride), fine to coarse."""
        maps = self.encoder(images)
        if self.simple is not None:
            maps = self.simple(maps)
        maps = [maps[k] for k in self._used]
        for level, stride in zip(maps, self.strides, strict=False):
            if [side * stride for side in level.shape[-2:]] != list(images.shape[-2:]):
                raise BackboneError(
                    f"gives a map of {list(level.shape[-2:])} for an image of {list(images.shape[-2:])}, which is not "
                    f"of stride {stride}",
                    where="encoder",
                )
        return self.fpn(OrderedDict(zip(self.names, maps, strict=True)))


class StridedAnchors(AnchorGenerator):
    """torchvision's anchors at the strides given, in float32.

    Args:
        sizes: of the anchors of each level, in pixels.
        ratios: heights over widths, the same at each level.
        strides: of each level, in pixels.
    """

    def __init__(
        self, sizes: tuple[tuple[float, ...], ...], ratios: tuple[float, ...], strides: tuple[int, ...]
    ) -> None:
        super().__init__(sizes, (ratios,) * len(sizes))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        grids = [list(level.shape[-2:]) for level in feature_maps]
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        self.set_cell_anchors(torch.float32, device)
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)


class ExactBoxCoder(BoxCoder):
    """torchvision's box code, decoded in float32 whatever the dtype of the head's output."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode_single(rel_codes.float(), boxes.float())


class ExactLinearCoder(BoxLinearCoder):
    """FCOS's box code, decoded in float32."""

    def decode(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode(rel_codes.float(), boxes.float())


class ExactP6P7(LastLevelP6P7):
    """torchvision's two extra levels, each half the size of the one before it, in float32."""

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        with torch.autocast(p[-1].device.type, enabled=False):
            made, names = super().forward([p[-1].float()], [c[-1].float()], names)
        return [*p, *made[1:]], names


def roi_align_on(pyramid: Pyramid, size: int) -> MultiScaleRoIAlign:
    """RoI pooling to ``size`` x ``size`` from the encoder's levels, by the strides they have."""
    pool = MultiScaleRoIAlign(pyramid.names, size, sampling_ratio=2)
    strides = pyramid.strides[: pyramid.levels]
    # What torchvision would infer at the first forward.
    pool.scales = [1 / stride for stride in strides]  # type: ignore[assignment]
    pool.map_levels = LevelMapper(*(round(math.log2(strides[k])) for k in (0, -1)))  # type: ignore[assignment]
    return pool
