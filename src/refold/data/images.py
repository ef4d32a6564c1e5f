"""A set of labelled images: read from files, or held in memory as uint8 once decoded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from refold.data.decoding import MODES, Rendering, decode, render
from refold.data.parallel import for_each
from refold.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = [
    "CACHES",
    "ImageSet",
    "Members",
    "Task",
    "Virtual",
    "content_of",
    "free_memory",
    "open_image",
    "pick",
    "render_all",
]

Task = Literal["classify", "multilabel", "regress"]

CACHES = ("auto", "memory", "stream")
_MOST_BYTES = 4 << 30
_MOST_SHARE = 0.25  # of the memory that is free


class Virtual(Sequence[str]):
    """Names of images that are no files of their own; they are made when they are asked for."""


class Members(Virtual):
    """Image files inside archives; as a sequence, what they are called.

    Args:
        archives: files that hold them as they are.
        archive: (N,) int32, which archive each is in.
        names: (N,) bytes, its name there, in UTF-8.
        offsets, sizes: (N,) int64, where it lies, in bytes.
    """

    def __init__(
        self, archives: list[str], archive: np.ndarray, names: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
    ) -> None:
        self._archives, self._arrays = archives, (archive, names, offsets, sizes)

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, index: int) -> str:  # type: ignore[override] (slices are never taken)
        archive, names, _, _ = self._arrays
        return f"{self._archives[archive[index]]}/{bytes(names[index]).decode()}"

    def pick(self, indices: Sequence[int]) -> Members:
        """Those at ``indices``, in that order."""
        return Members(self._archives, *(array[list(indices)] for array in self._arrays))

    def read(self, index: int) -> bytes:
        """The file's content.

        Raises:
            DataError: the archive cannot be read.
        """
        archive, _, offsets, sizes = self._arrays
        try:
            with Path(self._archives[archive[index]]).open("rb") as file:
                file.seek(int(offsets[index]))
                return file.read(int(sizes[index]))
        except OSError as error:
            raise DataError(f"cannot be read ({error})", where=self[index]) from error


class ImageSet:
    """N images and their targets.

    Args:
        paths: N image files.
        targets: (N,) class indices, (N, K) zeros and ones, or (N,) numbers, by ``task``.
        task: ``"classify"``, ``"multilabel"`` or ``"regress"``.
        classes: names of the K classes; None for a regression.
        channels: of :meth:`read`: 1 (grey) or 3 (RGB).
        cache: ``"memory"`` holds decoded images, ``"stream"`` decodes at every reading, ``"auto"`` holds those sets
            that need at most 4 GiB and a quarter of the free memory. What is read is the same to the bit.
        licence: terms of the images, where known.
        decoded: (N, H, W) or (N, H, W, 3) uint8: the files' content, if it is at hand; never written to.

    Attributes:
        paths, task, classes, channels, cache, licence: as above.
        targets: (N,) int64, (N, K) float32 or (N,) float32.

    Raises:
        DataError: arguments that contradict each other.
    """

    def __init__(
        self,
        paths: Iterable[str | Path] | Virtual,
        targets: Tensor,
        *,
        task: Task = "classify",
        classes: list[str] | None = None,
        channels: int = 3,
        cache: str = "auto",
        licence: str | None = None,
        decoded: np.ndarray | None = None,
    ) -> None:
        self.paths: Sequence[str] = paths if isinstance(paths, Virtual) else [str(path) for path in paths]
        self.targets = targets.long() if task == "classify" else targets.float()
        self.task: Task = task
        self.classes, self.channels, self.cache, self.licence = classes, channels, cache, licence
        if channels not in MODES:
            raise DataError(f"must be 1 (grey) or 3 (RGB), not {channels}", where="channels")
        if cache not in CACHES:
            raise DataError(f"must be one of {', '.join(CACHES)}, not {cache!r}", where="cache")
        if len(targets) != len(self.paths):
            raise DataError(f"{len(self.paths)} images have {len(targets)} targets", where="targets")
        self._decoded = decoded
        self._rows = torch.arange(len(self.paths))  # of these images in _decoded
        self._held: dict[Rendering, tuple[Tensor, Tensor]] = {}  # images, and the rows of these in them

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images, task={self.task!r}, classes={self.classes})"

    def subset(self, indices: Iterable[int] | Tensor) -> ImageSet:
        """The images at ``indices``, in that order; what is held in memory is shared, not copied.

        Raises:
            DataError: an index outside the set.
        """
        chosen = self._checked(indices)
        part = copy.copy(self)
        part.paths = pick(self.paths, chosen.tolist())
        part.targets = self.targets[chosen]
        part._rows = self._rows[chosen]
        part._held = {key: (images, rows[chosen]) for key, (images, rows) in self._held.items()}
        return part

    def read(self, indices: Iterable[int] | Tensor, size: tuple[int, int]) -> Tensor:
        """Images resized straight to ``size`` (height, width), bicubic: (B, channels, H, W) uint8.

        Raises:
            DataError: an index outside the set, or a file that cannot be decoded.
        """
        return self.render(indices, Rendering(size, self.channels))

    def render(self, indices: Iterable[int] | Tensor, rendering: Rendering) -> Tensor:
        """Images as ``rendering`` says, (B, C, H, W) uint8: from memory if :meth:`hold` put them there.

        Raises:
            DataError: as :meth:`read`.
        """
        chosen = self._checked(indices)
        if rendering in self._held:
            images, rows = self._held[rendering]
            return images[rows[chosen]]
        return self._render(chosen.tolist(), rendering)

    def hold(self, rendering: Rendering) -> bool:
        """Decode all images now and keep them as uint8, unless ``cache`` or the free memory forbids.

        Returns:
            whether they are in memory.

        Raises:
            DataError: a file that cannot be decoded, or ``cache="memory"`` and not enough of it.
        """
        if rendering not in self._held and self._should_hold(rendering):
            self._held[rendering] = self._render(range(len(self)), rendering), torch.arange(len(self))
        return rendering in self._held

    def source_bytes(self, index: int) -> bytes:
        """What the image is made of, and told from others by: its file, or its pixels where there is none.

        Raises:
            DataError: the file cannot be read.
        """
        if self._decoded is None:
            return content_of(self.paths, index)
        return self._decoded[int(self._rows[index])].tobytes()

    def undecodable(self) -> dict[int, str]:
        """Index and reason of every image that cannot be decoded; all are opened now."""
        bad: dict[int, str] = {}

        def check(i: int) -> None:
            try:
                self._open(i, channels=3)
            except DataError as error:
                bad[i] = error.reason

        for_each(check, len(self), "checking images")
        return dict(sorted(bad.items()))

    def _render(self, indices: list[int] | range, rendering: Rendering) -> Tensor:
        alone = torch.utils.data.get_worker_info() is None  # else threads would only compete with the other processes
        return render_all(lambda k: self._open(indices[k], rendering.channels), len(indices), rendering, threads=alone)

    def _open(self, index: int, channels: int):
        if self._decoded is None:
            return open_image(self.paths, index, channels)
        from PIL import Image

        return Image.fromarray(self._decoded[int(self._rows[index])]).convert(MODES[channels])

    def _should_hold(self, rendering: Rendering) -> bool:
        needed = len(self) * rendering.channels * rendering.size[0] * rendering.size[1]
        if self.cache == "stream":
            return False
        free = free_memory()
        if self.cache == "auto":
            return needed <= min(_MOST_BYTES, _MOST_SHARE * free)
        if needed > free:
            raise DataError(
                f"the decoded images need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free",
                where="cache",
                remedy='Use cache="auto" or "stream", or a smaller image size',
            )
        return True

    def _checked(self, indices: Iterable[int] | Tensor) -> Tensor:
        chosen = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices))
        if chosen.numel() == 0:
            return chosen.long().reshape(0)
        if chosen.ndim != 1 or chosen.dtype == torch.bool or chosen.is_floating_point():
            raise DataError(
                f"must be a sequence of whole numbers, not {chosen.dtype} of {list(chosen.shape)}", where="indices"
            )
        if int(chosen.min()) < 0 or int(chosen.max()) >= len(self):
            raise DataError(
                f"indices {int(chosen.min())} to {int(chosen.max())} of {len(self)} images", where="indices"
            )
        return chosen.long()


def pick(paths: Sequence[str], indices: Sequence[int]) -> Sequence[str]:
    """The image files at ``indices``."""
    return paths.pick(indices) if isinstance(paths, Members) else [paths[i] for i in indices]


def content_of(paths: Sequence[str], index: int) -> bytes:
    """The file of one of several images.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(paths, Members):
        return paths.read(index)
    try:
        return Path(paths[index]).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=paths[index]) from error


def open_image(paths: Sequence[str], index: int, channels: int) -> Image.Image:
    """One of several image files, see :func:`refold.data.decoding.decode`."""
    return decode(paths[index], channels, paths.read(index) if isinstance(paths, Members) else None)


def render_all(open_: Callable[[int], Image.Image], count: int, rendering: Rendering, *, threads: bool) -> Tensor:
    """The images ``open_(0)`` to ``open_(count - 1)`` as ``rendering`` says, (count, C, H, W) uint8."""
    images = torch.empty((count, rendering.channels, *rendering.size), dtype=torch.uint8)
    array = images.numpy()

    def fill(k: int) -> None:
        array[k] = render(open_(k), rendering)

    if threads:
        for_each(fill, count, "decoding images")
    else:
        for k in range(count):
            fill(k)
    return images


def free_memory() -> float:
    """Bytes this process may still take: of the machine, or of its control group if that is less."""
    import psutil

    free = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = (group / "memory.current").read_text().strip()
        return free if limit == "max" else min(free, float(limit) - float(used))
    except (OSError, ValueError):  # no control groups here
        return free
