"""Clips with a known motion over real footage: labelled video for tests and comparisons where none can be had.

A clip is what a camera would see that moves over a photograph, or over a video that moves by itself: a square view
whose place, side and angle follow the motion of the clip's class, :data:`MOTIONS`. Every class is made from every piece
of footage about equally often, and where a motion and its opposite are two classes, the camera of one goes the ways of
the other's backwards. So neither the footage nor the set of a clip's frames, without their order, tells these apart:
what looks at single frames can at best tell along which axis the camera moves, from the blur of the exposure; or, where
the camera sees the footage ``whole``, from where that is in each frame.

The footage is split, not the clips: no test clip shows footage that was trained on. Written as H.264 in MP4, a folder
for each split and in it one for each class, which :func:`refold.train` reads with ``task="video"``; what each clip is
made from is in ``motions.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from refold.data.coco_files import SPLITS, new_folder
from refold.data.decoding import decode
from refold.data.parallel import for_each
from refold.errors import DataError, MissingExtraError
from refold.video.decoding import EXTENSIONS, open_video

__all__ = ["MOTIONS", "View", "make_motions", "render", "view_path"]

#: Class -> what becomes of the view: how far it goes to the right and down in its own sides, how its side grows
#: (logarithm), how far it turns clockwise; each in parts of the clip's own range. A shaking view has no way to go.
MOTIONS: dict[str, tuple[int, int, int, int]] = {
    "pan_down": (0, 1, 0, 0),
    "pan_left": (-1, 0, 0, 0),
    "pan_right": (1, 0, 0, 0),
    "pan_up": (0, -1, 0, 0),
    "shake": (0, 0, 0, 0),
    "still": (0, 0, 0, 0),
    "turn_left": (0, 0, 0, -1),
    "turn_right": (0, 0, 0, 1),
    "zoom_in": (0, 0, -1, 0),
    "zoom_out": (0, 0, 1, 0),
}
#: What a clip's motion goes through from its first frame to its last.
_PAN, _ZOOM, _TURN = (0.3, 0.5), (math.log(1.4), math.log(2.0)), (20.0, 40.0)  # sides; logarithm; degrees
_SHAKE = 0.12  # how far a shaken view is from its place at most, in its sides
_SIDE, _TILT = (1.1, 1.3), 10.0  # the mean view: its side in those of the clip; degrees to either side
_ROOM = 2.2  # short side of the scaled footage, in sides of the clip: the largest motion of each kind fits into it
_PICTURE = 0.54  # long side of the scaled footage that is seen whole, in sides of the clip
_WAY = 0.7  # share of a pan that then leaves it in view, however the camera is tilted
_GROUND = 114.0  # what is around it: grey
_EXPOSURES = 5  # instants that a frame's exposure is the mean of
#: A constant rate factor of 17 or 18 counts as visually lossless. x264's macroblock tree reads memory nobody wrote:
#: with it the same frames give other files.
_CODING = {"crf": "18", "threads": "1", "x264-params": "mbtree=0"}


@dataclass(frozen=True)
class View:
    """Where the camera looks at one instant.

    Attributes:
        x, y: centre, in pixels of the footage from its left upper corner.
        side: of the square view, in pixels of the footage.
        angle: of the camera, in degrees clockwise.
    """

    x: float
    y: float
    side: float
    angle: float


def make_motions(
    footage: Mapping[str, Sequence[str | Path]],
    root: str | Path,
    *,
    clips: tuple[int, int, int] = (400, 100, 200),
    frames: int = 16,
    size: int = 112,
    fps: int = 15,
    shutter: float = 0.5,
    whole: bool = False,
    seed: int = 0,
    licence: str = "",
) -> Path:
    """Write the data set.

    Args:
        footage: ``"train"``, ``"val"`` and ``"test"``: photographs and videos, no file in two of them.
        root: a new folder.
        clips: of the three splits, in that order; multiples of the 10 classes.
        frames: of a clip, at ``fps`` a second.
        size: height and width, an even number of pixels.
        shutter: share of the time between two frames that each is exposed, which blurs what moves; 0 for none, 0.5 is
            usual in film.
        whole: the camera sees the footage as a picture before a grey ground, so that single frames show where it is,
            instead of a part of it that fills the frame.
        seed: of all that is drawn; the same seed gives the same clips.
        licence: terms of the footage, kept in ``motions.json``.

    Returns:
        ``root``.

    Raises:
        DataError: footage is missing, cannot be read, is shorter than a clip or in two splits; an argument is out of
            range; or ``root`` is there already.
        MissingExtraError: PyAV is not installed.
    """
    _check(footage, clips, frames, size, fps, shutter, seed)
    names = list(MOTIONS)
    rows: list[dict[str, object]] = []
    with new_folder(Path(root)) as folder:
        for split, count in zip(SPLITS, clips, strict=True):
            draw = np.random.default_rng((seed, SPLITS.index(split)))
            chosen = [_spread(len(footage[split]), count // len(names), draw) for _ in names]
            jobs = [
                (split, name, number, Path(footage[split][piece]), int(draw.integers(2**32)))
                for name, pieces in zip(names, chosen, strict=True)
                for number, piece in enumerate(pieces)
            ]
            made: list[dict[str, object]] = [{} for _ in jobs]

            def make(i: int, jobs: list = jobs, made: list = made) -> None:
                split, name, number, path, clip_seed = jobs[i]
                file = f"{split}/{name}/{number:04d}.mp4"
                pixels, facts = _clip(name, path, frames, size, shutter, whole, np.random.default_rng(clip_seed))
                (folder.root / file).parent.mkdir(parents=True, exist_ok=True)
                _write(folder.root / file, pixels, fps)
                made[i] = {"file": file, "motion": name, "footage": path.name, **facts}

            for_each(make, len(jobs), f"making {split} clips")
            rows += made
        facts = {"seed": seed, "frames": frames, "size": size, "fps": fps, "shutter": shutter, "whole": whole}
        told = {**facts, "licence": licence, "clips": rows}
        (folder.root / "motions.json").write_text(json.dumps(told, indent=1) + "\n")
    return Path(root)


def view_path(
    motion: str,
    frames: int,
    footage: tuple[int, int],
    size: int,
    shutter: float,
    draw: np.random.Generator,
    whole: bool = False,
) -> list[list[View]]:
    """Where the camera looks in each frame: one view for every instant of its exposure.

    Args:
        motion: key of :data:`MOTIONS`.
        frames: of the clip.
        footage: height and width in pixels; the short side is about 2.2 times ``size``, or of ``whole`` footage the
            long one 0.54 times.
        size: of the clip, in pixels.
        shutter, whole: see :func:`make_motions`.
        draw: gives the amounts and the place.

    Raises:
        DataError: the views do not fit into the footage, or ``whole`` footage not into the views.
    """
    right, down, grows, turns = MOTIONS[motion]
    pan, zoom, turn = (float(draw.uniform(*bounds)) for bounds in (_PAN, _ZOOM, _TURN))
    pan *= _WAY if whole else 1.0
    side, tilt = size * float(draw.uniform(*_SIDE)), float(draw.uniform(-_TILT, _TILT))
    steps = np.arange(frames)[:, None] + np.linspace(-0.5, 0.5, _EXPOSURES)[None] * shutter
    shaken = np.zeros((2, *steps.shape))
    if motion == "shake":
        places = _SHAKE * side * draw.uniform(-1, 1, size=(2, frames + 2))
        shaken = np.stack([np.interp(steps, np.arange(-1, frames + 1), row) for row in places])
    # From -0.5 to 0.5, around the middle of the clip: a motion and its opposite see the same.
    progress = (steps + shutter / 2) / (frames - 1 + shutter) - 0.5
    x, y = shaken + pan * side * np.array([right, down])[:, None, None] * progress
    sides, angles = side * np.exp(zoom * grows * progress), tilt + turn * turns * progress
    cos, sin = np.abs(np.cos(np.radians(angles))), np.abs(np.sin(np.radians(angles)))
    for offsets, extent, across in ((x, footage[1], footage[0]), (y, footage[0], footage[1])):
        if whole:  # a view is turned around its middle: what is this far off in both directions is still inside
            slack = (sides - extent * cos - across * sin) / 2 / (cos + sin)
            low, high = float((-slack - offsets).max()) + extent / 2, float((slack - offsets).min()) + extent / 2
        else:
            reach = sides / 2 * (cos + sin)  # half the width of what a turned view covers
            low, high = float((reach - offsets).max()), float((extent - reach - offsets).min())
        if low > high:
            raise DataError(f"footage of {footage[0]}x{footage[1]} pixels has no room for this motion", where=motion)
        offsets += draw.uniform(low, high)
    table = np.stack((x, y, sides, angles), axis=-1)
    return [[View(*map(float, instant)) for instant in exposure] for exposure in table]


def render(footage: Tensor, views: Sequence[Sequence[View]], size: int) -> Tensor:
    """What a camera sees: for each frame the mean over its exposure. Around the footage it sees grey.

    Args:
        footage: (T, 3, H, W) in [0, 255], or (1, 3, H, W) for a photograph.
        views: for each of T frames the views of its exposure.
        size: height and width of the result.

    Returns:
        (T, 3, size, size) uint8.
    """
    table = torch.tensor([[[v.x, v.y, v.side, v.angle] for v in row] for row in views], dtype=torch.float32)
    height, width = footage.shape[2:]
    grid = (torch.arange(size) + 0.5) / size - 0.5
    down, right = torch.meshgrid(grid, grid, indexing="ij")
    source = footage.expand(len(views), -1, -1, -1) - _GROUND
    total = torch.zeros(len(views), 3, size, size)
    for instant in table.unbind(1):
        x, y, side, angle = instant.T[:, :, None, None]
        cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
        across = x + side * (cos * right - sin * down)
        along = y + side * (sin * right + cos * down)
        places = torch.stack((2 * across / width - 1, 2 * along / height - 1), dim=-1)
        total += F.grid_sample(source, places, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (total / table.shape[1] + _GROUND).round().clamp(0, 255).to(torch.uint8)


def _clip(
    motion: str, path: Path, frames: int, size: int, shutter: float, whole: bool, draw: np.random.Generator
) -> tuple[Tensor, dict[str, object]]:
    """One clip's frames, and what it is made from."""
    start = 0
    if path.suffix.lower() in EXTENSIONS:
        with open_video(str(path)) as video:
            if len(video) < frames:
                raise DataError(f"has {len(video)} frames, fewer than a clip's {frames}", where=str(path))
            start = int(draw.integers(len(video) - frames + 1))
            pixels = video.read(range(start, start + frames)).float()
    else:
        pixels = torch.from_numpy(np.array(decode(str(path), 3))).permute(2, 0, 1)[None].float()
    scale = _PICTURE * size / max(pixels.shape[2:]) if whole else _ROOM * size / min(pixels.shape[2:])
    room = (math.ceil(pixels.shape[2] * scale), math.ceil(pixels.shape[3] * scale))
    pixels = F.interpolate(pixels, size=room, mode="bicubic", antialias=True).clamp(0, 255)
    views = view_path(motion, frames, room, size, shutter, draw, whole)
    ends = [asdict(row[len(row) // 2]) for row in (views[0], views[-1])]
    return render(pixels, views, size), {"start": start, "first_view": ends[0], "last_view": ends[1]}


def _write(path: Path, pixels: Tensor, fps: int) -> None:
    """Frames (T, 3, H, W) as H.264."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError.of("av", "video") from error
    rows = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=_CODING)
        stream.height, stream.width = pixels.shape[2:]
        stream.pix_fmt = "yuv420p"
        for number, row in enumerate(rows):
            frame = av.VideoFrame.from_ndarray(row, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _spread(pieces: int, count: int, draw: np.random.Generator) -> list[int]:
    """``count`` numbers of pieces, each as often as the others but for one, in random order."""
    rounds = [draw.permutation(pieces) for _ in range(-(-count // pieces))]
    return np.concatenate(rounds)[:count].tolist()


def _check(
    footage: Mapping[str, Sequence[str | Path]],
    clips: tuple[int, int, int],
    frames: int,
    size: int,
    fps: int,
    shutter: float,
    seed: int,
) -> None:
    if any(count < len(MOTIONS) or count % len(MOTIONS) for count in clips):
        raise DataError(f"{clips} are not multiples of the {len(MOTIONS)} classes", where="clips")
    if frames < 2 or size < 16 or size % 2 or fps < 1 or not 0 <= shutter <= 1 or seed < 0:
        remedy = (
            "Use 2 frames or more, an even size of 16 pixels or more, fps from 1 on, a shutter in [0, 1], a seed >= 0"
        )
        raise DataError(f"frames={frames}, size={size}, fps={fps}, shutter={shutter}, seed={seed}", remedy=remedy)
    seen: dict[Path, str] = {}
    for split in SPLITS:
        if not footage.get(split):
            raise DataError("has no footage", where=split, remedy="Name photographs or videos for train, val and test")
        for path in map(Path, footage[split]):
            if not path.is_file():
                raise DataError("no such footage", where=str(path))
            other = seen.setdefault(path.resolve(), split)
            if other != split:
                raise DataError(f"is footage of both {other} and {split}", where=str(path), remedy="Split the footage")
