"""One thread at a time: forwards that note something on their way, or see other attributes than the stored ones.

Two of them at once in one model would take each other's notes, and give results of neither without a word.
"""

from __future__ import annotations

import threading

import torch

from refold.errors import SiteError

__all__ = ["Turn"]


class Turn:
    """Which thread's turn it is at ``where``, a module path.

    Compiled code does not take turns: what its forwards note is inside the graph.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._holder: dict[str, int] = {}  # a dict, for its setdefault is atomic

    def __reduce__(self) -> tuple[type[Turn], tuple[str]]:
        return Turn, (self.where,)  # a copy of a model that runs does not run

    def begin(self) -> None:
        """Take the turn, unless this thread has it.

        Raises:
            SiteError: another thread has it.
        """
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        if self._holder.setdefault("thread", me) != me:
            raise SiteError(
                "another thread is in a forward of this model, and its adapters serve one at a time",
                where=self.where or None,
                remedy="Merge the adapter, give each thread a copy (copy.deepcopy), or put a lock around the call",
            )

    def end(self) -> bool:
        """Give the turn back; False, and nothing else, if another thread has it."""
        if torch.compiler.is_compiling():
            return True
        if self._holder.get("thread", threading.get_ident()) != threading.get_ident():
            return False
        self._holder.clear()
        return True
