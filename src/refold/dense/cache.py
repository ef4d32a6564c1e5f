"""Features of a frozen backbone, computed once and kept: later epochs train what is around it alone.

A record holds what :class:`refold.dense.replay.Replay` keeps of one view of one image, one tensor after the other, in
bfloat16 or float32. All records are one array, in memory or in a memory-mapped file, at places known from the start:
its size is known, and the disk's space taken, before anything is computed. Records are made when they are first asked
for. A folder has three files:

    header.json   what the records were made from and how, see :func:`_describe`; compared to the last bit when opened
    features.bin  the records
    written.bin   the CRC-32 of each, 0 where there is none yet; one that does not fit is made again

An image is known by its content, so that a copied or touched file stays the same and an edited one does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refold.data.images import free_memory
from refold.dense.encoder import Encoder
from refold.dense.replay import Replay, Tap, compute_dtype
from refold.errors import DataError, StoreError
from refold.fingerprint import body_tensors, compare, fingerprint
from refold.hosting import adapter_parameters

__all__ = ["CachedEncoder", "Estimate", "estimate", "identify"]

Key = tuple[int, int]  # image and view, from 0
_FORMAT = 1
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_HEADER, _FEATURES, _WRITTEN = "header.json", "features.bin", "written.bin"
_ANOTHER = "Delete the folder, or name another one"


@dataclass(frozen=True)
class Estimate:
    """What a cache takes.

    Attributes:
        per_image: bytes of one view of one image; of the largest one, where sizes differ.
        total: bytes of all.
    """

    per_image: int
    total: int

    def __str__(self) -> str:
        return f"{self.per_image / 2**20:.2f} MiB an image and view, {self.total / 2**30:.2f} GiB in all"


def estimate(
    encoder: Encoder, sizes: Iterable[tuple[int, int]], *, views: int = 1, dtype: str = "bfloat16"
) -> Estimate:
    """What a cache of images of these ``sizes`` (height, width) would take; nothing is written.

    Raises:
        SiteError: the encoder's features cannot be cached, see :class:`refold.dense.replay.Replay`.
        DataError: ``views`` or ``dtype`` out of range, or no image.
    """
    return _estimate(_records(Replay(encoder), list(sizes), views, dtype), views)


def identify(paths: Iterable[str | Path]) -> list[str]:
    """What tells image files apart: a hash of the content of each.

    Raises:
        DataError: a file cannot be read.
    """
    found = []
    for path in paths:
        try:
            found.append(hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest())
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from error
    return found


class CachedEncoder:
    """An encoder whose backbone sees every view of every image once.

    Used around each forward of the model that the encoder is in, a segmenter or detector, in training mode or not::

        with cached.serving([(image, view), ...]):
            outputs = model(images)

    Views are counted from 0, at most ``views`` an image; that view v of an image looks the same each time is the
    caller's part. What draws in the backbone in training mode (DropPath, dropout) is off, as in evaluation.

    Args:
        encoder: its body is frozen, and carries E3VA or nothing; where it computes.
        images: what tells each image apart, see :func:`identify`.
        sizes: (height, width) of each as the encoder sees it: resized, augmented and padded. All views have it.
        views: of each image.
        pixels: whatever else the views are a function of (preprocessing, augmentation, seed), as plain data.
        folder: where records are kept; taken up again if it is there. None keeps them in memory.
        dtype: ``"bfloat16"`` or ``"float32"``, of the records.

    Attributes:
        encoder, folder: as above.
        estimate: what the records take.

    Raises:
        SiteError: the encoder's features cannot be cached, see :class:`refold.dense.replay.Replay`.
        DataError: an argument out of range, or not enough memory.
        StoreError: the folder's records are of something else, which is named, or the disk has not enough space.
    """

    def __init__(
        self,
        encoder: Encoder,
        images: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        *,
        views: int = 1,
        pixels: Mapping[str, Any] | None = None,
        folder: str | Path | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        self.encoder, self._views = encoder, views
        self._sizes = [(int(height), int(width)) for height, width in sizes]
        if len(images) != len(self._sizes):
            raise DataError(f"{len(images)} images have {len(self._sizes)} sizes", where="sizes")
        self._replay = Replay(encoder)
        self._compute = compute_dtype(encoder.body)
        records = _records(self._replay, self._sizes, views, dtype)
        self.estimate = _estimate(records, views)
        self._starts = np.concatenate(([0], np.repeat(records, views).cumsum())).tolist()
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            if self.estimate.total > (free := free_memory()):
                raise DataError(
                    f"the features need {self.estimate}, and {free / 2**30:.2f} GiB of memory are free",
                    where="features",
                    remedy="Keep them on disk, or use fewer views or smaller images",
                )
            self._bytes: np.ndarray = np.empty(self.estimate.total, np.uint8)
            self._sums: np.ndarray = np.zeros(views * len(images), np.uint32)
        else:
            pixels = json.loads(json.dumps(dict(pixels or {}), sort_keys=True))
            header = _describe(self._replay, images, self._sizes, views, pixels, dtype)
            if not self.folder.exists():
                _create(self.folder, header, self.estimate, len(self._starts) - 1)
            self._bytes, self._sums = _open(self.folder, header, encoder.body, self.estimate.total)
        self._values = torch.from_numpy(self._bytes).view(_DTYPES[dtype])
        self._checked: set[int] = set()

    @contextmanager
    def serving(self, keys: Sequence[Key], *, blank: bool = False) -> Iterator[None]:
        """Inside, the encoder gives the maps of ``keys`` from their records, and makes those that are missing.

        Args:
            keys: (image, view) of each image of the batch, in order.
            blank: the images that will be given are of the right size alone, and no record may be missing; saves to
                read them.

        Raises:
            DataError: a key that is not there; in the forward, images of another number or size.
        """
        slots = [self._slot(key) for key in keys]
        if blank and (lost := self.missing(keys)):
            raise DataError("has no record", where=f"image {lost[0][0]}, view {lost[0][1]}", remedy="Give its pixels")

        def maps(images: Tensor) -> list[Tensor]:
            size = self._check(images, keys)
            todo = [k for k, slot in enumerate(slots) if not self._has(slot)]
            if todo:
                self._write([slots[k] for k in todo], self._replay.record(images[todo]))
            return self._replay.maps(self._read(slots, size), size)

        with self.encoder.fed(maps):
            yield

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of ``keys`` of which there is no record yet.

        Raises:
            DataError: a key that is not there.
        """
        return [key for key in keys if not self._has(self._slot(key))]

    # -- records ------------------------------------------------------------------------------------------------

    def _slot(self, key: Key) -> int:
        image, view = key
        if not (0 <= image < len(self._sizes) and 0 <= view < self._views):
            raise DataError(
                f"is not among {len(self._sizes)} images with {self._views} views each",
                where=f"image {image}, view {view}",
            )
        return image * self._views + view

    def _check(self, images: Tensor, keys: Sequence[Key]) -> tuple[int, int]:
        size = (images.shape[-2], images.shape[-1])
        if len(images) != len(keys) or not keys:
            raise DataError(f"{len(images)} images have {len(keys)} keys", where="keys")
        for image, view in keys:
            if self._sizes[image] != size:
                rows, columns = self._sizes[image]
                raise DataError(
                    f"was to be seen at {rows}x{columns}, and is {size[0]}x{size[1]} here",
                    where=f"image {image}, view {view}",
                    remedy="Give every image the size it was announced with; a batch that pads it changes its features",
                )
        if compute_dtype(self.encoder.body) != self._compute:
            raise DataError(
                f"were computed in {self._compute}, not in {compute_dtype(self.encoder.body)}",
                where="features",
                remedy="Use one precision, or make the cache anew",
            )
        return size

    def _has(self, slot: int) -> bool:
        """Whether there is a record, and the very one that was written."""
        if slot in self._checked:
            return True
        kept = bool(self._sums[slot]) and int(self._sums[slot]) == self._sum(slot)
        if kept:
            self._checked.add(slot)
        return kept

    def _sum(self, slot: int) -> int:
        size = self._values.element_size()
        return zlib.crc32(self._bytes[self._starts[slot] * size : self._starts[slot + 1] * size]) or 1

    def _write(self, slots: Sequence[int], taps: Sequence[Tensor]) -> None:
        for k, slot in enumerate(slots):
            record = self._values[self._starts[slot] : self._starts[slot + 1]]
            torch.cat([tap[k].flatten().to(self._values.dtype) for tap in taps], out=record.new_empty(0)) if False else None
            at = 0
            for tap in taps:
                count = tap[k].numel()
                record[at : at + count] = tap[k].flatten()
                at += count
            self._sums[slot] = self._sum(slot)
            self._checked.add(slot)

    def _read(self, slots: Sequence[int], size: tuple[int, int]) -> list[Tensor]:
        """The taps of a batch, in the dtypes that the backbone gave them."""
        device = next(self.encoder.body.parameters()).device
        taps, at = [], 0
        for tap in self._replay.taps(size):
            parts = [self._values[self._starts[slot] + at : self._starts[slot] + at + tap.elements] for slot in slots]
            taps.append(torch.stack(parts).view(len(slots), *tap.shape).to(device).to(tap.dtype))
            at += tap.elements
        return taps


def _records(replay: Replay, sizes: Sequence[tuple[int, int]], views: int, dtype: str) -> list[int]:
    """Bytes of a record of each image."""
    if dtype not in _DTYPES:
        raise DataError(f"must be one of {', '.join(_DTYPES)}, not {dtype!r}", where="dtype")
    if views < 1:
        raise DataError(f"must be 1 or more, not {views}", where="views")
    if not sizes:
        raise DataError("there is no image", where="images")
    found = {}
    return [0 for _ in sizes]


def _estimate(records: Sequence[int], views: int) -> Estimate:
    return Estimate(max(records), views * sum(records))
