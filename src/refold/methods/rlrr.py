"""RLRR: "Low-Rank Rescaled Vision Transformer Fine-Tuning: A Residual Design Approach" (arXiv 2403.19067).

    W' = W + diag(l) W diag(r),   b' = b + c

on every projection of a block, with vectors of their own for query, key and value. Start as released: l and r
Kaiming-uniform (l within +-sqrt(6), r within +-sqrt(6 / in)), c zero, which is near the backbone and not at it.

As in the released code, SSF's scale and shift (arXiv 2210.08823) follow every other operation: norms and the patch
embedding, in other backbones also what stands between the stages. 288,768 parameters on ViT-B/16 (the printed 0.33M
with a head of 49 classes, VTAB's mean), 248,832 without SSF's. Merged as written; SSF's into the norms' parameters.

On convolutions r has an entry for each input channel, in a grouped one for each of a group; the released code's
convolutions have one for each channel and tap, in a layout of their own. Layouts: channels last and channels first,
joint and separate projections, and ``nn.MultiheadAttention``'s packed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import ScaleShift, WeightAdapter
from refold.adapters.rescaled import Rescaled
from refold.errors import SiteError
from refold.methods.base import Plan, require
from refold.methods.parts import PartsMethod
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["RLRR"]


@dataclass(frozen=True)
class RLRR(PartsMethod):
    """Frozen weights plus themselves with rows and columns re-scaled; merges exactly.

    Args:
        ssf: scale and shift after every other operation as well; only with ``sites=None``.
        sites: roles or module paths (``*`` allowed); None is every projection of attention and MLP where the
            backbone has these, else every Linear and every channel-mixing convolution.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where the model shall stay close to what it was: every change is a re-scaling of weights that are there.
    """

    ssf: bool = True
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "weights plus themselves with rows and columns re-scaled"
    paper: ClassVar[str] = "arXiv 2403.19067"
    letters: ClassVar[str] = "qkv"
    shifts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "ssf", isinstance(self.ssf, bool), "True or False")

    def plan(self, survey: Survey) -> Plan:
        plan = super().plan(survey)
        if not self.ssf or self.sites is not None:
            return plan
        layers, left_out = survey.operations(None)
        skipped = {skip.path: skip for skip in (*plan.skipped, *left_out)}
        sites, adapted = list(plan.sites), {site.path for site in plan.sites}
        for layer in layers:
            if layer.path not in adapted:
                try:
                    sites.append(survey.output_site(layer))
                    skipped.pop(layer.path, None)
                except SiteError as error:
                    skipped[layer.path] = Skipped(layer.path, error.reason)
        return Plan(tuple(sites), tuple(skipped.values()))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> WeightAdapter | ScaleShift:
        options = {"channel_dim": site.channel_dim, "device": device, "dtype": dtype, "shift": site.has_shift}
        if site.slot == "output":
            return ScaleShift(site.out_width, **options)
        return self.by_parts(site, lambda shape, letter: Rescaled(shape, **options))
