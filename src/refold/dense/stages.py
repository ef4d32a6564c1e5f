"""Which feature maps a dense model takes from a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from refold.errors import BackboneError
from refold.preprocessing import Preprocessing

__all__ = ["PYRAMID", "Features", "choose_stages"]

#: Pixels of the image per pixel of each map, as FPN, UPerNet and their like expect them.
PYRAMID = (4, 8, 16, 32)
_MAPS = len(PYRAMID)


@dataclass(frozen=True)
class Features:
    """A backbone that returns feature maps, and what is known of them.

    Attributes:
        body: called with images (B, C, H, W), returns the maps, fine to coarse.
        channels, strides: of each map.
        channels_last: the maps are (B, H, W, C).
        fixed_size: the only (height, width) that it takes; None for any multiple of the largest stride.
        preprocessing: how images become its input.
    """

    body: nn.Module
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    channels_last: bool
    fixed_size: tuple[int, int] | None
    preprocessing: Preprocessing


def choose_stages(strides: Sequence[int], stages: Sequence[int] | None, where: str) -> tuple[int, ...]:
    """Indices of the maps to take from a backbone that has one of each of ``strides``, in this order.

    Args:
        strides: of all maps that the backbone can give.
        stages: the caller's choice of indices, ascending; None takes the last map of stride 4, 8, 16 and 32 each, and
            of a backbone whose maps all have one stride (a plain ViT) the ends of its four quarters.
        where: spec of the backbone, for errors.

    Raises:
        BackboneError: the backbone lacks these stages.
    """
    if stages is not None:
        chosen = tuple(stages)
        if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= len(strides):
            raise BackboneError(
                f"stages {chosen} are not ascending indices of its {len(strides)} maps",
                where=where,
                remedy=f"Their strides are {list(strides)}; choose from 0 to {len(strides) - 1}",
            )
        return chosen
    if len(set(strides)) == 1 and len(strides) >= _MAPS:
        return tuple(len(strides) * k // _MAPS - 1 for k in range(1, _MAPS + 1))
    last = {stride: index for index, stride in enumerate(strides)}
    if any(stride not in last for stride in PYRAMID):
        raise BackboneError(
            f"has maps of strides {sorted(set(strides))}, not the stages that dense prediction needs "
            f"({', '.join(map(str, PYRAMID))}, or {_MAPS} of one stride)",
            where=where,
            remedy="Use a Swin, ConvNeXt, ResNet, EfficientNet or plain ViT, or choose with stages",
        )
    return tuple(last[stride] for stride in PYRAMID)
