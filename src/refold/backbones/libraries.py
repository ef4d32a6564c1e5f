"""What image and video models of torchvision and transformers have in common: their names, downloads and input."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from urllib.error import URLError

from torch import nn

from refold.backbones.hub import hub_access
from refold.backbones.normalization import NORMALIZATIONS
from refold.backbones.timm_source import close_matches
from refold.errors import BackboneError

__all__ = ["from_torchvision_zoo", "processor_normalization"]

_BYTE = 255  # the largest value of a pixel, which processors rescale from


def from_torchvision_zoo(name: str, zoo: ModuleType, kind: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
    """A model that torchvision registers in ``zoo``, in evaluation mode.

    Args:
        name: its registered name.
        zoo: the module that defines it.
        kind: what ``zoo`` holds, for the error.
        pretrained: with torchvision's default weights.
        arguments: for its constructor.

    Raises:
        BackboneError: an unknown name, or weights that cannot be downloaded.
    """
    from torchvision.models import get_model, list_models

    where = f"torchvision/{name}"
    known = list_models(module=zoo)
    if name not in known:
        remedy = close_matches(name, known, "torchvision/") or f"See: torchvision.models.list_models({zoo.__name__})"
        raise BackboneError(f"torchvision knows no such {kind}", where=where, remedy=remedy)
    try:
        return get_model(name, weights="DEFAULT" if pretrained else None, **arguments).eval()
    except (OSError, URLError, RuntimeError) as error:
        raise BackboneError(
            f"its weights cannot be downloaded ({error})",
            where=where,
            remedy="Put the file into torch.hub's folder (~/.cache/torch/hub/checkpoints), or use a packaged/ model",
        ) from error


def processor_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of values in [0, 1], that a transformers checkpoint's image processor applies.

    A processor may rescale bytes to something else than [0, 1] before it normalises (ViViT's does: to [-1, 1]); both
    steps are put together. ImageNet's where the checkpoint brings no processor.
    """
    from transformers import AutoImageProcessor

    try:
        with hub_access(name):
            processor: Any = AutoImageProcessor.from_pretrained(name)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (BackboneError, AttributeError, TypeError):
        return NORMALIZATIONS["imagenet"]
    scale = _BYTE * getattr(processor, "rescale_factor", 1 / _BYTE)
    offset = 1.0 if getattr(processor, "offset", False) else 0.0
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)
