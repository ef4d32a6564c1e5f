"""Random layers of every kind, in random surroundings, with a random method: what the property tests draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import refold
from refold.adapters import ChannelAdapter
from refold.maps import ChannelMap, to_float64
from refold.methods import Method, Plan
from refold.sites import Site
from refold.survey import Survey

__all__ = ["KINDS", "Case", "Surrounded", "cases"]

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KINDS = ["linear", *(f"{kind}{dims}d" for kind in ("conv", "transposed") for dims in CONVS), "attention"]


# -- a channel map of any number of blocks, which no public method has ----------------------------------------------


class Blocks(ChannelAdapter):
    """``x -> M x + c`` with M block-diagonal; ``width`` blocks make it a factor for each channel."""

    def __init__(self, width: int, groups: int, dim: int, *, shift: bool) -> None:
        super().__init__()
        self.groups, self.dim = groups, dim
        self.blocks = nn.Parameter(torch.eye(width // groups).repeat(groups, 1, 1).double())
        self.constant = nn.Parameter(torch.zeros(width).double()) if shift else None

    def forward(self, x: Tensor, *, with_shift: bool = True) -> Tensor:
        grouped = x.movedim(self.dim, -1).unflatten(-1, (self.groups, -1))
        y = torch.einsum("gij,...gj->...gi", self.blocks, grouped).flatten(-2)
        if with_shift and self.constant is not None:
            y = y + self.constant
        return y.movedim(-1, self.dim)

    def shift(self) -> Tensor | None:
        return self.constant

    def channel_map(self, cast: Callable[[Tensor], Tensor] = to_float64) -> ChannelMap:
        blocks, shift = cast(self.blocks), None if self.constant is None else cast(self.constant)
        if self.blocks.shape[1] == 1:
            return ChannelMap(blocks.flatten(), shift=shift, groups=self.groups)
        return ChannelMap.dense(torch.block_diag(*blocks), shift, self.groups)


@dataclass(frozen=True)
class BlockMap(Method):
    """A :class:`Blocks` before one layer."""

    groups: int = 1
    shift: bool = True
    sites: str = "layer"

    def plan(self, survey: Survey) -> Plan:
        layers, _ = survey.resolve(self.sites, (), moved=False, groups=self.groups)
        return Plan(tuple(survey.input_site(x, wants_shift=self.shift, groups=self.groups) for x in layers))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Blocks:
        shift = site.shift is not None and site.shift.target != "none"
        return Blocks(site.width, self.groups, site.channel_dim, shift=shift)


# -- what is drawn ---------------------------------------------------------------------------------------------------


class Surrounded(nn.Module):
    """A layer, perhaps with something in front of and behind it."""

    def __init__(self, before: list[nn.Module], layer: nn.Module, after: list[nn.Module]) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Sequential(*before), layer, nn.Sequential(*after)

    def forward(self, *inputs: Tensor) -> Tensor:
        # One tensor given three times stays one: torch's attention treats self-attention apart.
        fed = {id(x): self.before(x) for x in inputs}
        y = self.layer(*(fed[id(x)] for x in inputs))
        return self.after(y[0] if isinstance(y, tuple) else y)


@dataclass
class Case:
    """One drawn example; ``dims`` kernel axes."""

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    before: list[nn.Module]
    after: list[nn.Module]
    method: Method
    width: int
    groups: int = 1
    dims: int = 0
    allow_new_bias: bool = False
    pads_zeros: bool = False

    @property
    def channel_dim(self) -> int:
        return -1 - self.dims


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, number + 1) if number % d == 0])


@st.composite
def methods(draw: st.DrawFn, width: int, groups: int) -> Method:
    """Any method; mostly one that fits, with blocks of channels that are groups of the layer."""
    fitting = ["blocks", "blocks", "lora", "dora", "ssf", "oft"]
    kind = draw(st.sampled_from([*fitting, "rep", "rep"] if groups == 1 else fitting))
    scale = draw(st.sampled_from([0.1, 0.7, -1.3]))
    if kind == "rep" or draw(st.integers(0, 9)) == 7:
        parts = draw(st.sampled_from([1, 2, 3]))
        rank = parts * draw(st.integers(1, 3))
        return refold.RepAdapter(rank=rank, groups=parts, scale=scale, dropout=0.0, sites="layer")
    if kind in ("lora", "dora"):
        method = {"lora": refold.LoRA, "dora": refold.DoRA}[kind]
        return method(rank=draw(st.integers(1, 5)), scale=scale, sites="layer")
    if kind == "ssf":
        return refold.SSF(sites="layer")
    if kind == "oft":
        return refold.OFT(block=draw(st.integers(2, 4)), sites="layer")
    exact = st.sampled_from([d for d in range(groups, width + 1) if width % d == 0 and d % groups == 0])
    blocks = draw(divisors(width)) if draw(st.integers(0, 7)) == 5 else draw(exact)
    return BlockMap(blocks, draw(st.booleans()))


@st.composite
def neighbours(draw: st.DrawFn, kind: str, width: int, dims: int, *, batch_norm: bool) -> list[nn.Module]:
    """Nothing, a norm with or without bias, an activation, or both in one order or the other."""
    norms: list[nn.Module] = []
    if dims == 0:
        norms.append(nn.LayerNorm(width, bias=draw(st.booleans())))
    else:
        norms.append(nn.GroupNorm(draw(divisors(width)), width))
    if batch_norm:
        norms.append(BATCH_NORMS[dims](width, track_running_stats=draw(st.integers(0, 5)) > 0))
    norm = norms[draw(st.integers(0, len(norms) - 1))]
    activation = nn.LeakyReLU(0.1, inplace=draw(st.booleans())) if kind == "after" else nn.Hardswish()
    return draw(st.sampled_from([[], [norm], [norm], [activation], [norm, activation], [activation, norm]]))


def convolution(draw: st.DrawFn, dims: int) -> tuple[nn.Module, Tensor, bool]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside, outside = draw(st.sampled_from([1, 2, 3, 4, 4])), draw(st.integers(1, 3))
    largest = {1: 4, 2: 3, 3: 3}[dims]

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation = axes(1, largest), axes(1, 2)
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    stride = (1,) * dims if padding == "same" else axes(1, 3)
    if padding == "numbers":
        padding = axes(0, 2)
    layer = CONVS[dims](
        groups * inside,
        groups * outside,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [max(e, 3) + draw(st.integers(0, 2)) for e in extent]  # reflection pads by less than the size
    around = [e - 1 for e in extent] if padding == "same" else [0] * dims if padding == "valid" else padding
    return layer, torch.randn(2, groups * inside, *sizes), mode == "zeros" and any(around)


def transposed(draw: st.DrawFn, dims: int) -> tuple[nn.Module, Tensor, bool]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inside, outside = draw(st.sampled_from([1, 2, 3, 4, 4])), draw(st.integers(1, 3))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, padding = axes(1, 3), axes(1, 3), axes(1, 2), axes(0, 2)
    largest = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    extra = tuple(draw(st.integers(0, high)) for high in largest)
    layer = TRANSPOSED[dims](
        groups * inside,
        groups * outside,
        kernel,
        stride=stride,
        padding=padding,
        output_padding=extra,
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    sizes = [draw(st.integers(1, 2)) + 2 * p for p in padding]
    whole = all(
        s == d == 1 and p >= k - 1 for s, d, p, k in zip(stride, dilation, padding, kernel, strict=True)
    )  # every output sees the whole kernel
    return layer, torch.randn(2, groups * inside, *sizes), not whole


def attention(draw: st.DrawFn) -> tuple[nn.Module, tuple[Tensor, ...]]:
    heads = draw(st.integers(1, 3))
    width, batch_first = 2 * heads * draw(st.integers(1, 2)), draw(st.booleans())
    layer = nn.MultiheadAttention(
        width,
        heads,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        batch_first=batch_first,
    )

    def tokens(count: int) -> Tensor:
        return torch.randn((2, count, width) if batch_first else (count, 2, width), dtype=torch.float64)

    query, other = tokens(draw(st.integers(1, 4))), tokens(draw(st.integers(1, 4)))
    kinds = {"self": (query, query, query), "cross": (query, other, other), "apart": (query, other, other.clone())}
    return layer, kinds[draw(st.sampled_from(sorted(kinds)))]


@st.composite
def cases(draw: st.DrawFn, kind: str) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dims, groups, pads_zeros = 0, 1, False
    if kind == "attention":
        layer, inputs = attention(draw)
        width = layer.embed_dim
        before = draw(neighbours("before", width, 0, batch_norm=False))
        after = draw(neighbours("after", width, 0, batch_norm=False))
    elif kind == "linear":
        layer = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 6)), bias=draw(st.booleans()))
        width, axes = layer.in_features, draw(st.lists(st.integers(2, 3), min_size=1, max_size=3))
        inputs = (torch.randn(*axes, width),)
        before = draw(neighbours("before", width, 0, batch_norm=len(axes) == 1))
        after = draw(neighbours("after", layer.out_features, 0, batch_norm=len(axes) == 1))
    else:
        dims = int(kind[-2])
        layer, x, pads_zeros = (convolution if kind.startswith("conv") else transposed)(draw, dims)
        width, groups, inputs = layer.in_channels, layer.groups, (x,)
        before = draw(neighbours("before", width, dims, batch_norm=True))
        after = draw(neighbours("after", layer.out_channels, dims, batch_norm=True))
    return Case(
        layer,
        tuple(x.double() for x in inputs) if kind != "attention" else inputs,
        before,
        after,
        draw(methods(width, groups)),
        width,
        groups,
        dims,
        draw(st.integers(0, 3)) == 0,
        pads_zeros,
    )
