"""KAdaptation: "Parameter-efficient Model Adaptation for Vision Transformers" (arXiv 2203.16329).

    W' = W + s sum_i A_i (x) B_i,   A_i = u_i v_i^T (n x n),   B_i = p_i q_i^T,   i = 1 ... n = 32

on the attention's query and value, each with n matrices A_i of its own that all layers share ("slow weights"), and
B_i of every layer's own; and one bias a layer, added to the query's and the value's. 50,176 parameters on CLIP's
ViT-B/32. Start: u and v uniform in +-0.01, p Xavier-uniform, q and the bias zero: the identity, and every factor has a
gradient after one step. Merged as written. Where n does not divide a layer's widths, their largest common divisor with
n is taken for it; layers with the same n share.

Deviations from the released code, on purpose: it starts both p and q at zero, where no factor ever gets a gradient; it
builds the value's update from the query's B; its dropout of 0.5 on the entries of the update is left out. s is its
5 * 128 / 4. Layouts: channels last and channels first, joint and separate projections, and
``nn.MultiheadAttention``'s packed one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters import Adapter, WeightAdapter
from refold.adapters.kronecker_sum import KroneckerSum
from refold.methods.parts import PartsMethod
from refold.methods.weight import share
from refold.sites import Site

__all__ = ["KAdaptation"]


@dataclass(frozen=True)
class KAdaptation(PartsMethod):
    """Kronecker products with factors that the layers share, on query and value; merges exactly.

    Args:
        rank: n, the number of products and the side of A_i.
        scale: s.
        sites: roles or module paths (``*`` allowed); None is the attention's query and value where the backbone has
            them, else every Linear and every channel-mixing convolution. Of a joint projection its query and value
            rows are adapted, other layers as a whole.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for few labelled images on a large backbone such as CLIP's: fewer numbers than :class:`LoRA` of rank 2.
    """

    rank: int = 32
    scale: float = 160.0
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "Kronecker products with shared factors on query and value"
    paper: ClassVar[str] = "arXiv 2203.16329"
    roles: ClassVar[tuple[str, ...]] = ("attention",)
    letters: ClassVar[str] = "qv"
    shifts: ClassVar[bool] = True

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> WeightAdapter:
        def block(shape: tuple[int, ...], letter: str) -> KroneckerSum:
            return KroneckerSum(
                shape,
                self.rank,
                self.scale,
                group=letter,
                # Separate projections of one attention are children of one module.
                place=site.path.rpartition(".")[0] if letter else site.path,
                channel_dim=site.channel_dim,
                shift=site.has_shift,
                device=device,
                dtype=dtype,
            )

        return self.by_parts(site, block)

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        blocks = [part for adapter in adapters.values() for part in adapter.modules() if isinstance(part, KroneckerSum)]
        share(blocks, "slow", lambda block: block.group, KroneckerSum.slow_weights)
        biased = [block for block in blocks if block.shift]
        share(biased, "constant", lambda block: block.place, KroneckerSum.shared_bias)
