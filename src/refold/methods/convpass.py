"""Convpass: "Convolutional Bypasses Are Better Vision Transformer Adapters" (arXiv 2207.07039).

    out = x + f(LN(x)) + s C(LN(x)),   C = Up drop(act(Conv3x3 act(Down))),   f the attention, and f the MLP

C reads what the branch reads, behind its norm; act is QuickGELU. Class and register tokens are convolved alone, as
images of one pixel: they see the kernel's centre. Down Xavier-uniform, Up and all biases zero, the convolution
the identity or Xavier-uniform: the backbone at the start. 327,552 parameters on ViT-B/16 with hidden=8, 163,776
beside the attention alone: sites (2 d h + h + d + 9 h^2 + h). It does not fold: it has activations and mixes positions.

Deviations from the released code, on purpose: any grid of patches and any prefix tokens instead of 14 x 14 and one
class token; the sum is made where the branch meets the stream, behind layer scale and drop-path, of which C has none.
A branch that begins with no norm (ConvNeXt, ResNet) gives C the stream itself, and a block with one branch one C.
Layouts: tokens, (B, H, W, C) and (B, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.convbottleneck import ConvBottleneck
from refold.adapters.nonlinear import ACTIVATIONS
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual
from refold.places import branch_site, branches, on_grid
from refold.sites import Site
from refold.survey import Survey

__all__ = ["Convpass"]


@dataclass(frozen=True)
class Convpass(Method):
    """Convolutional bypass beside the attention and the MLP, on the normalised stream.

    Args:
        hidden: inner width h.
        scale: s; the paper searches {0.01, 0.1, 1, 10, 100} per task.
        dropout: before the up projection, in training only.
        activation: before and behind the convolution.
        start: of the convolution, ``"identity"`` or ``"xavier"``; the paper chooses per task.
        sites: roles (``"attention"``, ``"mlp"``) or paths of residual branches; None is both roles.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for tasks of place and number (counting, orientation, distance), where it beats what does not look at
    neighbours, if the adapter may stay in the model.
    """

    hidden: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    activation: str = "quick_gelu"
    start: str = "identity"
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "convolutional bypass beside the attention and the MLP"
    paper: ClassVar[str] = "arXiv 2207.07039"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        require(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        require(self, "start", self.start in ("identity", "xavier"), '"identity" or "xavier"')

    def plan(self, survey: Survey) -> Plan:
        found, skipped = branches(survey, self.sites, ("attention", "mlp"))
        sites, flat = on_grid(survey, [branch_site(survey, branch, "normed") for branch in found])
        return Plan(tuple(sites), tuple(skipped + flat))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> ConvBottleneck:
        return ConvBottleneck(
            site.width,
            self.hidden,
            self.scale,
            self.dropout,
            self.activation,
            identity=self.start == "identity",
            device=device,
            dtype=dtype,
        )
