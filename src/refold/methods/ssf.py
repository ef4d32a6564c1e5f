"""SSF: "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning" (arXiv 2210.08823).

    y = gamma * x + beta   per channel, after every operation of the backbone

gamma starts at N(1, 0.02) and beta at N(0, 0.02), as published: the start is near the backbone, not equal to it.
Places: after every Linear, convolution and norm, the patch embedding and the final norm included. Merged:
``W <- diag(gamma) W``, ``b <- gamma b + beta``; into a norm's own scale and bias likewise. Layouts: channels last and
channels first; depthwise convolutions too.

Deviations from the released code, on purpose: a layer without bias gets no beta where no BatchNorm behind it could take
it; the released code has no merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import ScaleShift
from refold.errors import SiteError
from refold.methods.base import Method, Plan, are_sites, require
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["SSF"]


@dataclass(frozen=True)
class SSF(Method):
    """A scale and a shift per channel after every operation; merges exactly.

    Args:
        sites: roles or module paths (``*`` allowed, norms included); None is every operation.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it on backbones of any make: it needs neither attention nor MLP, and folds into norms and depthwise convolutions
    as well; a training step keeps every operation's output.
    """

    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "scale and shift per channel after every operation"
    paper: ClassVar[str] = "arXiv 2210.08823"

    def __post_init__(self) -> None:
        require(self, "sites", are_sites(self.sites), "None, a role or path, or a tuple of them")

    def plan(self, survey: Survey) -> Plan:
        layers, skipped = survey.operations(self.sites)
        sites: list[Site] = []
        for layer in layers:
            try:
                sites.append(survey.output_site(layer))
            except SiteError as error:
                if self.sites is not None:
                    raise
                skipped.append(Skipped(layer.path, error.reason))
        return Plan(tuple(sites), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> ScaleShift:
        return ScaleShift(
            site.out_width,
            channel_dim=site.channel_dim,
            shift=site.has_shift,
            device=device,
            dtype=dtype,
        )
