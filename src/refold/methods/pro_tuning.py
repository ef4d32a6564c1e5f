"""After Pro-tuning: "Unified Prompt Tuning for Vision Tasks" (arXiv 2207.14381), which is known here from its abstract.

    x <- x + P(x)   behind the last block of every stage,   P = Up act(DWConv5x5 act(Down))

From the abstract: the backbone, a CNN or a transformer, is frozen, and prompts for the task are learned from the
image's features. That they are made stage by stage, by 1 x 1, depthwise 5 x 5 and 1 x 1 convolutions, and added is as
others describe it. Chosen here: the width between the convolutions, a GELU behind the first two, biases, a start (Down
Xavier-uniform, the filters the identity, Up zero), which is the backbone, and four equal parts for stages where a
backbone has one shape throughout (ViT). Class and register tokens pass the filters alone, as images of one pixel.

stages (2 d h + 27 h + d) parameters: 502,272 on ResNet-50, 254,592 on Swin-B and ConvNeXt-B, 403,200 on ViT-B/16. It
does not fold: it has activations and mixes positions.

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
from refold.places import block_sites, on_grid, stages
from refold.sites import Site
from refold.survey import Survey

__all__ = ["ProTuning"]

_KERNEL = 5


@dataclass(frozen=True)
class ProTuning(Method):
    """A prompt made from the features of every stage by a small convolutional block, and added to them.

    Args:
        hidden: width h between the two 1 x 1 convolutions.
        activation: behind the first two convolutions.
        sites: paths of blocks (``*`` allowed) behind which prompts are added; None is the last block of each stage.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where few places shall be touched: one adapter a stage, for classifiers and dense heads alike.
    """

    hidden: int = 64
    activation: str = "gelu"
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "a convolutional prompt behind every stage"
    paper: ClassVar[str] = "after arXiv 2207.14381"
    tasks: ClassVar[str] = "classification, detection, segmentation"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        require(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    def plan(self, survey: Survey) -> Plan:
        found, skipped = block_sites(survey, "output", stages(survey) if self.sites is None else self.sites)
        sites, flat = on_grid(survey, found)
        return Plan(tuple(sites), tuple(skipped + flat))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> ConvBottleneck:
        return ConvBottleneck(
            site.width,
            self.hidden,
            activation=self.activation,
            kernel=_KERNEL,
            depthwise=True,
            device=device,
            dtype=dtype,
        )
