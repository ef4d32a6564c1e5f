"""RepAdapter: "Towards Efficient Visual Adaption via Structural Re-parameterization" (arXiv 2302.08106).

    f(x) = x + s (B drop(A x + a) + b),   B block-diagonal over g groups, put before a frozen projection.

Placement: before the attention's and before the MLP's first projection ("block"), or ``sites="attention"`` for
the attention alone. Merged: ``W <- W M``, ``b <- b + W c`` with ``M = I + s B A`` and ``c = s (B a + b)``.

Deviations from the released code, on purpose: any width, any number of groups and layers without bias merge;
on Swin the adapter sits at the projection's own input, after shift and window partition (the map is per token,
so this equals the paper's place before them, and stays exact where a window is padded with zeros); on ConvNeXt
and EfficientNet the place before the depthwise convolution, which cannot fold for free, moves to the
pointwise projections. Layouts: channels last and channels first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from refold.adapters import LinearBottleneck
from refold.methods.base import Method, Plan, are_sites, is_count, is_number, require
from refold.sites import Site
from refold.survey import Survey

__all__ = ["RepAdapter"]


@dataclass(frozen=True)
class RepAdapter(Method):
    """Linear dense-then-grouped adapter before a frozen projection; merges exactly.

    Args:
        rank: hidden width r.
        groups: groups g of the up projection; must divide ``rank``. A width it does not divide gets the largest
            common divisor, which ``explain`` tells.
        scale: s; the paper searches {0.1, 0.5, 1, 5, 10} per task.
        dropout: between the two projections, in training only.
        sites: roles (``"attention"``, ``"mlp"``) or module paths (``*`` allowed); None is both roles where the
            backbone has them, else every Linear and every channel-mixing convolution.

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

    summary: ClassVar[str] = "linear dense-then-grouped adapter before a frozen projection"
    paper: ClassVar[str] = "arXiv 2302.08106"
    tasks: ClassVar[str] = "classification, video, segmentation"

    def __post_init__(self) -> None:
        require(self, "rank", is_count(self.rank), "a positive integer")
        require(self, "groups", is_count(self.groups) and self.rank % self.groups == 0, "a divisor of rank")
        require(self, "scale", is_number(self.scale, -1e6, 1e6) and self.scale != 0, "a number other than 0")
        require(self, "dropout", is_number(self.dropout, 0.0, 0.999), "in [0, 1)")
        require(self, "sites", are_sites(self.sites), "None, a role or path, or a tuple of them")

    def plan(self, survey: Survey) -> Plan:
        layers, skipped = survey.resolve(self.sites, ("attention", "mlp"), moved=True)
        sites = [self._noted(site) for site in survey.input_sites(layers, wants_shift=True)]
        return Plan(tuple(sites), tuple(skipped))

    def _noted(self, site: Site) -> Site:
        """With a note where ``groups`` does not divide the width and the up projection gets fewer."""
        groups = math.gcd(self.groups, site.width)
        if groups == self.groups:
            return site
        note = f"{groups} instead of {self.groups} groups, which do not divide {site.width} channels"
        return replace(site, note="; ".join(filter(None, (site.note, note))))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> LinearBottleneck:
        return LinearBottleneck(
            site.width,
            self.rank,
            math.gcd(self.groups, site.width),
            self.scale,
            self.dropout,
            channel_dim=site.channel_dim,
            shift=site.shift is not None and site.shift.target != "none",
            device=device,
            dtype=dtype,
        )
