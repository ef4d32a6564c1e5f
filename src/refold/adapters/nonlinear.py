"""The bottleneck with an activation that most adapters are."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.adapters.side import Layout, SideAdapter

__all__ = ["ACTIVATIONS", "Bottleneck", "GatedBottleneck", "GroupedLinear", "start"]


class QuickGELU(nn.Module):
    """``x sigmoid(1.702 x)``, CLIP's approximation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


#: By the name a method's ``activation`` takes.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


@torch.no_grad()
def start(down: Tensor, up: Tensor, biases: Iterable[Tensor], init: str | float) -> None:
    """Set a bottleneck's tensors to a published start.

    Args:
        init: ``"lora"`` (Down Kaiming-uniform with a = sqrt(5), Up zero), ``"repadapter"`` (Down Xavier-uniform, Up
            zero), ``"kaiming"`` (both), ``"xavier"`` (both Xavier-uniform, biases of std 1e-6), or a number, the
            standard deviation of a normal cut off at two. Biases are zero otherwise.
    """
    for bias in biases:
        nn.init.normal_(bias, std=1e-6 if init == "xavier" else 0.0)
    for weight in (down, up):
        if init in ("xavier", "repadapter"):
            nn.init.xavier_uniform_(weight)
        elif isinstance(init, float):
            nn.init.trunc_normal_(weight, std=init, a=-2 * init, b=2 * init)
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if init in ("lora", "repadapter"):
        nn.init.zeros_(up)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): in training all of a sample or nothing, with the mean kept."""
    if not training or rate == 0.0:
        return x
    kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), device=x.device, dtype=x.dtype).bernoulli_(1 - rate)
    return x * (kept / (1 - rate))


class GroupedLinear(nn.Module):
    """``B x + b`` with B block-diagonal over ``groups``; both zero until they are set.

    ``weight`` is (out, in / groups): the rows of a group see that group's inputs alone.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        groups: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(out_width, in_width // groups, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.block_diag(*self.weight.chunk(self.groups)), self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1] * self.groups}, {len(self.weight)}, groups={self.groups}"


class Bottleneck(SideAdapter):
    """``scale * (Up drop(act(Down x + a)) + b)`` along the channels.

    Args:
        width: channels d of what it reads.
        hidden: inner width h.
        groups: Up is block-diagonal over so many; divides ``hidden`` and ``out_width``.
        dropout: on the h numbers, in training only.
        out_width: channels of what it adds; ``width`` if None.
        init: as :func:`start` takes it.
        channel_scale: a learned factor for each channel, ones at the start, in place of the number ``scale``.
        drop_path: probability with which training leaves the whole adapter out, sample by sample.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: str = "gelu",
        *,
        out_width: int | None = None,
        groups: int = 1,
        init: str | float = "lora",
        channel_scale: bool = False,
        drop_path: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.dropout, self.drop_path = scale, dropout, drop_path
        out_width = width if out_width is None else out_width
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Linear(width, hidden, **factory)
        self.activation = ACTIVATIONS[activation]()
        self.up = (
            nn.Linear(hidden, out_width, **factory)
            if groups == 1
            else GroupedLinear(hidden, out_width, groups, **factory)
        )
        self.gamma = nn.Parameter(torch.ones(out_width, **factory)) if channel_scale else None
        start(self.down.weight, self.up.weight, (self.down.bias, self.up.bias), init)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        hidden = F.dropout(self.activation(self.down(layout.last(x))), self.dropout, self.training)
        added = self.up(hidden)
        added = self.scale * added if self.gamma is None else self.gamma.to(added.dtype) * added
        return layout.unlast(drop_path(added, self.drop_path, self.training))

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}, drop_path={self.drop_path}"


class GatedBottleneck(Bottleneck):
    """A bottleneck that takes the place of a part of the host's output y: ``(1 - g) y + g scale * (...)``.

    The gate g is a learned number, zero at the start; as it hides the rest there, Down and Up both start at random.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: str = "gelu",
        *,
        out_width: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(width, hidden, scale, dropout, activation, out_width=out_width, init="kaiming", **factory)
        self.gate = nn.Parameter(torch.zeros(1, **factory))

    def compose(self, output: Tensor, added: Tensor) -> Tensor:
        return output + self.gate.to(output.dtype) * (added.to(output.dtype) - output)
