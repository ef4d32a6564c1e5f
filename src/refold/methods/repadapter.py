"""RepAdapter: "Towards Efficient Visual Adaption via Structural Re-parameterization" (arXiv 2302.08106).

    f(x) = x + s (B drop(A x + a) + b),   B block-diagonal over g groups, put before a frozen projection.

Placement: before the attention's and before the MLP's first projection ("block"), or ``sites="attention"`` for
the attention alone. Merged: ``W <- W M``, ``b <- b + W c`` with ``M = I + s B A`` and ``c = s (B a + b)``.

What the paper compares this with (its ablations), as options:

    position="after"       behind the last projection of the branch:   W <- M W,  b <- M b + c
    position="parallel"    beside the first projection, x not added:   W <- W + s B A,  b <- b + s (B a + b)
    activation="gelu"      on A x + a; before, it sits behind the branch's norm. Nothing folds.

Deviations from the released code, on purpose: any width, any number of groups and layers without bias merge;
on Swin the adapter sits at the projection's own input, after shift and window partition (the map is per token,
so this equals the paper's place before them, and stays exact where a window is padded with zeros); on ConvNeXt
and EfficientNet the place before the depthwise convolution, which cannot fold for free, moves to the
pointwise projections. Layouts: channels last and channels first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import Adapter, LinearBottleneck
from refold.adapters.beside import BesideBottleneck
from refold.adapters.nonlinear import ACTIVATIONS, Bottleneck
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.insertion import behind_last, beside
from refold.methods.weight import check_usual, noted
from refold.places import branches, norm_site, tried
from refold.sites import Layer, Site, Skipped
from refold.survey import Survey

__all__ = ["RepAdapter"]


_ROLES = ("attention", "mlp")


@dataclass(frozen=True)
class RepAdapter(Method):
    """Linear dense-then-grouped adapter before a frozen projection; merges exactly.

    Args:
        rank: hidden width r.
        groups: groups g of the up projection; must divide ``rank``. A width it does not divide gets the largest
            common divisor, which ``explain`` tells.
        scale: s; the paper searches {0.1, 0.5, 1, 5, 10} per task.
        dropout: between the two projections, in training only; on the input where it is parallel and linear.
        sites: roles (``"attention"``, ``"mlp"``) or module paths (``*`` allowed); None is both roles where the
            backbone has them, else every Linear and every channel-mixing convolution. After, and before with an
            activation, it needs residual branches.
        position: ``"before"`` the first projection, ``"after"`` the last one, or ``"parallel"`` to the first.
        activation: between the projections; ``"identity"`` for none, as published.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it first where the model must not get slower: it merges exactly, and on any backbone. Search the scale on
    validation data.
    """

    rank: int = 8
    groups: int = 2
    scale: float = 1.0
    dropout: float = 0.1
    sites: tuple[str, ...] | str | None = None
    position: str = "before"
    activation: str = "identity"

    summary: ClassVar[str] = "linear dense-then-grouped adapter before a frozen projection"
    paper: ClassVar[str] = "arXiv 2302.08106"
    folds: ClassVar[str] = "without activation"
    tasks: ClassVar[str] = "classification, video, segmentation"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "groups", is_count(self.groups) and self.rank % self.groups == 0, "a divisor of rank")
        require(self, "position", self.position in _POSITIONS, f"one of {', '.join(_POSITIONS)}")
        require(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    @property
    def mergeable(self) -> bool:
        return self.activation == "identity"

    def plan(self, survey: Survey) -> Plan:
        sites, skipped = _POSITIONS[self.position](self, survey)
        return Plan(tuple(self._noted(site) for site in sites), tuple(skipped))

    def _before(self, survey: Survey) -> tuple[list[Site], list[Skipped]]:
        if self.mergeable:
            layers, skipped = survey.resolve(self.sites, _ROLES, moved=True)
            return survey.input_sites(layers, wants_shift=True), skipped
        found, skipped = branches(survey, self.sites, _ROLES)
        sites, more = tried(lambda branch: norm_site(survey, branch), found, named=self.sites is not None)
        return sites, skipped + more

    def _after(self, survey: Survey) -> tuple[list[Site], list[Skipped]]:
        return behind_last(survey, self.sites, _ROLES, folds=self.mergeable, dropout=self.dropout)

    def _parallel(self, survey: Survey) -> tuple[list[Site], list[Skipped]]:
        def site(layer: Layer) -> Site:
            return beside(survey, layer, folds=self.mergeable, dropout=self.dropout, wants_shift=True)

        layers, skipped = survey.resolve(self.sites, _ROLES, moved=True)
        sites, more = tried(site, layers, named=self.sites is not None)
        return sites, skipped + more

    def _groups(self, site: Site) -> int:
        """``groups``, or what of it divides the width of the up projection."""
        return math.gcd(self.groups, site.width if self.position == "before" else site.out_width)

    def _noted(self, site: Site) -> Site:
        groups = self._groups(site)
        if groups == self.groups:
            return site
        width = site.width if self.position == "before" else site.out_width
        return noted(site, f"{groups} instead of {self.groups} groups, which do not divide {width} channels")

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Adapter:
        factory = {"device": device, "dtype": dtype}
        groups = self._groups(site)
        if not self.mergeable:
            return Bottleneck(
                site.width, self.rank, self.scale, self.dropout, self.activation,
                out_width=site.out_width, groups=groups, init="repadapter", **factory,
            )  # fmt: skip
        options = {"channel_dim": site.channel_dim, "shift": site.has_shift, **factory}
        if self.position == "parallel":
            return BesideBottleneck(site.weight_shape, self.rank, groups, self.scale, self.dropout, **options)
        width = site.width if self.position == "before" else site.out_width
        return LinearBottleneck(width, self.rank, groups, self.scale, self.dropout, **options)


_POSITIONS = {"before": RepAdapter._before, "after": RepAdapter._after, "parallel": RepAdapter._parallel}
