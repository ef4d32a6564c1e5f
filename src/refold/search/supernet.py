"""Sub-nets of an attached model: every adapter cut to the first rows of its tensors, for as long as one is chosen.

No forward is replaced. A slice in a module's ``__dict__`` wins over its parameter in attribute look-up, as in
:mod:`refold.hosting`: names, keys and identity of the parameters stay as they are, and gradients reach the rows that
were used. An adapter of size 0 is taken off its host's list of sites. What the forward computes is, operation for
operation, what a model computes to which the small method was attached with these slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from refold.adapters import Adapter
from refold.errors import SiteError
from refold.hosting import adapters_of, hosted
from refold.search.space import Place, Sizes, Space
from refold.sites import Site
from refold.state import get_tensor, require_state, set_tensor

__all__ = ["SuperNet"]


class SuperNet:
    """A model with a composition in its largest sizes, of which :meth:`choose` brings one sub-net into use.

    Args:
        model: attached; its parameters are those of the whole super-net throughout.
        space: of :meth:`Space.of` for this model.
    """

    def __init__(self, model: nn.Module, space: Space) -> None:
        self.model, self.space = model, space
        self._sites = require_state(model, "search").record().sites
        self._name = require_state(model, "search").active or ""

    def choose(self, sizes: Sizes) -> None:
        """Use this sub-net until another is chosen, or :meth:`release` brings back the whole."""
        absent = set()
        for place, adapter, size in self._places(sizes):
            if size == 0:
                absent.add(place.site.key)
            for name, parameter in adapter.named_parameters():
                module, leaf = _owner(adapter, name)
                if size and parameter.shape != place.shapes[size][name]:
                    module.__dict__[leaf] = _first(parameter, place.shapes[size][name])
                else:
                    module.__dict__.pop(leaf, None)
        self._use([site for site in self._sites if site.key not in absent])

    def release(self) -> None:
        """The whole super-net again."""
        for adapter in adapters_of(self.model, self._sites, self._name).values():
            for name, _ in adapter.named_parameters():
                module, leaf = _owner(adapter, name)
                module.__dict__.pop(leaf, None)
        self._use(self._sites)

    @contextmanager
    def chosen(self, sizes: Sizes) -> Iterator[nn.Module]:
        """The model, which is this sub-net inside the block."""
        self.choose(sizes)
        try:
            yield self.model
        finally:
            self.release()

    @torch.no_grad()
    def hand_down(self, sizes: Sizes, model: nn.Module) -> None:
        """Give a model to which ``space.method(sizes)`` is attached the sub-net's weights, and the super-net's head.

        Raises:
            SiteError: its adapters are at other places.
        """
        state = require_state(model, "hand weights down")
        record = state.record()
        small = adapters_of(model, record.sites, state.active or "")
        large = adapters_of(self.model, self._sites, self._name)
        wanted = {key: (place, size) for place, size, key in self.space.sites(sizes)}
        if odd := sorted(small.keys() ^ wanted.keys()):
            raise SiteError("the sub-net's method adapts other places than the super-net's", where=odd[0])
        for key, (place, size) in wanted.items():
            values = dict(large[place.site.key].named_parameters())
            small[key].load_state_dict({n: _first(values[n], shape) for n, shape in place.shapes[size].items()})
        for name in record.owned:
            value = get_tensor(self.model, name)
            assert value is not None
            set_tensor(model, name, value)

    def _places(self, sizes: Sizes) -> Iterator[tuple[Place, Adapter, int]]:
        adapters = adapters_of(self.model, self._sites, self._name)
        for place, size in zip(self.space.places, sizes, strict=True):
            yield place, adapters[place.site.key], size

    def _use(self, sites: list[Site] | tuple[Site, ...]) -> None:
        for path, slot in hosted(self.model).items():
            slot.sites[self._name] = [site for site in sites if site.path == path]


def _owner(adapter: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return adapter.get_submodule(path), leaf


def _first(parameter: Tensor, shape: torch.Size) -> Tensor:
    return parameter[tuple(slice(length) for length in shape)]
