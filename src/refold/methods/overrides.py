"""Sizes of single layers: ``overrides=((path, size), ...)`` of the methods with one size, ``*`` allowed in paths."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from refold.errors import SiteError
from refold.methods.base import is_count

__all__ = ["Sizes", "are_sizes", "as_tuples", "require_matched", "size_at"]

Sizes = tuple[tuple[str, int], ...]


def as_tuples(overrides: object) -> object:
    """With the lists that come from JSON as tuples; anything else as it is."""
    if not isinstance(overrides, tuple):
        return overrides
    return tuple(tuple(item) if isinstance(item, list) else item for item in overrides)


def are_sizes(value: object) -> bool:
    """A tuple of ``(path, size)``."""
    return isinstance(value, tuple) and all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and item[0] != "" and is_count(item[1])
        for item in value
    )


def size_at(path: str, overrides: Sizes, default: int) -> int:
    """The size of the layer at ``path``: that of the first override that matches, else ``default``."""
    return next((size for pattern, size in overrides if fnmatchcase(path, pattern)), default)


def require_matched(patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Raise :class:`SiteError` for an override that matches none of the adapted layers: a misspelt path."""
    found = tuple(paths)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in found):
            raise SiteError("none of the adapted layers matches this override", where=pattern, remedy="Correct it")
