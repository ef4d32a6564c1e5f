"""How an image becomes a tensor: one small record shared by data loading, adapter files and export."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from refold.errors import DataError

__all__ = ["Preprocessing"]


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation preprocessing of one model.

    Attributes:
        size: (height, width) in pixels of the tensor the model receives.
        mean: per-channel mean subtracted after scaling to [0, 1]; its length is the number of channels.
        std: per-channel standard deviation divided by.
        interpolation: ``"bicubic"``, ``"bilinear"`` or ``"nearest"``.
        crop: ``"squash"`` resizes straight to ``size`` (the VTAB recipe); ``"center"`` resizes the short
            side to ``size / crop_fraction`` and cuts the centre (the ImageNet recipe).
        crop_fraction: share of the resized image that the centre crop keeps.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: str = "squash"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise DataError(f"mean has {len(self.mean)} channels and std {len(self.std)}", where="preprocessing")
        if self.interpolation not in ("bicubic", "bilinear", "nearest"):
            raise DataError(f"unknown interpolation {self.interpolation!r}", where="preprocessing")
        if self.crop not in ("squash", "center"):
            raise DataError(f"unknown crop {self.crop!r}", where="preprocessing")
        if min(self.size) < 1 or min(self.std) <= 0 or not 0 < self.crop_fraction <= 1:
            raise DataError("size and std must be positive, crop_fraction in (0, 1]", where="preprocessing")

    @property
    def channels(self) -> int:
        return len(self.mean)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Preprocessing:
        """Rebuild from :meth:`to_json`; raises :class:`DataError` on unknown or malformed fields."""
        try:
            return cls(
                size=(int(data["size"][0]), int(data["size"][1])),
                mean=tuple(float(v) for v in data["mean"]),
                std=tuple(float(v) for v in data["std"]),
                interpolation=str(data["interpolation"]),
                crop=str(data["crop"]),
                crop_fraction=float(data["crop_fraction"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"malformed preprocessing record ({error})") from error
