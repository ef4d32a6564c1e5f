"""After SPM: "Prompt-Matched Semantic Segmentation" (arXiv 2208.10159), which is known here from its abstracts.

    x <- x + U z_T + b   between two stages,   z_0 = D x + a
    s_t = softmax(C z_{t-1} + c),   z_t = z_{t-1} + GELU(F(z_{t-1} + E s_t) + f),   t = 1 ... T

From the abstracts: the backbone, a CNN or a transformer, is frozen and cut into stages; between them a light matcher
learns prompts progressively, by a recurrent mechanism, guided by interim semantic maps, and turns what a stage gives
into what suits the next one. Chosen here: that the recurrence is within a matcher, T steps with shared parameters;
the bottleneck of h channels; s, the interim map of K classes at each position; that what a position's classes bring
(E s) is added before a depthwise 3 x 3 filter F; and the start (U and b zero), which is the backbone. The maps are
taught by the task's loss alone, not by labels of their own, so that their classes need not be the task's. Four equal
parts are the stages of a backbone of one shape throughout (ViT). Class and register tokens pass the filters alone.

A place has 2 d h + d + 2 h K + K + 11 h parameters: 245,664 in all on ResNet-50, 130,080 on Swin-B and ConvNeXt-B,
311,712 on ViT-B/16. It does not fold: it has activations and mixes positions.

Layouts: tokens, (B, H, W, C) and (B, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.spm import SemanticMatcher
from refold.errors import SiteError
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual
from refold.places import block_sites, on_grid, stages
from refold.sites import Site
from refold.survey import Survey

__all__ = ["SPM"]


@dataclass(frozen=True)
class SPM(Method):
    """A prompt between every two stages, made from features and a soft map of classes in a few equal steps.

    Args:
        hidden: channels h of the prompt.
        classes: K, of the interim semantic map; two at least.
        steps: T, how often the map and the prompt refine each other.
        sites: paths of blocks (``*`` allowed) behind which prompts are added; None is the last block of each stage but
            the last stage.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for semantic segmentation where few places shall be touched.
    """

    hidden: int = 64
    classes: int = 32
    steps: int = 2
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "a prompt between stages, guided by a soft map of classes"
    paper: ClassVar[str] = "after arXiv 2208.10159"
    tasks: ClassVar[str] = "segmentation"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        require(self, "classes", is_count(self.classes) and self.classes > 1, "an integer of 2 or more")
        require(self, "steps", is_count(self.steps), "a positive integer")

    def plan(self, survey: Survey) -> Plan:
        ends = stages(survey)[:-1] if self.sites is None else self.sites
        if not ends:
            raise SiteError(
                "the backbone has one stage, and prompts go between two",
                where=type(survey.model).__name__,
                remedy="Name blocks in sites=",
            )
        found, skipped = block_sites(survey, "output", ends)
        sites, flat = on_grid(survey, found)
        return Plan(tuple(sites), tuple(skipped + flat))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> SemanticMatcher:
        return SemanticMatcher(site.width, self.hidden, self.classes, self.steps, device=device, dtype=dtype)
