"""A bottleneck that mixes the frames of a clip, for backbones that see one image at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.nonlinear import ACTIVATIONS
from refold.adapters.side import Layout, SideAdapter
from refold.errors import SiteError

__all__ = ["TemporalBottleneck"]

#: Frames that one output frame sees: itself and its neighbours.
_TAPS = 3


class TemporalBottleneck(SideAdapter):
    """``Up act(Conv(Down x + a)) + b``, Conv depthwise over the frames of a clip, with zeros before and behind it.

    Images that follow one another in the batch are a clip. Tokens before those of the grid get nothing. Down and Up
    start as a Linear with zero biases, Conv at zero: nothing is added at the start.

    Args:
        width: channels d.
        hidden: inner width c.
        frames: images of a clip.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        frames: int,
        activation: str = "identity",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.frames = frames
        self.down = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.taps = nn.Parameter(torch.zeros(_TAPS, hidden, device=device, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(hidden, device=device, dtype=dtype))
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(hidden, width, device=device, dtype=dtype)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """See :class:`SideAdapter`; ``x`` is (clips * frames, ...).

        Raises:
            SiteError: the batch is no multiple of ``frames``.
        """
        if len(x) % self.frames:
            raise SiteError(
                f"a batch of {len(x)} images is no whole number of clips of {self.frames} frames",
                where=layout.where,
                remedy="Pass the frames of each clip one after the other, or attach with another frames=",
            )
        hidden = self.down(layout.last(x)[:, layout.prefix :])
        clips = hidden.unflatten(0, (-1, self.frames))
        # Weighted sums of shifted frames: torch's depthwise 3-d convolutions are slower, and want other strides.
        padded = torch.cat((torch.zeros_like(clips[:, :1]), clips, torch.zeros_like(clips[:, :1])), dim=1)
        shifted = (padded.narrow(1, tap, self.frames) for tap in range(_TAPS))
        mixed = self.shift.to(hidden.dtype)
        for frames, weight in zip(shifted, self.taps.to(hidden.dtype), strict=True):
            mixed = torch.addcmul(mixed, frames, weight)
        added = self.up(self.activation(mixed).flatten(0, 1))
        return layout.unlast(F.pad(added, (0, 0, layout.prefix, 0)) if layout.prefix else added)

    def extra_repr(self) -> str:
        return f"frames={self.frames}"
