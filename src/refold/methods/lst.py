"""LST: "Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning" (arXiv 2206.06522).

    s_0 = E x_1,   s_l = T_l(g_l D_l y_l + (1 - g_l) s_{l-1}),   g_l = sigmoid(alpha_l / 0.1),   l = 1 ... L
    y_L + U norm(s_L) + b  in place of the last block's output y_L

x_1 enters the first block, y_l leaves block l, and T_l is a transformer block of a width ``reduction`` times smaller.
The side network reads the backbone and gives nothing back before the end, so the backbone records no graph at all.
U, b and alpha zero, the rest as torch starts it: the backbone at the start. 2,376,492 parameters on ViT-B/16 (the
2.38M of the comparisons): with w = d / reduction, L (d w + 12 w^2 + 14 w + 1) + 2 d w + d + 3 w. It does not fold.

Where the features' shape changes (Swin, ConvNeXt) each stage has a state of its width, which begins as E x of the
stage's first block, plus the state before, pooled to the new grid and mapped to the new width.

Deviations from the paper and its code (a T5), on purpose: what leaves the ladder is added to the backbone's
last features instead of standing in for them, and the side blocks start at random and not as pruned copies of the
backbone's. Heads have 8 channels, as T5's at a reduction of 8 (4, 2 or 1 where 8 does not divide w), and w is never
under 8, where norms would leave little. A gradient checkpoint around single blocks is exact, any other inside the
model refused. Layouts: tokens, (B, H, W, C) and (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch

from refold.adapters import Adapter
from refold.adapters.ladder import Carrier, chain
from refold.adapters.sidenet import Entry, Exit, Rung
from refold.errors import SiteError
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual
from refold.places import block_sites, on_grid
from refold.sites import Site
from refold.survey import Survey

__all__ = ["LST"]

#: By the tag of the site.
_STEPS: dict[str, type[Entry] | type[Rung] | type[Exit]] = {"entry": Entry, "": Rung, "exit": Exit}
_NARROWEST = 8


@dataclass(frozen=True)
class LST(Method):
    """Ladder side network: narrow transformer blocks beside the backbone's, which records no graph.

    Args:
        reduction: how many times narrower than the backbone the side network is.
        sites: paths (``*`` allowed) of the blocks that have a rung, or of modules around them; None is every block.
            Fewer are the paper's dropped layers.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it when memory for training is shortest: the backbone records no graph at all.
    """

    reduction: int = 8
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "narrow transformer beside the backbone, joined at its end"
    paper: ClassVar[str] = "arXiv 2206.06522"
    tasks: ClassVar[str] = "language, classification"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "reduction", is_count(self.reduction), "a positive integer")

    def plan(self, survey: Survey) -> Plan:
        shapes, inputs = survey.trace.shapes, survey.trace.inputs
        found, skipped = block_sites(survey, "output", self.sites)
        sites: list[Site] = []
        for shape, members in groupby(found, lambda site: shapes[site.path]):
            stage = [replace(site, role="rung") for site in members]
            slot = "parallel" if inputs.get(stage[0].path) == shape else "output"
            sites += [replace(stage[0], slot=slot, role="entry", tag="entry"), *stage]
        if not sites:
            raise SiteError(skipped[0].reason, where=skipped[0].path, remedy="Choose another method")
        if sum(site.tag == "entry" for site in sites) > 1:
            _, flat = on_grid(survey, sites)
            if flat:
                raise SiteError(
                    f"{flat[0].reason}, so no state could be handed on to or from it",
                    where=flat[0].path,
                    remedy="Name blocks of one stage in sites=",
                )
        return Plan((*sites, replace(sites[-1], role="exit", tag="exit")), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Carrier:
        side = max(site.width // self.reduction, _NARROWEST)
        return _STEPS[site.tag](site.width, side, device=device, dtype=dtype)

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        mine = [adapter for adapter in adapters.values() if isinstance(adapter, Carrier)]
        chain(mine)
        for adapter in mine:
            if isinstance(adapter, Entry) and isinstance(adapter.before, Rung):
                adapter.carry_from(adapter.before.side)
