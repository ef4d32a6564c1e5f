"""A set of labelled videos."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from refold.errors import DataError
from refold.video.decoding import open_video
from refold.video.sampling import Clock, Sampling

__all__ = ["VideoSet", "VideoSplits"]

_SHOWN = 4  # frames in the picture of a video, as a square


class VideoSet:
    """N video files and the class of each.

    Args:
        paths: N files, which are opened at every reading.
        targets: (N,) class indices.
        classes: names of the classes.

    Attributes:
        paths, classes: as above.
        targets: (N,) int64.

    Raises:
        DataError: arguments that contradict each other.
    """

    def __init__(self, paths: Iterable[str | Path], targets: Tensor, classes: list[str] | None = None) -> None:
        self.paths = [str(path) for path in paths]
        self.targets = targets.long()
        self.classes = classes
        if len(targets) != len(self.paths):
            raise DataError(f"{len(self.paths)} videos have {len(targets)} targets", where="targets")

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"VideoSet({len(self)} videos, {len(self.classes or ())} classes)"

    def subset(self, indices: Iterable[int]) -> VideoSet:
        """The videos at ``indices``, in that order."""
        chosen = list(indices)
        return VideoSet([self.paths[i] for i in chosen], self.targets[chosen], self.classes)

    def clips(self, index: int, choose: Callable[[Clock], list[list[int]]]) -> Tensor:
        """Clips of one video, (clips, T, 3, h, w) uint8 at its own size, read in one pass.

        Args:
            index: of the video.
            choose: told when its frames are shown, the numbers of those of each clip; all of one length T.

        Raises:
            DataError: a file that cannot be decoded; the message names it.
            MissingExtraError: PyAV is not installed.
        """
        with open_video(self.paths[index]) as video:
            numbers = choose(video.clock)
            frames = video.read([number for clip in numbers for number in clip])
        return frames.unflatten(0, (len(numbers), len(numbers[0])))

    def read(self, indices: Iterable[int], size: tuple[int, int]) -> Tensor:
        """A picture of each video, (B, 3, *size) uint8: four frames of it, row by row."""
        from torchvision.transforms.v2 import functional

        few, half = Sampling("uniform", _SHOWN), [side // 2 for side in size]
        pictures = []
        for index in indices:
            frames = functional.resize(self.clips(index, lambda clock: [few.even(clock)])[0], half, antialias=True)
            rows = [torch.cat(list(pair), dim=-1) for pair in frames.split(2)]
            pictures.append(torch.cat(rows, dim=-2))
        return torch.stack(pictures)


@dataclass(frozen=True)
class VideoSplits:
    """The parts of one data set, with the same classes.

    Attributes:
        train, val, test: None for a part that does not exist.
        classes: names in the order of the targets.
        task: what the targets are.
        mirrored: whether the mirror image of a video has the same class. Something-Something tells left from right.
        skipped: (path, reason) of every file left out by ``skip_bad_images``.
    """

    train: VideoSet
    val: VideoSet | None
    test: VideoSet | None
    classes: list[str]
    mirrored: bool = True
    skipped: list[tuple[str, str]] = field(default_factory=list)

    task: ClassVar[str] = "classify"
