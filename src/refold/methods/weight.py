"""What methods have in common whose adapters are maps of a frozen layer's own weight."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

from torch import nn

from refold.adapters import Adapter
from refold.errors import SiteError
from refold.methods.base import Method, Plan, are_sites, is_count, is_number, require
from refold.sites import Layer, Site
from refold.survey import Survey

__all__ = ["BLOCK_ROLES", "WeightMethod", "check_usual", "noted", "share"]

#: Every projection of a transformer block.
BLOCK_ROLES = ("attention", "attention_out", "mlp", "mlp_out")

_USUAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (is_count, "a positive integer"),
    "scale": (lambda value: is_number(value, -1e6, 1e6) and value != 0, "a number other than 0"),
    "dropout": (lambda value: is_number(value, 0.0, 0.999), "in [0, 1)"),
    "sites": (are_sites, "None, a role or path, or a tuple of them"),
}

A = TypeVar("A", bound=Adapter)


def check_usual(method: Method) -> None:
    """Raise a :class:`SiteError` unless the hyper-parameters that most methods have are in range."""
    for name, (ok, wants) in _USUAL.items():
        if hasattr(method, name):
            require(method, name, ok(getattr(method, name)), wants)


def noted(site: Site, note: str) -> Site:
    """``site`` with one more thing worth knowing."""
    return replace(site, note="; ".join(filter(None, (site.note, note))))


def share(
    adapters: Iterable[A], name: str, key: Callable[[A], Hashable], make: Callable[[Sequence[A]], nn.Module]
) -> None:
    """Give the adapters of one key one module between them, as their attribute ``name``.

    It is a child of the first; the others refer to it, so that it is counted, trained and saved once.
    """
    groups: dict[Hashable, list[A]] = {}
    for adapter in dict.fromkeys(adapters):
        groups.setdefault(key(adapter), []).append(adapter)
    for first, *others in groups.values():
        module = make([first, *others])
        setattr(first, name, module)
        for adapter in others:
            adapter.refer(name, module)


@dataclass(frozen=True)
class WeightMethod(Method):
    """Base of methods that put one weight map on every layer they choose."""

    #: The places of the paper.
    roles: ClassVar[tuple[str, ...]] = BLOCK_ROLES
    #: Whether the map has a constant part.
    shifts: ClassVar[bool] = False
    #: Why a grouped convolution cannot take the map; "" where it can.
    ungrouped: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_usual(self)

    def plan(self, survey: Survey) -> Plan:
        layers, skipped = survey.resolve(getattr(self, "sites", None), self.roles, moved=False)
        return Plan(tuple(self.site(survey, layer) for layer in layers), tuple(skipped))

    def site(self, survey: Survey, layer: Layer) -> Site:
        """The place of the map on ``layer``; raises :class:`SiteError` where it has none."""
        groups = layer.operator.groups
        if groups != 1 and self.ungrouped:
            raise SiteError(
                f"{self.ungrouped}, which a convolution of {groups} groups cannot hold",
                where=layer.path,
                remedy="Choose an ungrouped layer, or another method here",
            )
        site = survey.weight_site(layer, wants_shift=self.shifts)
        if getattr(self, "dropout", 0) and site.owner is not None:
            return noted(site, "no dropout: the weight itself is replaced")
        return site
