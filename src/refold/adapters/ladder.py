"""Adapters in a row from block to block: each hands a state on to the next within one forward."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from refold.adapters.recall import Forward
from refold.adapters.side import SideAdapter
from refold.errors import SiteError

__all__ = ["Carrier", "chain"]


class Carrier(SideAdapter, ABC):
    """Takes what the adapter before it kept in this forward, and keeps something for the one behind it.

    A gradient checkpoint around a block runs it again in the backward pass, when all this is long gone. So what an
    adapter took is remembered by its host's input, which a checkpoint without re-entry passes again, the very same
    object, and forgotten with it; a second forward before the backward pass has inputs of its own. Whatever else
    runs a block out of the row is refused.

    Attributes:
        before: the adapter before this one, see :func:`chain`; None at the start of a row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.before: Carrier | None = None
        self._state: Any = None
        self._received: Any = None
        self._running, self._graded = False, False
        self._taken: WeakIdKeyDictionary | None = None  # host's input -> what was taken

    def begin(self, forward: Forward | None) -> None:
        self._state, self._running, self._graded = None, True, torch.is_grad_enabled()

    def arrive(self, given: Tensor, where: str) -> None:
        if self._running and self._graded and not torch.is_grad_enabled():
            raise SiteError(
                "it runs without gradients within a forward with gradients, and what it hands on would have none",
                where=where,
                remedy="Use gradient checkpoints with use_reentrant=False, or torch.no_grad() around the whole model",
            )
        if self.before is None:
            return
        self._received = self._again(given) if self._is_again() else self._take(given)
        if self._received is None:
            raise SiteError(
                "what the adapter before it hands on was not seen in this call",
                where=where,
                remedy="Run all blocks from the first on, once each; put gradient checkpoints around single blocks, "
                "with use_reentrant=False",
            )

    def _is_again(self) -> bool:
        """Whether this is a gradient checkpoint's second run of a part of the model, in the backward pass."""
        if self._running or torch.compiler.is_compiling():
            return False
        return torch._C._current_graph_task_id() != -1  # private, but the only way to ask; torch's checkpoint does

    def _again(self, given: Tensor) -> Any:
        return None if self._taken is None else self._taken.get(given)

    def _take(self, given: Tensor) -> Any:
        assert self.before is not None
        state, self.before._state = self.before._state, None
        if state is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._taken = WeakIdKeyDictionary() if self._taken is None else self._taken
            # Without its graph, which may hold on to this very input: the entry would never go.
            self._taken[given] = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), state)
        return state

    def taken(self) -> Any:
        """What the adapter before this one kept; None at the start of a row."""
        received, self._received = self._received, None
        return received

    def keep(self, state: Any) -> None:
        """Hand ``state`` on."""
        if not self._is_again():  # there the next one remembers what it took
            self._state = state

    def release(self) -> None:
        self._state, self._received, self._running = None, None, False

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles: what belongs to a forward stays behind
        return {**self.__dict__, "_state": None, "_received": None, "_running": False, "_taken": None}


def chain(adapters: Iterable[Carrier]) -> None:
    """Put adapters in a row, in this order."""
    for before, adapter in pairwise(adapters):
        adapter.refer("before", before)
