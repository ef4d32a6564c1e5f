"""What a place for an adapter is: the layer, the slot, and where a shift would go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from refold.fold import Operator

__all__ = ["Geometry", "Layer", "Route", "Shift", "Site", "Skipped", "own_sites"]


@dataclass(frozen=True)
class Shift:
    """Where the constant part of a channel map at a layer's input ends up when merged.

    ``target`` is ``"bias"`` (the layer's own), ``"batchnorm"`` (running mean of the only BatchNorm that follows),
    ``"norm"`` (bias of the norm that feeds this layer alone, as ``M^-1 c``), ``"new_bias"`` (created, by
    permission) or ``"none"`` (the adapter is built without a shift). ``path`` is the layer that receives it.
    """

    target: str
    path: str = ""

    def __str__(self) -> str:
        return {
            "bias": "own bias",
            "batchnorm": f"BatchNorm {self.path}",
            "norm": f"norm {self.path}",
            "new_bias": "new bias",
            "none": "none",
        }[self.target]


@dataclass(frozen=True)
class Route:
    """What a side adapter needs of a forward besides its host's own call.

    Attributes:
        source: path of the module that reads the residual stream, "" where the adapter does not read it.
        prefix: class, register and other tokens before those of the grid, in features of shape (B, N, C).
        grid: path of the module whose output shows the grid of the tokens as two dimensions, "" if none does.
        grid_first: whether that output has its channels before the grid.
        span: for tokens that pass several hosts: ``"first"`` where they begin, ``"inside"``, ``"last"`` where they
            end; "" where one host sees them alone.
        positions: paths below the host of the modules that keep positions of its tokens.
        patch: pixels of the patch that a token stands for.
        turns: whether the host is called for other branches as well: the adapter acts when its stream has been read.
        readers: paths of the modules that get the host's own output, where the adapter's result stands in for it.
    """

    source: str = ""
    prefix: int = 0
    grid: str = ""
    grid_first: bool = True
    span: str = ""
    positions: tuple[str, ...] = ()
    patch: int = 0
    turns: bool = False
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Geometry:
    """A convolution over rows and columns in numbers, for adapters that have one of their own.

    Attributes:
        in_width, out_width: channels.
        kernel, stride, dilation: along rows and columns.
        padding: rows and columns put on each side; None for as many in all as keep size / stride, rounded up.
        mode: what is put there, as in ``nn.Conv2d``.
    """

    in_width: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | None = None
    dilation: tuple[int, int] = (1, 1)
    mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"


@dataclass(frozen=True)
class Site:
    """One place for one adapter.

    Attributes:
        path: module path of the host, the layer or module whose call the adapter changes.
        slot: ``"input"`` (a channel map before the layer), ``"output"`` (one after it) or ``"weight"`` (a map of
            its weight). Adapters that do not fold also take these, their result being added to the host's output:
            ``"output"`` (they read that output), ``"parallel"`` (the host's input), ``"stream"`` (the residual
            stream that enters the branch of which the host is the end), ``"normed"`` (the same after its norm),
            ``"sum"`` (the stream plus the host's output: what leaves the branch), ``"before"`` (as ``"stream"``,
            the result being added to what the branch reads as well), ``"again"`` (the host's input; the adapter may
            run the host on other features), ``"readout"`` (as ``"output"``, but unseen by what leads to further
            blocks), and ``"tokens"`` (tokens are put into the host's input and taken out of its output).
        kind: name of the layer kind, a key of ``refold.fold.KINDS``; "" where nothing folds.
        width: channels the adapter sees.
        out_width: channels the layer puts out.
        channel_dim: position of the channels in the activation, from the end.
        weight_shape: shape of the host's weight as maps see it, (out, in / groups, *kernel).
        shift: where a shift goes; None for slots without one.
        role: the paper's name of the place, "" if none.
        note: what is worth knowing about the placement.
        owner: path of the module during whose forward the layer's stored weight is replaced by the folded one:
            the layer itself, or an ancestor that reads its weight; None where the adapter acts on activations.
        shares: path of the site whose adapter this one uses too; None where it has its own.
        route: of a side adapter; None for one that folds.
        tag: tells this site from others of the same method on the same host; "" for the first.
        geometry: of the adapter's own convolution, where it is taken from the backbone.
        part: which of the methods of a composition it belongs to.
    """

    path: str
    slot: str
    kind: str
    width: int
    out_width: int
    channel_dim: int
    weight_shape: tuple[int, ...]
    shift: Shift | None = None
    role: str = ""
    note: str = ""
    owner: str | None = None
    shares: str | None = None
    route: Route | None = None
    tag: str = ""
    geometry: Geometry | None = None
    part: int = 0

    @property
    def has_shift(self) -> bool:
        """Whether there is a place for a constant part."""
        return self.shift is not None and self.shift.target != "none"

    @property
    def key(self) -> str:
        """What names the site: the host's path, and what tells it from others there."""
        return self.entry(self.path)

    def entry(self, name: str) -> str:
        """Name of the adapter called ``name`` among those of the host."""
        return _at(name, self.tag, self.part)

    def of_part(self, part: int) -> Site:
        """The same site as one of another part of a composition."""
        shares = None if self.shares is None else _at(self.shares.partition("@")[0], self.tag, part)
        return replace(self, part=part, shares=shares)


def _at(name: str, tag: str, part: int) -> str:
    return "@".join((name, *filter(None, (tag, str(part) if part else ""))))


@dataclass(frozen=True)
class Skipped:
    """A layer a method would have wanted and why it has no site."""

    path: str
    reason: str


@dataclass(frozen=True)
class Layer:
    """A layer the probe reached and that can be folded into; ``owner`` as in :class:`Site`."""

    path: str
    module: nn.Module
    kind: str
    operator: Operator
    owner: str | None = None
    role: str = ""
    note: str = ""


def own_sites(sites: Iterable[Site]) -> list[Site]:
    """The sites whose adapters are their own: one for each set of adapter parameters."""
    return [site for site in sites if site.shares is None]
