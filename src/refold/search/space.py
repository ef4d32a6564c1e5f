"""Which sizes each adapter of a composition may have, what they cost, and which method a choice of them is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import nn

from refold.errors import SiteError
from refold.methods import Compose, Method
from refold.methods.adapter import Adapter
from refold.methods.adaptformer import AdaptFormer
from refold.methods.inplace import LinearProbe
from refold.methods.lora import LoRA
from refold.methods.vpt import VPT
from refold.sites import Site
from refold.state import require_state

__all__ = ["SIZES", "Place", "Sizes", "Space"]

#: One size for each place of a space, in its order.
Sizes = tuple[int, ...]
#: The methods whose adapters nest, the small one being the first rows of a large one's tensors: their size's name.
SIZES: dict[type[Method], str] = {VPT: "tokens", LoRA: "rank", Adapter: "hidden", AdaptFormer: "hidden"}


@dataclass(frozen=True)
class Place:
    """One adapter of the super-net.

    Attributes:
        site: where it is.
        shapes: for each size it may have, in ascending order, name -> shape of the tensors of an adapter of that
            size. Size 0, which has none, is no adapter at all.
    """

    site: Site
    shapes: dict[int, dict[str, torch.Size]]

    @property
    def choices(self) -> Sizes:
        return tuple(self.shapes)

    def cost(self, size: int) -> int:
        """Parameters of an adapter of that size."""
        return sum(shape.numel() for shape in self.shapes[size].values())


@dataclass(frozen=True)
class Space:
    """The sub-nets of an attached super-net that have at most ``cap`` parameters beside the head.

    Attributes:
        methods: the super-net's.
        places: its adapters, method by method, in the order of the forward.
        cap: the largest number of parameters.
    """

    methods: tuple[Method, ...]
    places: tuple[Place, ...]
    cap: int

    @classmethod
    def of(cls, model: nn.Module, choices: Sequence[int], cap: int | None = None) -> Space:
        """The space of a model to which the methods are attached in their largest sizes.

        Args:
            model: its method is one of :data:`SIZES` or a composition of them, all without ``overrides``.
            choices: the sizes; of those a method takes the ones up to its own, which must be among them. 0 leaves an
                adapter out.
            cap: None allows every sub-net.

        Raises:
            SiteError: a method that cannot be searched, or choices or a cap that leave nothing to choose.
        """
        record = require_state(model, "search").record()
        methods = record.method.parts()
        for method in methods:
            _require_searchable(method, choices)
        shared = [site for site in record.sites if site.shares is not None]
        if shared:
            raise SiteError("has its adapter from another place", where=shared[0].path, remedy="Use VPT(deep=True)")
        device = torch.device("meta")
        places = []
        for site in sorted(record.sites, key=lambda site: site.part):
            method = methods[site.part]
            shapes: dict[int, dict[str, torch.Size]] = {}
            for size in sorted(set(choices)):
                if size <= _size(method):
                    small = [resized(method, size).build(site.of_part(0), device, None)] if size else []
                    shapes[size] = {name: p.shape for adapter in small for name, p in adapter.named_parameters()}
            places.append(Place(site, shapes))
        space = cls(methods, tuple(places), 0)
        least, most = (space.cost([end(p.choices) for p in places]) for end in (min, max))
        space = replace(space, cap=most if cap is None else min(cap, most))
        if space.cap < max(least, 1):
            raise SiteError(
                f"cap={cap} is too small: the smallest sub-net has {max(least, 1):,} parameters",
                where="search",
                remedy=f"Raise it (all have at most {most:,}), or allow smaller choices",
            )
        return space

    def cost(self, sizes: Sequence[int]) -> int:
        """Parameters beside the head."""
        return sum(place.cost(size) for place, size in zip(self.places, sizes, strict=True))

    def sample(self, random: Random) -> Sizes:
        """A sub-net at random: every size uniform, then :meth:`fitted`."""
        return self.fitted([random.choice(place.choices) for place in self.places], random)

    def fitted(self, sizes: Sequence[int], random: Random) -> Sizes:
        """The same under the cap: single adapters, at random, are made one size smaller until it fits."""
        fitted = list(sizes)
        while self.cost(fitted) > self.cap:
            lower = [i for i, place in enumerate(self.places) if fitted[i] > place.choices[0]]
            at = random.choice(lower)
            choices = self.places[at].choices
            fitted[at] = choices[choices.index(fitted[at]) - 1]
        return tuple(fitted)

    def method(self, sizes: Sequence[int]) -> Method:
        """The method that attaches the sub-net on its own; the linear probe where it has no adapters."""
        parts = [
            narrowed(method, {place.site.path: size for place, size in chosen if size > 0}, len(chosen))
            for method, chosen in zip(self.methods, self._by_method(sizes), strict=True)
            if any(size > 0 for _, size in chosen)
        ]
        return Compose(parts) if len(parts) > 1 else next(iter(parts), LinearProbe())

    def sites(self, sizes: Sequence[int]) -> Iterator[tuple[Place, int, str]]:
        """Of every adapter that the sub-net has: its place here, its size, and its site's key in :meth:`method`."""
        part = 0
        for chosen in self._by_method(sizes):
            present = [(place, size) for place, size in chosen if size > 0]
            yield from ((place, size, place.site.of_part(part).key) for place, size in present)
            part += bool(present)

    def _by_method(self, sizes: Sequence[int]) -> list[list[tuple[Place, int]]]:
        pairs = list(zip(self.places, sizes, strict=True))
        return [[pair for pair in pairs if pair[0].site.part == part] for part in range(len(self.methods))]


def resized(method: Method, size: int) -> Method:
    """The method with another size everywhere."""
    return replace(method, **{SIZES[type(method)]: size})


def narrowed(method: Method, sizes: dict[str, int], count: int) -> Method:
    """The method at the paths of ``sizes`` alone, in those sizes; ``count`` is how many paths it has itself."""
    rest = (method.scale,) if isinstance(method, LoRA) else ()
    changes: dict[str, Any] = {
        "overrides": tuple((path, size, *rest) for path, size in sizes.items() if size != _size(method))
    }
    if len(sizes) < count:
        changes["sites"] = tuple(sizes)
    return replace(method, **changes)


def _size(method: Method) -> int:
    return getattr(method, SIZES[type(method)])


def _require_searchable(method: Method, choices: Sequence[int]) -> None:
    name = type(method).__name__
    if type(method) not in SIZES:
        known = ", ".join(searched.__name__ for searched in SIZES)
        raise SiteError("its adapters do not nest", where=name, remedy=f"Search over {known}")
    if getattr(method, "overrides", ()):
        raise SiteError("has overrides already", where=name, remedy="Give its largest size alone; the search sets them")
    if any(isinstance(c, bool) or not isinstance(c, int) or c < 0 for c in choices) or _size(method) not in choices:
        raise SiteError(
            f"choices={tuple(choices)} must be sizes of 0 or more, {SIZES[type(method)]}={_size(method)} among them",
            where=name,
            remedy="Its largest choice is its own size",
        )
