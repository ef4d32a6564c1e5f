"""From a video file to frames of 8 bits: the frames that are asked for, and no more than must be decoded on the way.

A video is read in two steps. All its packets are looked at, which needs no decoding: they say when each frame is shown
and which frames decoding can begin at, whether or not the container knows how many there are. Then the reader seeks to
the last such frame before one that is wanted, unless it is past that already, and decodes from there. Files whose
packets do not tell (raw streams, AVI) are decoded from the beginning, and so are those whose packets tell wrong: of a
stream that is not shown in the order of its decoding, as if it were.

* Any pixel format becomes RGB; a rotation that the file asks players for is applied; frames of another size than the
  first (streams may change it) are scaled to that.
* Decoding takes one thread a video: several videos are decoded at a time by the workers of a loader.
* A file that cannot be decoded, whose packets are damaged, or that ends long before its own length is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from refold.errors import DataError, MissingExtraError
from refold.video.sampling import Clock

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

__all__ = ["EXTENSIONS", "Video", "open_video"]

#: Suffixes, in lower case, of the files that count as videos in a folder.
EXTENSIONS = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".h264", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv"}
    | {".ts", ".vob", ".webm", ".wmv"}
)
_REMEDY = "Repair or remove it, or leave such files out with skip_bad_images=True (--skip-bad-images)"
#: Containers without presentation times: what is read as such is a guess, which some encoders defeat.
_UNTIMED = ("avi",)
#: Containers that state their length and do not guess it; a file that holds less than this share of it is truncated.
_EXACT, _LEAST = ("matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"), 0.9


@contextmanager
def open_video(path: str) -> Iterator[Video]:
    """The video stream of a file, for the duration of the block.

    Raises:
        DataError: the file is missing, no video, damaged or truncated; also what goes wrong inside the block while
            decoding. The message names the file.
        MissingExtraError: PyAV is not installed.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise MissingExtraError.of("av", "video") from error
    try:
        with av.open(path, metadata_errors="ignore") as container:
            yield Video(container)
    except DataError as error:
        raise DataError(error.reason, where=path, remedy=error.remedy or _REMEDY) from None
    except (FFmpegError, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        raise DataError(f"the video cannot be decoded ({reason})", where=path, remedy=_REMEDY) from error


class Video:
    """One video stream; see :func:`open_video`.

    Attributes:
        clock: when its frames are shown.
    """

    def __init__(self, container: InputContainer) -> None:
        self._container, self._stream = container, _stream(container)
        shown, end = self._look_at_packets()
        timed = container.format.name not in _UNTIMED and all(packet.time is not None for packet in shown)
        if self._stream.codec_context.has_b_frames and all(packet.time == packet.decoded for packet in shown):
            timed = False  # some muxers write the times of decoding as those of showing
        shown.sort(key=lambda packet: packet.time or 0)
        self._times = np.array([packet.time for packet in shown] if timed else [], dtype=np.int64)
        self._keys = np.array([number for number, packet in enumerate(shown) if packet.key])
        last = shown[-1].duration if shown else 0
        # Times that are there twice tell nothing: some old files have them.
        distinct = len(self._times) > 0 and bool((np.diff(self._times) > 0).all())
        self._seekable = distinct and len(self._keys) > 0 and self._can_seek()
        if not self._seekable:
            self._times, last = self._decoded_times(), 0
        if not len(self._times):
            raise DataError("holds no frame")
        second = 1 / (self._stream.time_base or Fraction(1, 90_000))
        self.clock = Clock.of(self._times, last, second, self._stream.average_rate)
        self._require_whole(end)

    def __len__(self) -> int:
        """How many frames there are."""
        return len(self._times)

    def read(self, numbers: Sequence[int]) -> Tensor:
        """The frames with these numbers, (T, 3, H, W) uint8; they may repeat, in any order.

        Raises:
            DataError: a frame that cannot be decoded.
        """
        wanted = sorted(set(numbers))
        found = dict(zip(wanted, self._find(wanted), strict=True))
        return torch.from_numpy(np.stack([found[number] for number in numbers])).permute(0, 3, 1, 2).contiguous()

    def check(self) -> None:
        """Decode all frames.

        Raises:
            DataError: they cannot be decoded.
        """
        found = sum(1 for _, frame in self._numbered(self._restart()) if _require_whole(frame))
        if found != len(self):
            raise DataError(f"{len(self) - found} of {len(self)} frames cannot be decoded")

    def _look_at_packets(self) -> tuple[list[_Packet], Fraction]:
        """The packets of frames that are shown, and when the last packet of any stream ends, in seconds."""
        shown, end = [], Fraction(0)
        for packet in self._container.demux():
            if packet.pts is not None and packet.time_base:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index != self._stream.index or not packet.size:
                continue
            if packet.is_corrupt:
                raise DataError("a part of the video is damaged or missing")
            if not packet.is_discard:
                shown.append(_Packet(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe))
        return shown, end

    def _find(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """RGB pixels (H, W, 3) of frames with ascending numbers."""
        frames: Iterator[tuple[int, Any]] | None = None
        place, shape = -1, None  # the number of the last frame that was decoded
        for number in wanted:
            key = self._key_before(number)
            starts = iter([frames]) if frames is not None and key <= place + 1 else self._beginnings(key)
            place, frame = -1, cast(Any, None)
            while place != number and (frames := next(starts, None)) is not None:
                place, frame = _first_from(frames, number)
            if place != number:
                raise DataError(f"frame {number + 1} of {len(self)} cannot be decoded")
            pixels = _pixels(_require_whole(frame), shape)
            shape = shape or pixels.shape[:2]
            yield _turned(pixels, frame.rotation)

    def _beginnings(self, key: int) -> Iterator[Iterator[tuple[int, Any]]]:
        """Frames with their numbers from ``key`` on; then, for files whose index is wrong, from the very first on."""
        if self._seekable:
            self._container.seek(int(self._times[key]), stream=self._stream, backward=True)
            yield self._numbered(self._container.decode(self._stream))
        yield self._numbered(self._restart())

    def _numbered(self, frames: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        if not self._seekable:
            yield from enumerate(frames)
            return
        for frame in frames:
            number = len(self) if frame.pts is None else int(np.searchsorted(self._times, frame.pts))
            if number < len(self) and self._times[number] == frame.pts:
                yield number, frame

    def _key_before(self, number: int) -> int:
        """The last frame, up to ``number``, that decoding can begin at."""
        if not self._seekable:
            return 0
        return int(self._keys[max(np.searchsorted(self._keys, number, side="right") - 1, 0)])

    def _restart(self) -> Iterator[Any]:
        """All frames from the first on, without seeking, which raw streams cannot."""
        import av

        with av.open(self._container.name, metadata_errors="ignore") as again:
            yield from again.decode(_stream(again))

    def _can_seek(self) -> bool:
        from av.error import FFmpegError

        try:
            self._container.seek(int(self._times[0]), stream=self._stream, backward=True)
        except FFmpegError:
            return False
        return True

    def _decoded_times(self) -> np.ndarray:
        """Presentation times of the frames as they are decoded; their numbers, where those do not ascend either."""
        times = [frame.pts for frame in self._restart()]
        if all(pts is not None for pts in times) and all(a < b for a, b in pairwise(times)):
            return np.array(times, dtype=np.int64)
        return np.arange(len(times))

    def _require_whole(self, end: Fraction) -> None:
        length = Fraction(self._container.duration or 0, 1_000_000)
        if length and self._container.format.name in _EXACT:
            there = end - min(Fraction(self._container.start_time or 0, 1_000_000), 0)
            if there < _LEAST * length:
                raise DataError(f"is truncated: {float(there):.2f} of {float(length):.2f} seconds are there")


class _Packet(NamedTuple):
    """When a packet says that its frame is shown and decoded, and for how long, in ticks.

    ``key`` is whether decoding can begin with it.
    """

    time: int | None
    decoded: int | None
    duration: int
    key: bool


def _stream(container: InputContainer) -> VideoStream:
    """The main video of a file."""
    stream: Any = container.streams.best("video")
    if stream is None:
        raise DataError("holds no video")
    stream.thread_count = 1
    return stream


def _first_from(frames: Iterator[tuple[int, Any]], number: int) -> tuple[int, Any]:
    """The first of the frames that are left whose number is at least that; None as a frame if there is none."""
    return next((pair for pair in frames if pair[0] >= number), (-1, None))


def _require_whole(frame: Any) -> Any:
    if frame.is_corrupt:
        raise DataError("a frame is damaged")
    return frame


def _pixels(frame: Any, shape: tuple[int, int] | None) -> np.ndarray:
    """(H, W, 3) uint8 of a decoded frame, scaled to ``shape``, before it is turned."""
    height, width = shape or (frame.height, frame.width)
    return frame.reformat(width=width, height=height, format="rgb24").to_ndarray()


def _turned(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """Pixels turned counter-clockwise as the file asks players to, in steps of 90 degrees."""
    return np.rot90(pixels, round(rotation / 90)) if round(rotation / 90) % 4 else pixels
