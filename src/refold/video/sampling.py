"""Which frames of a video make a clip.

Of a video of N frames that lasts D seconds, T frames are taken; ``stride`` is s:

=========  ============================================================================================================
name       what it takes
=========  ============================================================================================================
uniform    one frame of each of T equally long parts of the whole video, as TSN, and VideoMAE on SSv2, do: the one on
           screen at a random moment of the part in training, and in evaluation at its middle, or at (c + 1/2) / C of it
           for clip c of C
dense      what is on screen every s/30 seconds from a start on, whatever the video's own rate: SlowFast's window of
           T s / 30 seconds (its target rate is 30 frames a second). The start is random in training; in evaluation the
           window is in the middle, or C of them are spread evenly from the first to the last place where one fits
strided    every s-th frame of the file from a start on, whatever its rate: mmaction's ``SampleFrames`` and VideoMAE on
           Kinetics. Starts are those of ``dense``, for a window of T s frames
=========  ============================================================================================================

On a video of 30 frames a second ``dense`` and ``strided`` are the same. Where the window is longer than the video, it
starts with the video, and the last frame is repeated at its end (as SlowFast and VideoMAE do; mmaction starts again
from the first frame). ``uniform`` repeats frames in place where there are fewer than T.

"On screen" is meant by presentation time: a frame is there from its own time on to that of the next, so videos of
variable rate are sampled evenly in time by ``uniform`` and ``dense``. Frames of a constant rate count as equally long
although a container rounds their times, to milliseconds in Matroska and WebM.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from refold.errors import DataError

__all__ = ["CROPS", "SAMPLINGS", "Clock", "Sampling", "Views"]

#: Names of :attr:`Sampling.kind`; the first is the default.
SAMPLINGS = ("uniform", "dense", "strided")
#: How many crops of a clip a view of evaluation can have: the centre, or both ends of the longer side as well.
CROPS = (1, 3)
#: Frames a second that the stride of ``dense`` counts.
_RATE = 30
_MOST_FRAMES, _MOST_STRIDE = 4096, 100_000  # more is a mistake, or a stranger's file


@dataclass(frozen=True)
class Clock:
    """When the frames of a video are on screen, in ticks.

    Attributes:
        starts: (N,) int64, ascending: the tick from which on each frame is shown; the first is 0.
        end: the tick at which the last one goes.
        second: ticks of a second.
    """

    starts: np.ndarray
    end: int
    second: Fraction

    def shown(self, moments: list[int]) -> list[int]:
        """The frame on screen at each tick; the last one from the end on."""
        return (np.searchsorted(self.starts, moments, side="right") - 1).tolist()

    @classmethod
    def of(cls, times: np.ndarray, last: int, second: Fraction, rate: Fraction | None) -> Clock:
        """The clock of frames with these presentation times.

        Args:
            times: (N,) int64, strictly ascending, in the container's ticks.
            last: ticks that the last frame is shown; 0 if unknown.
            second: the container's ticks of a second.
            rate: frames a second on average as the container says; None if it does not.
        """
        count, starts = len(times), times - times[0]
        if count == 1:
            return cls(starts, max(last, 1), second)
        gap = Fraction(int(starts[-1]), count - 1)
        even = np.arange(count) * float(gap)
        if np.abs(starts - even).max() <= 1:  # a constant rate, but for a tick of rounding: a tick is a frame
            return cls(np.arange(count), count, rate or second / gap)
        return cls(starts, int(starts[-1]) + (last or round(gap)), second)


@dataclass(frozen=True)
class Sampling:
    """How clips are cut out of videos.

    Args:
        kind: one of :data:`SAMPLINGS`.
        frames: of a clip, T.
        stride: between them, s; without meaning for ``uniform``.

    Raises:
        DataError: an unknown kind, or a number out of range.
    """

    kind: str = "uniform"
    frames: int = 8
    stride: int = 4

    def __post_init__(self) -> None:
        if self.kind not in SAMPLINGS:
            raise DataError(f"must be one of {', '.join(SAMPLINGS)}, not {self.kind!r}", where="sampling")
        for name, most in (("frames", _MOST_FRAMES), ("stride", _MOST_STRIDE)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise DataError(f"must be a whole number of 1 to {most}, not {value!r}", where=name)

    def random(self, clock: Clock, source: torch.Generator) -> list[int]:
        """The T frames of a clip in training, ascending, drawn from ``source``."""
        if self.kind == "uniform":
            draws = torch.rand(self.frames, generator=source, dtype=torch.float64).tolist()
            return clock.shown([int((k + u) * clock.end / self.frames) for k, u in enumerate(draws)])
        draw = torch.rand((), generator=source, dtype=torch.float64).item()
        if self.kind == "dense":
            return self._from(clock, Fraction(draw) * self._slack(clock))
        return self._from(clock, Fraction(int(draw * (self._slack(clock) + 1))))

    def even(self, clock: Clock, clip: int = 0, clips: int = 1) -> list[int]:
        """The T frames of clip ``clip`` of ``clips`` in evaluation, ascending."""
        if self.kind == "uniform":
            parts = self.frames * clips * 2
            return clock.shown([clock.end * (2 * (k * clips + clip) + 1) // parts for k in range(self.frames)])
        place = Fraction(clip, clips - 1) if clips > 1 else Fraction(1, 2)
        start = place * self._slack(clock)
        if self.kind == "strided":
            start = Fraction(round(start) if clips > 1 else int(start))
        return self._from(clock, start)

    def _slack(self, clock: Clock) -> Fraction:
        """How far a window can start from the beginning: ticks of ``dense``, frames of ``strided``."""
        if self.kind == "dense":
            return max(clock.end - self.frames * self.stride * clock.second / _RATE, Fraction(0))
        return Fraction(max(len(clock.starts) - self.frames * self.stride, 0))

    def _from(self, clock: Clock, start: Fraction) -> list[int]:
        if self.kind == "dense":
            step = self.stride * clock.second / _RATE
            return clock.shown([int(start + k * step) for k in range(self.frames)])
        last = len(clock.starts) - 1
        return [min(int(start) + k * self.stride, last) for k in range(self.frames)]


@dataclass(frozen=True)
class Views:
    """How a video is seen in evaluation: ``clips * crops`` times, and the probabilities are averaged.

    Args:
        sampling: which frames make a clip.
        clips: of a video, spread over it as :meth:`Sampling.even` says.
        crops: of a clip, one of :data:`CROPS`.

    Raises:
        DataError: a number out of range.
    """

    sampling: Sampling
    clips: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.clips, int) or not 1 <= self.clips <= _MOST_FRAMES:
            raise DataError(f"must be a whole number of 1 to {_MOST_FRAMES}, not {self.clips!r}", where="clips")
        if self.crops not in CROPS:
            raise DataError(f"must be one of {', '.join(map(str, CROPS))}, not {self.crops!r}", where="crops")

    @property
    def count(self) -> int:
        return self.clips * self.crops

    def choose(self, clock: Clock) -> list[list[int]]:
        """The frames of each clip."""
        return [self.sampling.even(clock, clip, self.clips) for clip in range(self.clips)]
