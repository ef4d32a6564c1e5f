"""Records of numbers at known places of one array, in memory or in a memory-mapped file whose space is taken first.

A folder has three files:

    header.json   what the records were made from, and how; the caller refuses what differs
    features.bin  the records
    written.bin   the CRC-32 of each, 0 where there is none yet; one that does not fit is made again
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refold.data.images import free_memory
from refold.errors import DataError, StoreError

__all__ = ["DTYPES", "Estimate", "Records"]

#: What the numbers of a record can be.
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FORMAT = 1
_HEADER, _FEATURES, _WRITTEN = "header.json", "features.bin", "written.bin"
_ANOTHER = "Delete the folder, or name another one"


@dataclass(frozen=True)
class Estimate:
    """What records take.

    Attributes:
        each: bytes of one; of the largest, where they differ.
        total: bytes of all.
    """

    each: int
    total: int

    def __str__(self) -> str:
        return f"{self.total / 2**30:.2f} GiB, {self.each / 2**20:.2f} MiB a record"


class Records:
    """Records by number.

    Args:
        lengths: how many numbers each has.
        dtype: a key of :data:`DTYPES`.
        folder: where they are; made unless it is there. None is in memory.
        header: what the records are made from, and how: plain data.
        differs: told what the header of a folder says, and what it should say: the difference, None if there is none.

    Attributes:
        estimate: what they take.

    Raises:
        DataError: too little memory.
        StoreError: too little space on the disk; or the folder is of something else.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        dtype: str,
        folder: Path | None = None,
        header: dict[str, Any] | None = None,
        differs: Callable[[dict[str, Any], dict[str, Any]], str | None] | None = None,
    ) -> None:
        self.estimate = self.needed(lengths, dtype)
        self._starts: list[int] = [0, *np.cumsum(lengths).tolist()]
        if folder is None:
            if self.estimate.total > (free := free_memory()):
                raise DataError(
                    f"need {self.estimate}; {free / 2**30:.2f} GiB of memory are free",
                    where="features",
                    remedy="Keep them on disk, or use fewer views or smaller images",
                )
            self._bytes, self._sums = np.empty(self.estimate.total, np.uint8), np.zeros(len(lengths), np.uint32)
        else:
            assert header is not None
            assert differs is not None
            said: dict[str, Any] = json.loads(json.dumps({"format": _FORMAT, **header}))
            if not folder.exists() or not any(folder.iterdir()):
                _create(folder, said, self.estimate, len(lengths))
            _require_same(folder, said, differs)
            self._bytes = np.memmap(folder / _FEATURES, np.uint8, "r+")
            self._sums = np.memmap(folder / _WRITTEN, np.uint32, "r+")
            if (self._bytes.size, self._sums.size) != (self.estimate.total, len(lengths)):
                raise StoreError("its files are not as long as they were made", where=str(folder), remedy=_ANOTHER)
        self._values = torch.from_numpy(self._bytes).view(DTYPES[dtype])
        self._checked: set[int] = set()

    @staticmethod
    def needed(lengths: Sequence[int], dtype: str) -> Estimate:
        """What records of these lengths would take.

        Raises:
            DataError: an unknown ``dtype``, or no record.
        """
        if dtype not in DTYPES:
            raise DataError(f"must be one of {', '.join(DTYPES)}, not {dtype!r}", where="dtype")
        if not lengths:
            raise DataError("there is no image", where="images")
        size = DTYPES[dtype].itemsize
        return Estimate(size * max(lengths), size * sum(lengths))

    def has(self, number: int) -> bool:
        """Whether there is a record, and the very one that was written."""
        if number not in self._checked and self._sums[number] and self._sums[number] == self._sum(number):
            self._checked.add(number)
        return number in self._checked

    def write(self, number: int, values: Tensor) -> None:
        """Make a record of ``values``, (n,)."""
        self._values[self._starts[number] : self._starts[number + 1]] = values
        self._sums[number] = self._sum(number)
        self._checked.add(number)

    def read(self, numbers: Sequence[int], start: int, length: int) -> Tensor:
        """``length`` numbers of each record from ``start`` on, (records, length), copied."""
        starts = [self._starts[number] + start for number in numbers]
        return torch.stack([self._values[first : first + length] for first in starts])

    def _sum(self, number: int) -> int:
        size = self._values.element_size()
        return zlib.crc32(self._bytes[self._starts[number] * size : self._starts[number + 1] * size].data) or 1


def _create(folder: Path, header: dict[str, Any], needed: Estimate, count: int) -> None:
    """Put a folder there, its space taken; another process may be first.

    Raises:
        StoreError: there is not so much space.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    shortage = StoreError(
        f"the features need {needed}, and {free / 2**30:.2f} GiB are free",
        where=str(folder),
        remedy="Choose another disk, or use fewer views or smaller images",
    )
    if free < needed.total:
        raise shortage
    draft = Path(mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        sizes = {_FEATURES: needed.total, _WRITTEN: 4 * count}
        for name, size in sizes.items():
            with (draft / name).open("wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(
                        file.fileno(), 0, size
                    )  # a full disk would kill the process that writes to a map
                file.truncate(size)
        (draft / _HEADER).write_text(json.dumps(header), encoding="utf-8")
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / _HEADER).exists():
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise shortage from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _require_same(
    folder: Path, header: dict[str, Any], differs: Callable[[dict[str, Any], dict[str, Any]], str | None]
) -> None:
    try:
        found = json.loads((folder / _HEADER).read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            reason = f"is of format {found['format']}, not {_FORMAT}"
        else:
            reason = differs(found, header)
            reason = reason and f"its features are of something else: {reason}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"holds no features ({error})", where=str(folder), remedy=_ANOTHER) from error
    if reason is not None:
        raise StoreError(reason, where=str(folder), remedy=_ANOTHER)
