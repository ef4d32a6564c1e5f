"""OFT: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (arXiv 2306.07280).

    f(x) = R x,   R block-diagonal, each block (I + Q)(I - Q)^-1 with Q skew-symmetric, put before a frozen projection

The identity at the start (Q zero). Merged: ``W <- W R``; the bias stays. Default place: the attention's projection.

Deviations from the released code, on purpose: the exact inverse instead of a truncated Neumann series, so R is
orthogonal; where the block does not divide a width the largest divisor below it is taken; a grouped convolution gets
blocks within its groups, so it stays grouped. Layouts: channels last and channels first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import BlockRotation
from refold.errors import SiteError
from refold.methods.base import Method, Plan, are_sites, is_count, require
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["OFT"]


@dataclass(frozen=True)
class OFT(Method):
    """Rotation of the input channels of a frozen projection within blocks; merges exactly.

    Args:
        block: channels of a block at most; the largest divisor of a layer's width per group is taken.
        sites: roles or module paths (``*`` allowed); None is the attention's projection where the backbone has one,
            else every Linear and every convolution that is not depthwise.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where the angles between a layer's neurons, and with them what the backbone knows, shall not change.
    """

    block: int = 32
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "rotation within blocks of input channels before a frozen projection"
    paper: ClassVar[str] = "arXiv 2306.07280"
    tasks: ClassVar[str] = "image generation"

    def __post_init__(self) -> None:
        require(self, "block", is_count(self.block) and self.block > 1, "an integer above 1")
        require(self, "sites", are_sites(self.sites), "None, a role or path, or a tuple of them")

    def plan(self, survey: Survey) -> Plan:
        layers, skipped = survey.resolve(self.sites, ("attention",), moved=False, groups=0)
        blocks = {layer.path: self._block(layer.operator.weight_shape[1]) for layer in layers}
        fixed = [Skipped(p, "a block of one channel has nothing to rotate") for p, b in blocks.items() if b == 1]
        if fixed and self.sites is not None and len(fixed) == len(layers):
            raise SiteError(fixed[0].reason, where=fixed[0].path, remedy="Choose a layer with more channels per group")
        sites = [
            survey.input_site(layer, wants_shift=False, groups=layer.operator.in_width // blocks[layer.path])
            for layer in layers
            if blocks[layer.path] > 1
        ]
        return Plan(tuple(sites), tuple(skipped + fixed))

    def _block(self, width: int) -> int:
        """The largest block that divides a group's ``width``."""
        return max(b for b in range(1, min(self.block, width) + 1) if width % b == 0)

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> BlockRotation:
        block = self._block(site.weight_shape[1])
        return BlockRotation(site.width, block, channel_dim=site.channel_dim, device=device, dtype=dtype)
