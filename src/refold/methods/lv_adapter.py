"""After LV-Adapter: "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving" (arXiv 2209.08953),
which is known here from its abstract.

    x <- x + U (v + softmax(v (K t)^T / sqrt(h)) V t) + b   behind the last block of every stage,   v = GELU(D x + a)

From the abstract and what others tell: learnable multi-scale adapters adjust a frozen backbone under the losses of
several tasks; LV-Adapter brings in language by task-specific prompts of CLIP, aligned with visual features, in a
cross-attention from pixels to words. Chosen here: that multi-scale means an adapter for each scale of the features, a
stage; the bottleneck of h channels, in which one head attends; that the prompts are K text embeddings t, the same for
all stages and learned from where they start; and the start (U and b zero), which is the backbone. t starts at random;
:func:`set_text` puts CLIP's embeddings of a task's classes in. The loss that aligns pixels with classes is not the
adapter's: :mod:`refold.segmentation.pixel_text` has one. Several tasks with an adapter each, or one for all, are
trained by :mod:`refold.dense.multitask`.

A stage has 2 d h + d + h + 2 h C parameters, and all share K C. With the defaults 765,952 on ResNet-50, 518,272 on
Swin-B and ConvNeXt-B, 666,880 on ViT-B/16. It does not fold: it has activations.

Layouts: tokens, (B, H, W, C) and (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from refold.adapters import Adapter
from refold.adapters.language import LanguageBottleneck, Words
from refold.errors import SiteError
from refold.hosting import hosted
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual, share
from refold.places import block_sites, stages
from refold.sites import Site
from refold.survey import Survey

__all__ = ["LVAdapter", "set_text"]


@dataclass(frozen=True)
class LVAdapter(Method):
    """A bottleneck behind every stage whose positions attend to text embeddings of the task's classes.

    Args:
        hidden: channels h of the bottleneck.
        prompts: K, text embeddings; two at least. As many as the task has classes, to give them CLIP's.
        text_width: channels C of an embedding: 512 of CLIP's ViT-B, 768 of its ViT-L, 1024 of its ResNet-50.
        sites: paths of blocks (``*`` allowed) behind which adapters are; None is the last block of each stage.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where several dense tasks share a frozen backbone, an adapter for each.
    """

    hidden: int = 64
    prompts: int = 16
    text_width: int = 512
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "a bottleneck behind every stage that attends to text embeddings"
    paper: ClassVar[str] = "after arXiv 2209.08953"
    tasks: ClassVar[str] = "segmentation, detection"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        require(self, "prompts", is_count(self.prompts) and self.prompts > 1, "an integer of 2 or more")
        require(self, "text_width", is_count(self.text_width), "a positive integer")

    def plan(self, survey: Survey) -> Plan:
        sites, skipped = block_sites(survey, "output", stages(survey) if self.sites is None else self.sites)
        if not sites:
            raise SiteError(skipped[0].reason, where=skipped[0].path, remedy="Choose other sites")
        return Plan(tuple(sites), tuple(skipped))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> LanguageBottleneck:
        return LanguageBottleneck(site.width, self.hidden, self.text_width, device=device, dtype=dtype)

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        def words(group: object) -> Words:
            weight = mine[0].key.weight
            return Words(self.prompts, self.text_width, device=weight.device, dtype=weight.dtype)

        mine = [adapter for adapter in adapters.values() if isinstance(adapter, LanguageBottleneck)]
        share(mine, "words", lambda _: None, words)


@torch.no_grad()
def set_text(model: nn.Module, text: Tensor) -> None:
    """Give the active LV-Adapter text embeddings (K, C) to start from; a row is scaled to length 1.

    Args:
        model: a backbone with the adapter, or a model around it.
        text: of as many rows and channels as the method has ``prompts`` and ``text_width``.

    Raises:
        SiteError: no such adapter is active, or embeddings of another shape, not finite or zero.
    """
    current = [adapter for slot in hosted(model).values() for adapter, _ in slot.current()]
    found = {id(a.words): a.words.embeddings for a in current if isinstance(a, LanguageBottleneck)}
    if not found:
        raise SiteError("no LVAdapter is in use", where="set_text", remedy="Attach one, or activate it")
    lengths = text.norm(dim=-1, keepdim=True)
    if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
        raise SiteError("an embedding is zero or not finite", where="text")
    for embeddings in found.values():
        if text.shape != embeddings.shape:
            raise SiteError(
                f"has shape {tuple(text.shape)}, the adapter's prompts {tuple(embeddings.shape)}",
                where="text",
                remedy="Set prompts and text_width of LVAdapter",
            )
        embeddings.copy_(text / lengths)
