"""Where converted weights are kept, and how a file is replaced without ever being half written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_path", "cache_dir"]


def cache_dir() -> Path:
    """``$REFOLD_CACHE`` if set, else ``~/.cache/refold``; not created here."""
    return Path(os.environ.get("REFOLD_CACHE") or Path.home() / ".cache" / "refold").expanduser()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block succeeds and vanishes if it fails.

    The parent folder is created. The temporary name keeps the suffix, because some writers look at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; safetensors would leave a private file
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
