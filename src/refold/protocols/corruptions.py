"""Common corruptions of images, after ImageNet-C: "Benchmarking Neural Network Robustness" (arXiv 1903.12261).

Five severities each, with ImageNet-C's numbers, which are for 224 pixels; the operations are torch's and Pillow's.
Not here are its weather (snow, frost, fog), its motion, zoom and glass blur, and its elastic transform. What is random
is a function of (seed, corruption, severity, image).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO

import torch
from torch import Tensor
from torch.nn import functional as F

from refold.data.randomness import generator
from refold.errors import DataError

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)
_Operation = Callable[[Tensor, float, torch.Generator], Tensor]


def corrupt(images: Tensor, name: str, severity: int, *, first: int = 0, seed: int = 0) -> Tensor:
    """Images (B, C, H, W) uint8 -> the same, corrupted.

    Args:
        images: 1 or 3 channels.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        first: number of the first image in its set.
        seed: of the noise.

    Raises:
        DataError: an unknown corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise DataError(f"unknown corruption {name!r}", where="corruptions", remedy=f"Known: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise DataError(f"must be 1 to 5, not {severity!r}", where="severity")
    operation, strengths = CORRUPTIONS[name]
    found = [
        operation(image.float() / 255, strengths[severity - 1], generator(seed, first + k, f"{name} {severity}"))
        for k, image in enumerate(images)
    ]
    return (torch.stack(found).clamp(0, 1) * 255).round().to(torch.uint8)


def _gaussian_noise(x: Tensor, deviation: float, random: torch.Generator) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=random)


def _shot_noise(x: Tensor, photons: float, random: torch.Generator) -> Tensor:
    return torch.poisson(x * photons, generator=random) / photons


def _impulse_noise(x: Tensor, share: float, random: torch.Generator) -> Tensor:
    draws = torch.rand(x.shape, generator=random)
    return torch.where(draws < share / 2, 0.0, torch.where(draws < share, 1.0, x))


def _defocus_blur(x: Tensor, radius: float, random: torch.Generator) -> Tensor:
    reach = math.ceil(radius)
    offsets = torch.arange(-reach, reach + 1.0)
    disk = ((offsets[:, None] ** 2 + offsets**2) <= radius**2).float()
    return _filtered(x, disk / disk.sum())


def _gaussian_blur(x: Tensor, deviation: float, random: torch.Generator) -> Tensor:
    offsets = torch.arange(-math.ceil(4 * deviation), math.ceil(4 * deviation) + 1.0)
    line = torch.exp(-(offsets**2) / (2 * deviation**2))
    line /= line.sum()
    return _filtered(x, line[:, None] * line)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel by itself; pixels beyond the edge are those at the edge."""
    reach = kernel.shape[-1] // 2
    padded = F.pad(x[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def _brightness(x: Tensor, more: float, random: torch.Generator) -> Tensor:
    """The value of HSV, which is the largest channel, is raised; hue and saturation stay."""
    value = x.amax(0, keepdim=True)
    return torch.where(value > 0, x * ((value + more).clamp(max=1) / value.clamp(min=1e-6)), more)


def _contrast(x: Tensor, share: float, random: torch.Generator) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return (x - mean) * share + mean


def _pixelate(x: Tensor, share: float, random: torch.Generator) -> Tensor:
    height, width = x.shape[-2:]
    small = F.interpolate(x[None], size=(max(int(height * share), 1), max(int(width * share), 1)), mode="area")
    return F.interpolate(small, size=(height, width), mode="nearest-exact")[0]


def _jpeg(x: Tensor, quality: float, random: torch.Generator) -> Tensor:
    import numpy as np
    from PIL import Image

    pixels, buffer = (x * 255).round().to(torch.uint8).numpy(), BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "jpeg", quality=quality)
    found = torch.from_numpy(np.array(Image.open(buffer))).float() / 255
    return found[None] if found.dim() == 2 else found.permute(2, 0, 1)


#: Name -> what it does, and how strongly at each severity.
CORRUPTIONS: dict[str, tuple[_Operation, tuple[float, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, (3, 4, 6, 8, 10)),
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
}
