"""ST-Adapter: "Parameter-Efficient Image-to-Video Transfer Learning" (arXiv 2206.13559).

    x <- x + Up DWConv(Down x)   on the residual stream, before the attention and before the MLP

of a backbone for images that is given the frames of clips one after the other: x is (clips * frames, ...). DWConv is
depthwise over three frames (3 x 1 x 1), with zeros outside the clip. It acts on the tokens of patches alone; class and
register tokens stay. DWConv starts at zero: the backbone at the start. sites (2 d c + 4 c + c + d) parameters:
14,220,288 on ViT-B/16 with c = 384 (24 sites, the released model of SSv2), 7,110,144 before the MLP alone (12 sites,
that of K400). It does not fold: it mixes frames, and its sum reaches the stream past the norm.

Where the head reads the class token alone, as in the released model, the last adapter before an MLP gets no gradient:
no attention follows that would carry the patches to it. The published counts include it, and so does this place.

The released code has no activation, so the default is none. Deviations from it, on purpose: any grid and any prefix
tokens; nothing is changed in place. Layouts: tokens, (B, H, W, C) and (B, C, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from refold.adapters.nonlinear import ACTIVATIONS
from refold.adapters.temporal import TemporalBottleneck
from refold.errors import SiteError
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual
from refold.places import branch_site, branches, on_grid
from refold.sites import Site
from refold.survey import Survey

__all__ = ["STAdapter"]


@dataclass(frozen=True)
class STAdapter(Method):
    """Mixes the frames of a clip before the attention and the MLP of an image backbone.

    Every batch must hold whole clips: ``frames`` images each, one clip after the other.

    Args:
        hidden: inner width c.
        frames: images of a clip; of a :class:`refold.video.FrameModel` its ``frames``.
        activation: behind the convolution; the released code has none.
        sites: roles (``"attention"``, ``"mlp"``) or paths of residual branches; None is both roles.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for video on a backbone that was made for images.
    """

    hidden: int = 384
    frames: int = 8
    activation: str = "identity"
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "mixes a clip's frames before the attention and the MLP"
    paper: ClassVar[str] = "arXiv 2206.13559"
    tasks: ClassVar[str] = "video"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "hidden", is_count(self.hidden), "a positive integer")
        require(self, "frames", is_count(self.frames), "a positive integer")
        require(self, "activation", self.activation in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")

    def plan(self, survey: Survey) -> Plan:
        found, skipped = branches(survey, self.sites, ("attention", "mlp"))
        sites, flat = on_grid(survey, [branch_site(survey, branch, "before") for branch in found])
        survey.example = survey.example.map(self._clips)  # what attach runs to prove the adapters
        return Plan(tuple(sites), tuple(skipped + flat))

    def _clips(self, batch: Tensor) -> Tensor:
        """Whole clips, of repeated images where the batch holds none.

        Raises:
            SiteError: the model takes clips (B, T, C, H, W) of another number of frames, so it would mix other clips'.
        """
        if batch.dim() == 5:
            if batch.shape[1] != self.frames:
                remedy = f"Use STAdapter(frames={batch.shape[1]})"
                raise SiteError(f"clips have {batch.shape[1]} frames, not {self.frames}", where="frames", remedy=remedy)
            return batch
        whole = batch.dim() == 0 or len(batch) % self.frames == 0
        return batch if whole else batch.repeat_interleave(self.frames, dim=0)

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> TemporalBottleneck:
        return TemporalBottleneck(site.width, self.hidden, self.frames, self.activation, device=device, dtype=dtype)
