"""Adapters, as bottlenecks with a skip connection: four variants of one formula.

    y = z + U drop(act(D z + a)) + b

``"pfeiffer"`` (arXiv 2005.00052), the default: z is what the MLP's last projection gives; ReLU.
``"houlsby"`` (arXiv 1902.00751): behind the attention's and behind the MLP's last projection; GELU.
``"noah"`` (arXiv 2206.04673): as pfeiffer; QuickGELU, D and U Xavier-uniform, biases of std 1e-6.
``"adapter+"`` (arXiv 2406.06820): z is the stream behind the MLP's residual sum, and what is added to it has a learned
scale for each channel (ones at the start) and is dropped in training for a tenth of the samples; GELU.

D and U start as a normal of std 0.01 cut off at two of them and biases at zero, where it does not say otherwise: the
start is near the backbone, not equal to it. On ViT-B/16 with hidden=8: 156,768 parameters (pfeiffer, noah), 313,536
(houlsby), 165,984 (adapter+; 313,536 with hidden=16): 2 d h + h + d a place, and d more in adapter+.

It folds with ``activation="identity"`` and z the output of a projection: ``W' = (I + U D) W``, ``b' = (I + U D) b +
U a + b``. In adapter+ the stream passes it by, so it never does.

Deviations from released codes, on purpose: VPT's adapter starts with D and U both zero, where only the last bias ever
receives a gradient: here no variant does. Pfeiffer's formula is for norms behind the sum; with norms before the
branch, as in ViT, z is the MLP's output (as VPT and NOAH have it). z is what the projection gives, before a block's
layer scale; where the backbone has no MLP, that of every residual branch. Layouts: channels last and channels first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import LinearBottleneck
from refold.adapters.nonlinear import ACTIVATIONS, Bottleneck
from refold.methods.base import Method, Plan, are_sites, is_count, is_number, require
from refold.methods.insertion import behind_last, linear
from refold.methods.overrides import are_sizes, as_tuples, require_matched, size_at
from refold.places import branch_sites
from refold.sites import Site
from refold.survey import Survey

__all__ = ["Adapter"]


@dataclass(frozen=True)
class _Variant:
    """What a paper says: its places, activation and start, how often training leaves it out, and where it reads."""

    roles: tuple[str, ...]
    activation: str
    init: str | float
    dropout: float = 0.0
    behind_sum: bool = False


_VARIANTS = {
    "pfeiffer": _Variant(("mlp",), "relu", 0.01),
    "houlsby": _Variant(("attention", "mlp"), "gelu", 0.01),
    "noah": _Variant(("mlp",), "quick_gelu", "xavier"),
    "adapter+": _Variant(("mlp",), "gelu", 0.01, dropout=0.1, behind_sum=True),
}


@dataclass(frozen=True)
class Adapter(Method):
    """Bottleneck behind a projection, or behind a residual sum; merges exactly without an activation.

    Args:
        variant: ``"pfeiffer"``, ``"houlsby"``, ``"noah"`` or ``"adapter+"``.
        hidden: inner width h.
        activation: between the projections; None is the variant's, ``"identity"`` none.
        dropout: on the h numbers, in adapter+ of the whole adapter, sample by sample; in training only. None is the
            variant's: 0, in adapter+ 0.1.
        sites: roles (``"attention"``, ``"mlp"``: behind the last projection of that residual branch), or paths of
            layers, behind each of them (``*`` allowed); in adapter+ roles or paths of residual branches. None is the
            variant's roles; every residual branch where the backbone lacks one of them.
        overrides: ``(path, hidden)`` of places that differ, by their layer's path as ``explain`` shows it (``*``
            allowed); the first that matches holds.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it when a proven, cheap baseline is wanted and a few extra products in each block do no harm; with
    ``activation="identity"`` and merged they cost nothing.
    """

    variant: str = "pfeiffer"
    hidden: int = 8
    activation: str | None = None
    dropout: float | None = None
    sites: tuple[str, ...] | str | None = None
    overrides: tuple[tuple[str, int], ...] = ()

    summary: ClassVar[str] = "bottleneck behind a projection (Pfeiffer, Houlsby, NOAH) or a residual sum (Adapter+)"
    paper: ClassVar[str] = "arXiv 1902.00751"
    folds: ClassVar[str] = "without activation"
    tasks: ClassVar[str] = "language, classification"

    def __post_init__(self) -> None:
        require(self, "variant", self.variant in _VARIANTS, f"one of {', '.join(_VARIANTS)}")
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        known = self.activation is None or self.activation in ACTIVATIONS
        require(self, "activation", known, f"None or one of {', '.join(ACTIVATIONS)}")
        require(self, "dropout", self.dropout is None or is_number(self.dropout, 0.0, 0.999), "None or in [0, 1)")
        require(self, "sites", are_sites(self.sites), "None, a role or path, or a tuple of them")
        object.__setattr__(self, "overrides", as_tuples(self.overrides))
        require(self, "overrides", are_sizes(self.overrides), "a tuple of (path, hidden)")

    @property
    def mergeable(self) -> bool:
        return self._activation == "identity" and not self._published.behind_sum

    @property
    def _published(self) -> _Variant:
        return _VARIANTS[self.variant]

    @property
    def _activation(self) -> str:
        return self._published.activation if self.activation is None else self.activation

    @property
    def _dropout(self) -> float:
        return self._published.dropout if self.dropout is None else self.dropout

    def plan(self, survey: Survey) -> Plan:
        roles = self._published.roles
        if self._published.behind_sum:
            sites, skipped = branch_sites(survey, self.sites, roles, "sum")
        else:
            sites, skipped = behind_last(survey, self.sites, roles, folds=self.mergeable, dropout=self._dropout)
        require_matched([path for path, _ in self.overrides], [site.path for site in sites])
        return Plan(tuple(sites), tuple(skipped))

    def build(
        self, site: Site, device: torch.device | None, dtype: torch.dtype | None
    ) -> Bottleneck | LinearBottleneck:
        hidden, variant = size_at(site.path, self.overrides, self.hidden), self._published
        if self.mergeable:
            return linear(site, hidden, 1.0, self._dropout, variant.init, device, dtype)
        return Bottleneck(
            site.width,
            hidden,
            dropout=0.0 if variant.behind_sum else self._dropout,
            activation=self._activation,
            init=variant.init,
            channel_scale=variant.behind_sum,
            drop_path=self._dropout if variant.behind_sum else 0.0,
            device=device,
            dtype=dtype,
        )
