"""DTL and DTL+: "Disentangled Transfer Learning for Visual Recognition" (arXiv 2312.07856).

    h_l = h_{l-1} + B_l A_l x_l,   x_{l+1} = block_l(x_l) + swish(h_l) where l >= start,   swish(h) = h sigmoid(beta h)

with h_0 = 0. A low-rank map of what enters each block fills a state beside the backbone, which the blocks from
``start`` on get back; nothing trains inside the backbone, so of the blocks before no graph is recorded. DTL+ has one
3 x 3 depthwise convolution, shared by all blocks, on what is added; class and register tokens pass it by. A
Kaiming-uniform, B zero: the backbone at the start. 36,864 parameters on ViT-B/16 with rank=2 (2 d r L), 43,776 with
the convolution (+ 9 d). It does not fold.

The start is the paper's: after half of the blocks, the seventh on ViT-B/16. Where the features' shape changes (Swin,
ConvNeXt) each stage has a state, and a convolution, of its own; stages that end before ``start`` have none, for their
state would come back nowhere. A block that changes the shape itself is left out.

Deviations from the released code, on purpose: the backbone keeps its own pooling (there the class token is replaced
by the mean of the patches before the final norm); any grid of patches instead of 14 x 14; on Swin-B, where the code
takes rank 4, start 15 and a 5 x 5 convolution, that stays 3 x 3. The state is handed on as
codes A x, see :class:`SideState`. A gradient checkpoint around single blocks is exact, any other inside the model
refused. Layouts: tokens, (B, H, W, C) and (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch

from refold.adapters import Adapter
from refold.adapters.ladder import chain
from refold.adapters.sidestate import SideState
from refold.errors import SiteError
from refold.methods.base import Method, Plan, is_count, is_number, require
from refold.methods.weight import check_usual, share
from refold.places import block_sites, on_grid
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["DTL"]

#: Follows the stage in the role of a place whose block gets the state back.
_ADDED = ", added"
_CHANGES = "it changes the shape of its features"


@dataclass(frozen=True)
class DTL(Method):
    """Low-rank maps fill a side state that later blocks get back, so that early blocks record no graph.

    Args:
        rank: r of each map.
        beta: how hard the gate of the swish is.
        start: number of the first block, from 1 and among those that keep their features' shape, whose output the
            state is added to; None is the first of the second half.
        plus: whether the state passes a shared depthwise convolution before it is added (DTL+).
        sites: paths (``*`` allowed) of the blocks that fill the state, or of modules around them; None is every block.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it when memory for training is short: the early blocks record no graph, and few adapters are smaller.
    """

    rank: int = 2
    beta: float = 100.0
    start: int | None = None
    plus: bool = False
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "low-rank maps fill a side state, added back to later blocks"
    paper: ClassVar[str] = "arXiv 2312.07856"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "beta", is_number(self.beta, 1e-3, 1e6), "a positive number")
        require(self, "start", self.start is None or is_count(self.start), "None or a positive integer")
        require(self, "plus", isinstance(self.plus, bool), "True or False")

    def plan(self, survey: Survey) -> Plan:
        shapes, inputs = survey.trace.shapes, survey.trace.inputs
        found, skipped = block_sites(survey, "parallel", self.sites)
        skipped += [Skipped(s.path, _CHANGES) for s in found if shapes[s.path] != inputs.get(s.path)]
        whole = [site for site in found if shapes[site.path] == inputs.get(site.path)]
        start = len(whole) // 2 + 1 if self.start is None else self.start
        sites: list[Site] = []
        numbered = list(enumerate(whole, start=1))
        for stage, (_, members) in enumerate(groupby(numbered, lambda item: shapes[item[1].path]), start=1):
            row = list(members)
            if row[-1][0] >= start:
                added = {number: _ADDED if number >= start else "" for number, _ in row}
                sites += [replace(site, role=f"stage {stage}{added[number]}") for number, site in row]
        if not sites:
            raise SiteError(
                f"of its {len(whole)} blocks that keep their features' shape none has the number {start}",
                where=type(survey.model).__name__,
                remedy="Lower start=, or choose another method",
            )
        if self.plus:
            _, flat = on_grid(survey, [site for site in sites if site.role.endswith(_ADDED)])
            if flat:
                raise SiteError(flat[0].reason, where=flat[0].path, remedy="Use plus=False, which needs no grid")
        return Plan(tuple(sites), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> SideState:
        return SideState(
            site.width,
            self.rank,
            self.beta,
            stage=site.role.removesuffix(_ADDED),
            adds=site.role.endswith(_ADDED),
            device=device,
            dtype=dtype,
        )

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        mine = [adapter for adapter in adapters.values() if isinstance(adapter, SideState)]
        for _, row in groupby(mine, lambda adapter: adapter.stage):
            chain(row)
        if self.plus:
            adding = [adapter for adapter in mine if adapter.adds]
            share(adding, "conv", lambda adapter: adapter.stage, lambda group: group[0].convolution())
