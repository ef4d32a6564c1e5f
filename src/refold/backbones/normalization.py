"""Mean and standard deviation of the input: from the model, or by name.

The choice matters in comparisons: Google's ``.npz`` ViT weights were trained on inputs in [-1, 1] (``inception``),
while RepAdapter, FacT and Convpass feed them ImageNet statistics (``imagenet``) and VPT feeds [0, 1] (``none``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refold.errors import DataError
from refold.preprocessing import Preprocessing

__all__ = ["NORMALIZATIONS", "from_config", "spread", "with_normalization"]

#: Name -> (mean, std) of RGB values scaled to [0, 1].
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def with_normalization(preprocessing: Preprocessing, name: str) -> Preprocessing:
    """The same preprocessing with another mean and standard deviation.

    Args:
        preprocessing: the model's own.
        name: ``"model"`` keeps it, ``"imagenet"``, ``"inception"`` (inputs in [-1, 1]) or ``"none"`` (in [0, 1]).

    Raises:
        DataError: the name is unknown.
    """
    if name == "model":
        return preprocessing
    if name not in NORMALIZATIONS:
        known = ", ".join(["model", *NORMALIZATIONS])
        raise DataError(f"unknown normalization {name!r}", where="normalize", remedy=f"Use one of: {known}")
    mean, std = NORMALIZATIONS[name]
    channels = preprocessing.channels
    return replace(preprocessing, mean=spread(mean, channels), std=spread(std, channels))


def spread(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Per-channel values for another number of channels: their average, repeated."""
    if len(values) == channels:
        return tuple(float(v) for v in values)
    return (sum(values) / len(values),) * channels


def from_config(config: Mapping[str, Any], *, channels: int, size: tuple[int, int]) -> Preprocessing:
    """Preprocessing from the keys timm and open_clip share (``mean``, ``std``, ``interpolation``, ``crop_pct``).

    Images are squashed to ``size`` (the VTAB recipe); the model's crop fraction is kept for those who switch to
    the centre crop. An interpolation that is no single filter (timm's ``"random"``) becomes bicubic.
    """
    interpolation = config["interpolation"]
    return Preprocessing(
        size=size,
        mean=spread(tuple(config["mean"]), channels),
        std=spread(tuple(config["std"]), channels),
        interpolation=interpolation if interpolation in ("bicubic", "bilinear", "nearest") else "bicubic",
        crop="squash",
        crop_fraction=float(config.get("crop_pct") or 1.0),
    )
