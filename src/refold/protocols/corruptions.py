"""Common corruptions of images, after ImageNet-C: "Benchmarking Neural Network Robustness" (arXiv 1903.12261).

Fourteen of its fifteen under its names, and its extra ``gaussian_blur``; ``frost`` needs photographs of frost, which
are not here. Five severities each, with ImageNet-C's numbers, which are for 224 pixels; the operations are torch's and
Pillow's, so pixels differ a little from the released set. ``elastic_transform`` is of two kinds there too: severities 1
and 2 tilt the image, 3 to 5 ripple it. What is random is a function of (seed, corruption, severity, image).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refold.data.randomness import generator
from refold.errors import DataError

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)
_LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601
_Operation = Callable[[Tensor, Any, torch.Generator], Tensor]


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


def _glass_blur(x: Tensor, how: tuple[float, int, int], random: torch.Generator) -> Tensor:
    """Blurred, pixels taken from near by, blurred again; for all pixels at once, where ImageNet-C goes row by row."""
    deviation, reach, times = how
    x = _gaussian_blur(x, deviation, random)
    height, width = x.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for _ in range(times):
        down, right = torch.randint(-reach, reach, (2, height, width), generator=random)
        x = x[:, (rows + down).clamp(0, height - 1), (columns + right).clamp(0, width - 1)]
    return _gaussian_blur(x, deviation, random)


def _motion_blur(x: Tensor, how: tuple[int, float], random: torch.Generator) -> Tensor:
    return _smeared(x, *how, angle=_uniform(-45, 45, random))


def _smeared(x: Tensor, radius: int, deviation: float, angle: float) -> Tensor:
    """One half of a Gaussian along a line, ``angle`` in degrees, as ImageMagick's motion blur."""
    steps = torch.arange(2 * radius + 1.0)
    weights = torch.exp(-(steps**2) / (2 * deviation**2))
    weights /= weights.sum()
    turn = math.radians(angle)
    rows, columns = (torch.ceil(steps * share - 0.5).long() for share in (math.sin(turn), math.cos(turn)))
    reach, (height, width) = 2 * radius, x.shape[-2:]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    out = torch.zeros_like(x)
    for weight, row, column in zip(weights, (rows + reach).tolist(), (columns + reach).tolist(), strict=True):
        out += weight * padded[:, row : row + height, column : column + width]
    return out


def _zoom_blur(x: Tensor, how: tuple[int, float], random: torch.Generator) -> Tensor:
    """The mean of the image and of closer and closer looks at its middle."""
    count, step = how
    return torch.stack([x, *(_zoomed(x, 1 + step * k) for k in range(count))]).mean(0)


def _zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle of (C, H, W), enlarged to the same size."""
    shape = x.shape[-2:]
    sides = [math.ceil(side / factor) for side in shape]
    x = _middle(x, sides)
    large = [max(round(part * factor), side) for part, side in zip(sides, shape, strict=True)]
    return _middle(F.interpolate(x[None], large, mode="bilinear", align_corners=True)[0], shape)


def _middle(x: Tensor, sides: Sequence[int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], sides, strict=True))
    return x[:, top : top + sides[0], left : left + sides[1]]


def _snow(x: Tensor, how: tuple[float, float, float, float, int, float, float], random: torch.Generator) -> Tensor:
    """Blurred flakes before a paler image."""
    mean, deviation, size, threshold, radius, length, clear = how
    flakes = _zoomed(mean + deviation * torch.randn(1, *x.shape[-2:], generator=random), size)
    flakes = torch.where(flakes < threshold, 0.0, flakes.clamp(0, 1))
    flakes = _smeared(flakes, radius, length, angle=_uniform(-135, -45, random))
    luma = (x * x.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True) if len(x) == 3 else x
    pale = torch.maximum(x, luma * 1.5 + 0.5)
    return clear * x + (1 - clear) * pale + flakes + flakes.rot90(2, (1, 2))


def _fog(x: Tensor, how: tuple[float, float], random: torch.Generator) -> Tensor:
    thickness, decay = how
    height, width = x.shape[-2:]
    brightest = x.max()
    clouds = _clouds(max(height, width, 2), decay, random)[:height, :width]
    return (x + thickness * clouds) * brightest / (brightest + thickness)


def _clouds(side: int, decay: float, random: torch.Generator) -> Tensor:
    """A fractal of values 0 to 1, at least ``side`` in height and width, by the diamond-square algorithm."""
    size = 1 << (side - 1).bit_length()
    clouds, step, wobble = torch.zeros(size, size), size, 1.0
    while step >= 2:
        half = step // 2

        def midpoints(corners: Tensor, wobble: float = wobble) -> Tensor:
            return corners / 4 + wobble * (2 * torch.rand(corners.shape, generator=random) - 1)

        corners = clouds[::step, ::step]
        down = corners + corners.roll(-1, 0)
        clouds[half::step, half::step] = midpoints(down + down.roll(-1, 1))
        centres = clouds[half::step, half::step]
        clouds[::step, half::step] = midpoints(centres + centres.roll(1, 0) + corners + corners.roll(-1, 1))
        clouds[half::step, ::step] = midpoints(centres + centres.roll(1, 1) + corners + corners.roll(-1, 0))
        step, wobble = half, wobble / decay**2  # ImageNet-C's wobble is the square of what decays
    clouds -= clouds.min()
    return clouds / clouds.max()


def _elastic_transform(x: Tensor, how: tuple[float, float, float], random: torch.Generator) -> Tensor:
    """A random affine map of three points, then smooth random displacements; lengths are shares of the shorter side."""
    height, width = x.shape[-2:]
    side = min(height, width) * 244 / 224  # a slip of ImageNet-C's, which belongs to its numbers
    strength, deviation, jitter = (share * side for share in how)
    middle, arm = torch.tensor([width // 2, height // 2]).double(), min(height, width) // 3
    points = middle + arm * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).double()
    moved = points + jitter * (2 * torch.rand(points.shape, generator=random).double() - 1)
    ones = torch.ones(3, 1).double()
    back = torch.linalg.solve(torch.cat([moved, ones], 1), points)  # (3, 2): (column, row, 1) of the result -> source
    rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    x = _sampled(x, *(torch.stack([columns, rows, torch.ones_like(rows)], -1) @ back).unbind(-1))
    noise = 2 * torch.rand(2, height, width, generator=random).double() - 1
    shifts = strength * (_smoothing(height, deviation) @ noise @ _smoothing(width, deviation).T)
    return _sampled(x, columns + shifts[0], rows + shifts[1])


def _sampled(x: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """(C, H, W) at positions (H, W) in pixels, linear between them, mirrored at the edges."""
    grid = torch.stack([(2 * columns + 1) / x.shape[-1] - 1, (2 * rows + 1) / x.shape[-2] - 1], -1).to(x.dtype)
    return F.grid_sample(x[None], grid[None], padding_mode="reflection", align_corners=False)[0]


def _smoothing(side: int, deviation: float) -> Tensor:
    """(side, side): a Gaussian filter of a line as a matrix; cut at 3 deviations, mirrored at both ends."""
    reach = int(3 * deviation + 0.5)
    offsets = torch.arange(-reach, reach + 1)
    line = torch.exp(-(offsets.double() ** 2) / (2 * deviation**2))
    sources = (torch.arange(side)[:, None] + offsets) % (2 * side)
    sources = torch.where(sources < side, sources, 2 * side - 1 - sources)
    matrix = torch.zeros(side, side).double()
    return matrix.scatter_add(1, sources, (line / line.sum()).expand(side, -1))


def _uniform(low: float, high: float, random: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))


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


def _jpeg_compression(x: Tensor, quality: float, random: torch.Generator) -> Tensor:
    import numpy as np
    from PIL import Image

    pixels, buffer = (x * 255).round().to(torch.uint8).numpy(), BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "jpeg", quality=quality)
    found = torch.from_numpy(np.array(Image.open(buffer))).float() / 255
    return found[None] if found.dim() == 2 else found.permute(2, 0, 1)


#: Name -> what it does, and how strongly at each severity.
CORRUPTIONS: dict[str, tuple[_Operation, tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # standard deviation
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),  # photons at full brightness
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),  # share of values
    "defocus_blur": (_defocus_blur, (3, 4, 6, 8, 10)),  # radius
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),  # blur, reach, times
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),  # radius, standard deviation
    "zoom_blur": (_zoom_blur, ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03))),  # looks, step
    "gaussian_blur": (_gaussian_blur, (1, 2, 3, 4, 6)),  # standard deviation
    "snow": (
        _snow,  # mean and deviation of the flakes, their size, threshold, radius and length of the blur, what is clear
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),  # thickness, decay from scale to scale
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # added
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),  # what is left of it
    "elastic_transform": (
        _elastic_transform,  # strength and smoothness of the displacements, jitter of the affine map
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),  # of the resolution
    "jpeg_compression": (_jpeg_compression, (25, 18, 15, 10, 7)),  # quality
}
