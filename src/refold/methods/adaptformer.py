"""AdaptFormer: "Adapting Vision Transformers for Scalable Visual Recognition" (arXiv 2205.13535).

    out = x + MLP(LN(x)) + s U drop(ReLU(D x + a)) + s b

beside the MLP, reading the residual stream before its norm. D Kaiming-uniform, the rest zero: the identity at the
start. 156,768 on ViT-B/16 with hidden=8, 1,189,632 with the paper's 64. It does not fold: it has an activation.

Deviations from the released code, on purpose: the sum is made where the branch meets the stream, so a block's layer
scale does not shrink it. Layouts: channels last and channels first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.nonlinear import ACTIVATIONS, Bottleneck
from refold.methods.base import Method, Plan, are_sites, is_count, is_number, require
from refold.methods.overrides import are_sizes, as_tuples, require_matched, size_at
from refold.places import branch_sites
from refold.sites import Site
from refold.survey import Survey

__all__ = ["AdaptFormer"]


@dataclass(frozen=True)
class AdaptFormer(Method):
    """Bottleneck with an activation beside the MLP, on the residual stream before its norm.

    Args:
        hidden: inner width h; the paper's default is 64, its comparisons on VTAB use 8.
        scale: s.
        dropout: before the up projection, in training only.
        activation: between the projections.
        sites: roles (``"mlp"``, ``"attention"``) or paths of residual branches; None is every MLP.
        overrides: ``(path, hidden)`` of branches that differ, by the path of their last layer as ``explain`` shows
            it (``*`` allowed); the first that matches holds.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where the adapter may stay in the model, for video and for tasks that a linear map does not reach.
    """

    hidden: int = 8
    scale: float = 0.1
    dropout: float = 0.1
    activation: str = "relu"
    sites: tuple[str, ...] | str | None = None
    overrides: tuple[tuple[str, int], ...] = ()

    summary: ClassVar[str] = "bottleneck with an activation beside the MLP"
    paper: ClassVar[str] = "arXiv 2205.13535"
    tasks: ClassVar[str] = "classification, video"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        require(self, "scale", is_number(self.scale, -1e6, 1e6) and self.scale != 0, "a number other than 0")
        require(self, "dropout", is_number(self.dropout, 0.0, 0.999), "in [0, 1)")
        require(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        require(self, "sites", are_sites(self.sites), "None, a role or path, or a tuple of them")
        object.__setattr__(self, "overrides", as_tuples(self.overrides))
        require(self, "overrides", are_sizes(self.overrides), "a tuple of (path, hidden)")

    def plan(self, survey: Survey) -> Plan:
        sites, skipped = branch_sites(survey, self.sites, ("mlp",), "stream")
        require_matched([path for path, _ in self.overrides], [site.path for site in sites])
        return Plan(tuple(sites), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Bottleneck:
        hidden = size_at(site.path, self.overrides, self.hidden)
        return Bottleneck(site.width, hidden, self.scale, self.dropout, self.activation, device=device, dtype=dtype)
