"""The unified view: "Towards a Unified View of Parameter-Efficient Transfer Learning" (arXiv 2110.04366).

    h <- h + s dh   (added)      or      h <- (1 - g) h + g s dh   (gated),      dh = U drop(act(D x + a)) + b

in which the published methods are points: where dh reads (``position``: beside what makes h, x its input, or behind
it, x = h), what h is (``representation`` and ``sites``: what the attention or the MLP puts into the stream, or what
a projection gives), how they meet (``composition``) and how strongly (``scale``).

    scaled parallel adapter, MAM's own part     Unified()
    AdaptFormer                                 Unified(reads="stream", scale=0.1, dropout=0.1)
    Adapter, as Pfeiffer has it                 Unified(position="sequential", scale=1.0)
    LoRA                                        Unified(representation="projection", scale=1.0, activation="identity")

D Kaiming-uniform, the rest zero: the backbone at the start; gated, g zero and U as D. ``Unified()`` has 156,768
parameters on ViT-B/16, as AdaptFormer; the paper takes hidden=512 for its text models. g is one learned number a place.
It folds without an activation where h is what a projection gives, and added: beside it as LoRA (then without a and b,
which would be one constant), behind it as Adapter.

Not here: MAM's other part, 30 learned keys and values in front of each attention's own (prefix tuning). An attention
module makes its keys and values inside its own forward, often in one fused call, and refold replaces no forward. The
nearest there is are prompts, of which the backbone makes keys and values itself, as ``Compose([VPT(), Unified()])``.
Layouts: channels last and channels first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import Adapter, LowRank
from refold.adapters.nonlinear import ACTIVATIONS, Bottleneck, GatedBottleneck
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.insertion import behind, behind_last, beside, linear
from refold.methods.weight import check_usual
from refold.places import branch_sites, tried
from refold.sites import Layer, Site
from refold.survey import Survey

__all__ = ["Unified"]

_CHOICES = {
    "position": ("parallel", "sequential"),
    "representation": ("branch", "projection"),
    "reads": ("normed", "stream"),
    "composition": ("add", "gated"),
    "activation": tuple(ACTIVATIONS),
}


@dataclass(frozen=True)
class Unified(Method):
    """A bottleneck anywhere: beside or behind, of a residual branch or a projection, added or gated.

    Args:
        hidden: inner width h.
        scale: s.
        position: ``"parallel"`` (reads what goes in) or ``"sequential"`` (reads what comes out).
        representation: what it changes, ``"branch"`` (what a residual branch adds to the stream) or ``"projection"``
            (what a layer gives).
        reads: beside a branch, the stream behind the branch's norm (``"normed"``) or before it (``"stream"``).
        composition: ``"add"`` or ``"gated"`` (it takes the place of a learned part, zero at the start).
        activation: between the projections; ``"identity"`` for none.
        dropout: on the h numbers, in training only; as LoRA, on the input.
        sites: roles (``"attention"``, ``"mlp"``) or paths (``*`` allowed), of branches or of layers; None is the MLP's
            branch, of projections the attention's first.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it to find out which of the choices a task rewards; for one published method take that method.
    """

    hidden: int = 8
    scale: float = 4.0
    position: str = "parallel"
    representation: str = "branch"
    reads: str = "normed"
    composition: str = "add"
    activation: str = "relu"
    dropout: float = 0.0
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "bottleneck beside or behind anything, added or gated; MAM's scaled parallel adapter"
    paper: ClassVar[str] = "arXiv 2110.04366"
    folds: ClassVar[str] = "without activation"
    tasks: ClassVar[str] = "language"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        for name, choices in _CHOICES.items():
            require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")

    @property
    def mergeable(self) -> bool:
        on_layer = self.position == "sequential" or self.representation == "projection"
        return self.activation == "identity" and self.composition == "add" and on_layer

    def plan(self, survey: Survey) -> Plan:
        if self.representation == "projection":
            layers, skipped = survey.resolve(self.sites, ("attention",), moved=False)
            sites, more = tried(lambda layer: self._at(survey, layer), layers, named=self.sites is not None)
            skipped = skipped + more
        elif self.position == "sequential":
            sites, skipped = behind_last(survey, self.sites, ("mlp",), folds=self.mergeable, dropout=self.dropout)
        else:
            sites, skipped = branch_sites(survey, self.sites, ("mlp",), self.reads)
        return Plan(tuple(sites), tuple(skipped))

    def _at(self, survey: Survey, layer: Layer) -> Site:
        """The site behind ``layer``, or beside it."""
        if self.position == "sequential":
            return behind(survey, layer, folds=self.mergeable, dropout=self.dropout)
        return beside(survey, layer, folds=self.mergeable, dropout=self.dropout)

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Adapter:
        if site.slot == "weight":
            options = {"channel_dim": site.channel_dim, "device": device, "dtype": dtype}
            return LowRank(site.weight_shape, self.hidden, self.scale, self.dropout, **options)
        if site.route is None:
            return linear(site, self.hidden, self.scale, self.dropout, "lora", device, dtype)
        kind = GatedBottleneck if self.composition == "gated" else Bottleneck
        return kind(
            site.width,
            self.hidden,
            self.scale,
            self.dropout,
            self.activation,
            out_width=site.out_width,
            device=device,
            dtype=dtype,
        )
