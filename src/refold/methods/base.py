"""What a method is: a frozen record of hyper-parameters that picks sites and builds adapters for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import nn

from refold.adapters import Adapter
from refold.errors import SiteError
from refold.hosting import adapter_parameters
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["Method", "Plan", "require"]


@dataclass(frozen=True)
class Plan:
    """What a method wants to do to one backbone.

    Attributes:
        sites: where adapters go.
        skipped: layers left out, with reasons.
        trained: names of the backbone's own parameters that the method trains in place.
        trains_statistics: whether BatchNorm statistics move during training.
    """

    sites: tuple[Site, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    trained: tuple[str, ...] = ()
    trains_statistics: bool = False


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Subclasses add hyper-parameters as fields and are listed in ``METHODS``."""

    #: One line for tables, and where the method comes from.
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    #: What of it folds into the backbone's own weights, in a word or two.
    folds: ClassVar[str] = "yes"
    #: What its paper, or the work that brought it to images, shows it on.
    tasks: ClassVar[str] = "classification"

    @property
    def mergeable(self) -> bool:
        """Whether a trained adapter folds into the backbone's own weights."""
        return self.folds == "yes"

    @abstractmethod
    def plan(self, survey: Survey) -> Plan:
        """Choose sites or parameters; raises :class:`SiteError` where the method cannot be applied."""

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Adapter:
        """A fresh adapter for one of the plan's sites."""
        raise SiteError(f"{type(self).__name__} builds no adapters", where=site.path)

    def link(self, adapters: Mapping[str, Adapter]) -> None:  # noqa: B027 (most methods share nothing)
        """Tie fresh adapters (by :attr:`Site.key`) to one another, where a method's parameters serve several sites.

        What is shared is a child of one adapter; the others refer to it outside their modules (see
        :meth:`refold.adapters.Adapter.refer`), so that it is counted, trained and saved once.
        """

    def parts(self) -> tuple[Method, ...]:
        """The methods it is made of: itself alone, but for a composition."""
        return (self,)

    def to_json(self) -> dict[str, Any]:
        """``{"name": class name, hyper-parameter: value, ...}``."""
        return {"name": type(self).__name__, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuild from the fields of :meth:`to_json`; raises :class:`SiteError` on unknown or invalid ones."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known - {"name"})
        if unknown:
            raise SiteError(
                f"unknown hyper-parameter(s) {unknown}", where=cls.__name__, remedy=f"Known: {sorted(known)}"
            )
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "name"}
        try:
            return cls(**values)
        except TypeError as error:
            raise SiteError(str(error), where=cls.__name__) from error

    def describe(self) -> str:
        """``RepAdapter(rank=8, ...)`` with the fields that differ from their defaults."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


def require(method: Method, name: str, ok: bool, wants: str) -> None:
    """Raise a :class:`SiteError` that names the hyper-parameter unless ``ok``."""
    if not ok:
        value = getattr(method, name)
        raise SiteError(f"{name}={value!r} is not valid", where=type(method).__name__, remedy=f"It must be {wants}")


def is_number(value: object, low: float, high: float = float("inf")) -> bool:
    """A real, finite number in [low, high]; booleans are not numbers here."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and abs(value) < 1e30
    )


def is_count(value: object) -> bool:
    """A positive integer of a sane size: hyper-parameters also come from files, which are not trusted."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65536


def are_sites(value: object) -> bool:
    """None, a role or path, or a non-empty tuple of them."""
    if value is None or (isinstance(value, str) and value):
        return True
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(v, str) and v for v in value)


def body_parameters(survey: Survey) -> dict[str, nn.Parameter]:
    """The backbone's parameters by name, those of the head and of attached adapters left out."""
    inside = tuple(f"{h}." for h in survey.head)
    adapters = adapter_parameters(survey.model)
    return {
        n: p
        for n, p in survey.model.named_parameters()
        if id(p) not in adapters and n not in survey.head and not n.startswith(inside)
    }
