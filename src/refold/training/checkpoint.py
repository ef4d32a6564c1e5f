"""What a killed run needs to go on: written atomically after every epoch, or within it, read without running code.

Order, augmentation, dropout and mixing are functions of (seed, epoch): an epoch that starts from the same tensors ends
in the same tensors. Random states are stored only in the middle of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from refold.errors import DataError, RefoldError

__all__ = ["Best", "Checkpoint", "Midway", "check_same", "write_atomically"]

_FORMAT = 2
_READABLE = (1, 2)  # the first knew ends of epochs alone


@dataclass
class Best:
    """The epoch that validation prefers so far.

    Attributes:
        epoch: its number, counted from 1.
        worth: its value of the selected metric, negated where smaller is better.
        loss: its validation loss, which decides between equal values.
        tensors: its trained tensors by state-dict key, on the CPU.
    """

    epoch: int
    worth: float
    loss: float
    tensors: dict[str, Tensor]


@dataclass
class Midway:
    """Where one process is within an epoch.

    Attributes:
        losses: (steps made,) their losses.
        random: torch's random states, of the CPU and, if it trains there, the accelerator.
        problem: :meth:`refold.training.problem.Problem.state`.
    """

    losses: Tensor
    random: list[Tensor]
    problem: dict[str, Any]


@dataclass
class Checkpoint:
    """State at the end of an epoch, or within one.

    Attributes:
        epoch: finished epochs.
        settings: the recipe or config as plain data; a run resumed under another one is refused.
        data: sizes and classes of the data, checked likewise.
        attention: the kernel that was chosen; resumed runs do not measure again.
        tensors: trained tensors by state-dict key.
        optimizer: its ``state_dict()``.
        best: None until an epoch was evaluated.
        history: the lines of ``metrics.jsonl`` so far.
        seconds: time spent training so far.
        midway: of each process, within the epoch that follows; None at the end of an epoch.
    """

    epoch: int
    settings: dict[str, Any]
    data: dict[str, Any]
    attention: str
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]
    best: Best | None
    history: list[dict[str, Any]]
    seconds: float
    midway: list[Midway] | None = None

    def write(self, path: Path) -> None:
        """Replace ``path`` in one step: a crash at any moment leaves the old file or the new one.

        Raises:
            RefoldError: the file cannot be written.
        """
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["best"] = vars(self.best) if self.best else None
        record["midway"] = [vars(process) for process in self.midway] if self.midway else None
        record["format"] = _FORMAT
        write_atomically(path, lambda file: torch.save(record, file))

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Read with ``weights_only=True``: the file can hold tensors and plain data, never code.

        Raises:
            RefoldError: the file is damaged or was written by a newer version.
        """
        remedy = "Remove it to start the run again"
        try:
            record = torch.load(path, map_location="cpu", weights_only=True)
            if record["format"] not in _READABLE:
                raise RefoldError(f"has format {record['format']}, not {_FORMAT}", where=str(path), remedy=remedy)
            saved = cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})
            saved.best = Best(**record["best"]) if record["best"] else None
            saved.midway = [Midway(**process) for process in record["midway"]] if record.get("midway") else None
            return saved
        except RefoldError:
            raise
        except Exception as error:  # torch.load raises whatever the damage causes
            raise RefoldError(f"is damaged ({type(error).__name__})", where=str(path), remedy=remedy) from error


def check_same(before: dict[str, Any], now: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
    """Refuse to resume under other settings.

    Raises:
        DataError: naming the first field that differs, with both values.
    """
    for name in sorted((before.keys() | now.keys()) - set(ignore)):
        if before.get(name) != now.get(name):
            raise DataError(
                f"the run began with {before.get(name)!r} and cannot be resumed with {now.get(name)!r}",
                where=name,
                remedy="Use the settings of the first start, or another output folder",
            )


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write(file)`` fill a temporary file beside ``path``, bring it to disk, and rename it to ``path``.

    Raises:
        RefoldError: the disk is full or the folder cannot be written; what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        raise RefoldError(
            f"cannot be written ({error})", where=str(path), remedy="Free some space, then resume the run"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
