"""Small videos whose every frame says which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Grey levels between two frames: far more than a codec at good quality errs.
STEP = 6


def numbered(number: int, size: tuple[int, int]) -> np.ndarray:
    """A grey picture (H, W, 3) that :func:`numbers` reads ``number`` from, 0 to 41."""
    return np.full((*size, 3), 4 + STEP * number, np.uint8)


def numbers(frames: Tensor) -> list[int]:
    """What frames (T, 3, H, W) of :func:`numbered` are numbered."""
    return ((frames.float().mean(dim=(1, 2, 3)) - 4) / STEP).round().int().tolist()


def write_video(
    path: Path,
    count: int = 20,
    *,
    rate: int = 30,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    gop: int = 5,
    picture: Callable[[int, tuple[int, int]], np.ndarray] = numbered,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """Write ``count`` frames; ``times`` are their presentation times in milliseconds, even at ``rate`` if None."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], pixels
        stream.codec_context.gop_size = gop
        if codec == "libx264":
            stream.options = {"crf": "10"}
        elif codec != "ffv1":
            stream.bit_rate = 4_000_000
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def truncate(path: Path, share: float) -> Path:
    """The first part of a file."""
    content = path.read_bytes()
    target = path.with_name(f"short_{path.name}")
    target.write_bytes(content[: int(len(content) * share)])
    return target


def coloured(red: int) -> Callable[[int, tuple[int, int]], np.ndarray]:
    """A picture of one colour, with a little structure, whatever its number."""

    def picture(number: int, size: tuple[int, int]) -> np.ndarray:
        pixels = np.zeros((*size, 3), np.uint8)
        pixels[..., 0], pixels[..., 2] = red, 255 - red
        pixels[number % size[0], :, 1] = 255
        return pixels

    return picture


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
