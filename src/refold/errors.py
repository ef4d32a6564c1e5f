"""The errors refold raises: each says where, why, and what to do instead."""

from __future__ import annotations

__all__ = [
    "BackboneError",
    "DataError",
    "MergeError",
    "MissingExtraError",
    "RefoldError",
    "SiteError",
    "StoreError",
]


class RefoldError(Exception):
    """Base of every error refold raises on purpose.

    Args:
        reason: what is wrong, in one sentence without a final period.
        where: the module path, file or option concerned, put before the reason.
        remedy: what the user can do, put after the reason.
    """

    def __init__(self, reason: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.reason, self.where, self.remedy = reason, where, remedy
        text = f"{where}: {reason}" if where else reason
        super().__init__(f"{text}. {remedy}" if remedy else text)

    def __reduce__(self):
        return (_rebuild, (type(self), self.reason, self.where, self.remedy))


def _rebuild(cls: type[RefoldError], reason: str, where: str | None, remedy: str | None) -> RefoldError:
    return cls(reason, where=where, remedy=remedy)


class SiteError(RefoldError):
    """An adapter cannot be placed where the method or the user wants it."""


class MergeError(RefoldError):
    """A fold is impossible, or the merged model does not equal the unmerged one."""


class StoreError(RefoldError):
    """An adapter file cannot be written, read, or does not fit the backbone."""


class DataError(RefoldError):
    """Images, labels or splits are missing, broken or inconsistent."""


class BackboneError(RefoldError):
    """A backbone spec or a weight file cannot be resolved."""


class MissingExtraError(RefoldError, ImportError):
    """An optional dependency is not installed; names the extra that brings it."""

    @classmethod
    def of(cls, package: str, extra: str) -> MissingExtraError:
        return cls(f"the package {package!r} is not installed", remedy=f"Run: pip install 'refold[{extra}]'")
