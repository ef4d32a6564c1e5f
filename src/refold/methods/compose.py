"""Several methods on one model at once, each with its own adapters: ``Compose([VPT(tokens=5), LoRA(), SSF()])``.

Where two methods adapt one layer in different ways, the order is that of the layer: a map of the weight, inside a map
of the input, inside a map of the output; side adapters add to the result in the order given. It merges if all its
methods do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from refold.adapters import Adapter
from refold.errors import SiteError
from refold.methods.base import Method, Plan
from refold.sites import Site
from refold.survey import Survey

__all__ = ["Compose"]

#: In which order maps of one layer act on what passes through it; side adapters come behind them.
_ORDER = {"weight": 0, "input": 1, "output": 2}


@dataclass(frozen=True)
class Compose(Method):
    """Several methods on one model.

    Args:
        methods: two or more, in the order in which side adapters of one place add up.

    Raises:
        SiteError: fewer than two methods. At attach: two of them claim one place in ways that exclude each other.
    """

    methods: tuple[Method, ...] = ()

    summary: ClassVar[str] = "several methods at once"
    paper: ClassVar[str] = "-"
    folds: ClassVar[str] = "if all its methods do"

    def __init__(self, methods: Iterable[Method]) -> None:
        given = tuple(methods)
        if len(given) < 2 or not all(isinstance(m, Method) for m in given):
            raise SiteError(
                f"methods={given!r} is not valid", where="Compose", remedy="It must be a list of two or more methods"
            )
        object.__setattr__(self, "methods", tuple(itertools.chain.from_iterable(m.parts() for m in given)))

    @property
    def mergeable(self) -> bool:
        return all(method.mergeable for method in self.methods)

    def parts(self) -> tuple[Method, ...]:
        return self.methods

    def plan(self, survey: Survey) -> Plan:
        plans = [method.plan(survey) for method in self.methods]
        sites = [site.of_part(part) for part, plan in enumerate(plans) for site in plan.sites]
        self._require_peace(sites)
        return Plan(
            tuple(_in_order(sites)),
            tuple(dict.fromkeys(skipped for plan in plans for skipped in plan.skipped)),
            tuple(dict.fromkeys(name for plan in plans for name in plan.trained)),
            any(plan.trains_statistics for plan in plans),
        )

    def _require_peace(self, sites: list[Site]) -> None:
        """Raise :class:`SiteError` for two sites that cannot both hold."""
        taken: dict[tuple[str, str, str], int] = {}
        for site in sites:
            other = taken.setdefault((site.path, site.slot, site.tag), site.part)
            if other != site.part:
                names = " and ".join(type(self.methods[part]).__name__ for part in (other, site.part))
                raise SiteError(
                    f"{names}: both claim its {site.slot!r} place", where=site.path, remedy="Give them different sites="
                )

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Adapter:
        return self.methods[site.part].build(site.of_part(0), device, dtype)

    def to_json(self) -> dict[str, Any]:
        return {"name": type(self).__name__, "methods": [method.to_json() for method in self.methods]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        from refold.methods import method_from_json

        return cls([method_from_json(each) for each in data.get("methods", ())])

    def describe(self) -> str:
        return f"Compose([{', '.join(method.describe() for method in self.methods)}])"


def _in_order(sites: list[Site]) -> list[Site]:
    """Host by host, as they come; rows of adapters that hand something on keep the order of the forward."""
    hosts: dict[str, list[Site]] = {}
    for site in sites:
        hosts.setdefault(site.path, []).append(site)
    last = len(_ORDER)
    ordered = (
        sorted(some, key=lambda site: last if site.route else _ORDER.get(site.slot, last)) for some in hosts.values()
    )
    return list(itertools.chain.from_iterable(ordered))
