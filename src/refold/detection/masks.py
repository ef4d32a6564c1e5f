"""COCO's masks: polygons and run lengths (RLE), by faster-coco-eval's mask API.

Everywhere else in this package a mask is a compressed RLE, ``{"size": [height, width], "counts": bytes}``, until it is
decoded for training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refold.errors import MissingExtraError

__all__ = ["Rle", "area_of", "decode_masks", "encode_mask", "mask_api", "parse_segmentation"]

Rle = dict[str, Any]


def mask_api() -> ModuleType:
    """``faster_coco_eval.core.mask``.

    Raises:
        MissingExtraError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("faster-coco-eval", "dense") from error
    return mask


def parse_segmentation(value: Any, height: int, width: int) -> Rle:
    """COCO's ``segmentation`` of one object as a compressed RLE.

    Args:
        value: a list of polygons [x1, y1, x2, y2, ...], or an RLE, compressed or not.
        height, width: of the image.

    Raises:
        ValueError: it is none of these, or of another size; says why.
    """
    api = mask_api()
    if isinstance(value, list):
        for polygon in value:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("a polygon is no list of three or more points x, y")
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in polygon):
                raise ValueError("a polygon has a coordinate that is no number")
        if not value:
            raise ValueError("there is no polygon")
        return api.merge(api.frPyObjects(value, height, width))
    if not isinstance(value, dict) or not {"size", "counts"} <= value.keys():
        raise ValueError("it is neither a list of polygons nor an RLE with size and counts")
    if list(value["size"]) != [height, width]:
        raise ValueError(f"its RLE is of {value['size']}, the image of [{height}, {width}]")
    try:
        rle = api.frPyObjects(value, height, width) if isinstance(value["counts"], list) else dict(value)
        if isinstance(rle["counts"], str):
            rle["counts"] = rle["counts"].encode("ascii")
        api.decode(rle)  # says whether the lengths fit
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"its RLE cannot be decoded ({error})") from error
    return rle


def decode_masks(rles: Sequence[Rle], height: int, width: int) -> Tensor:
    """n RLEs -> (n, height, width) uint8, zeros and ones."""
    if not rles:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(mask_api().decode(list(rles)).transpose(2, 0, 1)))


def encode_mask(mask: Tensor) -> Rle:
    """(H, W) boolean -> RLE with ``counts`` as text, as JSON needs it."""
    rle = mask_api().encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def area_of(rle: Rle) -> int:
    """Its number of pixels."""
    return int(mask_api().area(rle))
