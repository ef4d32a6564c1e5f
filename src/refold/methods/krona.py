"""KronA: "Parameter Efficient Tuning with Kronecker Adapter" (arXiv 2212.10650).

    form="weight":  W' = W + s A (x) B             on the attention's query and value
    form="block":   f(x) = rho x + s (A (x) B) x   before the MLP's first projection, W' = W (rho I + s A (x) B)

A Kaiming-uniform, B zero, rho (one learned number for each place) 1: the identity at the start. A has about sqrt(out) x
sqrt(in) entries, which makes A and B of one size: 1,600 parameters for a matrix of 768 x 768, of full rank.

The paper's blocks KronA-B and KronA-B-res (rho is the latter's learned residual) stand beside the whole feed-forward
network, where nothing linear can take them up. Here the block with the residual stands in sequence, before the MLP's
first projection, where it folds; on a gated MLP one block serves both projections. A convolution's kernel is B's.
Biases stay. The paper is about language models: the places in other backbones are ours. Layouts: channels last and
channels first, joint and separate projections, and ``nn.MultiheadAttention``'s packed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import WeightAdapter
from refold.adapters.kronecker import Kronecker, KroneckerBlock
from refold.methods.base import Plan, is_count, require
from refold.methods.parts import PartsMethod
from refold.sites import Site
from refold.survey import Survey

__all__ = ["KronA"]


@dataclass(frozen=True)
class KronA(PartsMethod):
    """Kronecker product added to a frozen weight, or a block of one before it; merges exactly.

    Args:
        size: rows and columns of A at most (the largest divisors of out and in below it are taken); None is the
            square roots of out and in.
        scale: s.
        form: ``"weight"``, or ``"block"`` with a learned residual.
        sites: roles or module paths (``*`` allowed); None is the attention's query and value (``"block"``: the MLP's
            first projection) where the backbone has them, else every Linear and every channel-mixing convolution.
            Of a joint projection its query and value rows are adapted, other layers as a whole.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where a change of full rank is wanted with few numbers.
    """

    size: int | None = None
    scale: float = 1.0
    form: str = "weight"
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "Kronecker product added to a weight, or a block of one before it"
    paper: ClassVar[str] = "arXiv 2212.10650"
    tasks: ClassVar[str] = "language"
    roles: ClassVar[tuple[str, ...]] = ("attention",)
    letters: ClassVar[str] = "qv"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "size", self.size is None or is_count(self.size), "None or a positive integer")
        require(self, "form", self.form in ("weight", "block"), '"weight" or "block"')

    def plan(self, survey: Survey) -> Plan:
        if self.form == "weight":
            return super().plan(survey)
        layers, skipped = survey.resolve(self.sites, ("mlp",), moved=False)
        return Plan(tuple(survey.input_sites(layers, wants_shift=False)), tuple(skipped))

    def build(
        self, site: Site, device: torch.device | None, dtype: torch.dtype | None
    ) -> WeightAdapter | KroneckerBlock:
        options = {"channel_dim": site.channel_dim, "device": device, "dtype": dtype}
        if self.form == "block":
            return KroneckerBlock(site.width, self.size, self.scale, **options)
        return self.by_parts(site, lambda shape, part: Kronecker(shape, self.size, self.scale, **options))
