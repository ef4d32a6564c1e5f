"""What was seen of a forward on behalf of one side adapter, and how it is run on that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.adapters import Adapter, Layout, SideAdapter
from refold.errors import SiteError
from refold.positions import Covered
from refold.sites import Site
from refold.turns import Turn

if TYPE_CHECKING:
    from refold.hosting import Slot

__all__ = ["Wire"]


class Wire:
    """What was seen of the present forward on behalf of one side adapter.

    Attributes:
        slot, name, site: the adapter: the host's slot, the adapter's name in the model, and its site.
        value: what was read, or computed, before the host ran.
        norm: what reads the stream in front of a host of tokens; they pass it too.
        stream: tokens as they entered the branch whose result is added to them.
        grid: rows and columns of the tokens.
        covered: attributes that see the longer sequence while the host runs, see :mod:`refold.positions`.
        own: the host's own output, where ``stand_in`` was returned in its place.
        running: whether the host runs once more, for the adapter.
        used: whether the host ran with the adapter.
        turn: the thread whose forward this is.
    """

    def __init__(self, slot: Slot, name: str, site: Site) -> None:
        self.slot, self.name, self.site = slot, name, site
        self.value: Tensor | None = None
        self.norm: nn.Module | None = None
        self.stream: Tensor | None = None
        self.covered: list[Covered] = []
        self.grid: tuple[int, int] | None = None
        self.own: Tensor | None = None
        self.stand_in: Tensor | None = None
        self.running = False
        self.used = False
        self.turn = Turn(site.path)

    @property
    def adapter(self) -> Adapter:
        found = self.slot[self.site.entry(self.name)]
        assert isinstance(found, Adapter)
        return found

    def is_active(self) -> bool:
        return self.slot.active == self.name

    def take(self) -> Tensor:
        """What was read before the host ran; only once."""
        value, self.value = self.value, None
        if value is None:
            raise SiteError(
                "the residual stream that its adapter reads was not seen in this call",
                where=self.site.path,
                remedy=f"Run {self.site.route.source if self.site.route else 'its source'} in the same call: put "
                "gradient checkpoints around whole blocks",
            )
        return value

    def layout(self, rerun: Callable[[Tensor], Tensor] | None = None) -> Layout:
        route = self.site.route
        return Layout(self.site.channel_dim, route.prefix if route else 0, self.grid, self.site.path, rerun)

    def run(self, x: Tensor, rerun: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """What the adapter adds, for features ``x``."""
        adapter = self.adapter
        assert isinstance(adapter, SideAdapter)
        with _precision(x):
            return adapter(x, self.layout(rerun))

    def join(self, features: Tensor, delta: Tensor | None) -> Tensor:
        """``features`` with what :meth:`run` gave."""
        adapter, noise = self.adapter, self.slot.noise
        assert isinstance(adapter, SideAdapter)
        if delta is None:
            return features
        if delta.shape != features.shape:
            raise SiteError(
                f"its adapter gives {tuple(delta.shape)} where the host returns {tuple(features.shape)}",
                where=self.site.path,
                remedy="Choose other sites",
            )
        if noise is None:
            return adapter.compose(features, delta)
        return noise.around(partial(adapter.compose, added=delta), features, channel_dim=self.site.channel_dim)


def _precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the dtype of low-precision features, which full-precision adapters could not multiply."""
    kind = x.device.type
    if x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(kind):
        return torch.autocast(kind, dtype=x.dtype)
    return nullcontext()
