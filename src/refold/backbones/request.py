"""What a caller asks of :func:`refold.backbones.load`, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from refold.backbones.prompts import Prompts
from refold.errors import BackboneError
from refold.preprocessing import Preprocessing

__all__ = ["Loaded", "Request"]


@dataclass(frozen=True)
class Loaded:
    """A backbone ready to be adapted.

    Attributes:
        model: the module, on the CPU in float32, in evaluation mode.
        spec: the canonical name; loading it again gives the same weights.
        preprocessing: how images become its input.
    """

    model: nn.Module
    spec: str
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Request:
    """The options of :func:`refold.backbones.load`, checked once for all sources.

    Raises:
        BackboneError: an option is out of range.
    """

    num_classes: int | None = None
    in_chans: int | None = None
    image_size: tuple[int, int] | None = None
    weights: Path | None = None
    pretrained: bool = True
    drop_path: float = 0.0
    head: str | Prompts = "linear"

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 0:
            raise BackboneError(f"cannot be negative (got {self.num_classes})", where="num_classes")
        if self.in_chans is not None and self.in_chans < 1:
            raise BackboneError(f"must be at least 1 (got {self.in_chans})", where="in_chans")
        if self.image_size is not None and min(self.image_size) < 1:
            raise BackboneError(f"must be positive (got {self.image_size})", where="image_size")
        if not 0 <= self.drop_path < 1:
            raise BackboneError(f"must be in [0, 1) (got {self.drop_path})", where="drop_path")
        if not isinstance(self.head, Prompts) and self.head not in ("linear", "cosine"):
            raise BackboneError(f"must be linear, cosine or prompts (got {self.head!r})", where="head")
        if isinstance(self.head, Prompts) and self.num_classes not in (None, len(self.head.names)):
            reason = f"there are {len(self.head.names)} names for {self.num_classes} classes"
            raise BackboneError(reason, where="head")
