"""DoRA: "Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353).

    W' = m (W + s B A) / ||W + s B A||,   norms over each output channel, m starting at ||W||.

Direction is LoRA's, magnitude a vector of its own. The norm counts as a constant in the gradient (section 4.3).
Stored is m relative to ||W||, ones at the start: no weight is needed to build the adapter, and a backbone loaded
while it is attached changes nothing about it. Dropout acts on the input of A alone. Places, layouts and kernels
are LoRA's; bias unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from refold.adapters import Decomposed, LowRank
from refold.methods.lora import LoRA

__all__ = ["DoRA"]


@dataclass(frozen=True)
class DoRA(LoRA):
    """Low-rank change of a frozen weight's direction and a magnitude for each output channel; merges exactly.

    Takes LoRA's arguments: see :class:`LoRA`.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it instead of :class:`LoRA` where a low rank falls short of full fine-tuning; a training step costs more, as the
    norms are computed anew in each.
    """

    summary: ClassVar[str] = "low-rank change of a weight's direction, and a magnitude for each output channel"
    paper: ClassVar[str] = "arXiv 2402.09353"
    tasks: ClassVar[str] = "language"
    adapter: ClassVar[type[LowRank]] = Decomposed
