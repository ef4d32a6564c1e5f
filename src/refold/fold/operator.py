"""One linear operator inside a layer, and the exact folds of channel and weight maps into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from refold.maps import ChannelMap, WeightMap

__all__ = ["LayerKind", "Operator", "fold_input", "fold_output", "fold_weight", "input_shift", "map_first"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Operator:
    """What folding needs to know of a layer.

    Attributes:
        weight, bias: names of the layer's parameters; the bias may be absent (None in the module).
        in_width, out_width: channels in and out.
        groups: independent channel groups; a per-channel norm has as many as channels.
        channel_dim: position of the channels in input and output, from the end (-1 for Linear, -3 for Conv2d).
        kernel: kernel size, () where there is none.
        folds_input: False where the operator is not linear in its input (a norm).
        pads_zeros: zeros come between or around the inputs, so a shift before the layer is not a shift after it.
        transposed: the weight is stored as (in, out / groups, *kernel).
    """

    weight: str
    bias: str
    in_width: int
    out_width: int
    groups: int
    channel_dim: int
    kernel: tuple[int, ...] = ()
    folds_input: bool = True
    pads_zeros: bool = False
    transposed: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight as maps see it: (out, in / groups, *kernel), or (out,) for a norm."""
        if not self.folds_input:
            return (self.out_width,)
        return (self.out_width, self.in_width // self.groups, *self.kernel)

    def canonical(self, weight: Tensor) -> Tensor:
        """The stored weight as (out, in / groups, *kernel), the one layout in which maps compute."""
        if not self.transposed:
            return weight
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def stored(self, weight: Tensor) -> Tensor:
        """A canonical weight in the layer's own layout."""
        return self.canonical(weight)  # exchanging two axes within each group is its own inverse


class LayerKind(Protocol):
    """All that refold knows about one kind of layer. One file each, listed in ``fold/__init__.py``."""

    name: str
    #: Whether what the layer returns is what its weight and bias compute, with nothing behind them.
    returns_product: bool

    def refuses(self, layer: nn.Module) -> str | None:
        """Why this layer, of this kind by type, cannot be folded into; None if it can."""
        ...

    def is_plain(self, layer: nn.Module) -> bool:
        """Whether ``layer`` runs this kind's own forward: the weight acts as stored, on what hooks see."""
        ...

    def operator(self, layer: nn.Module) -> Operator: ...

    def map_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[Tensor], Tensor]) -> Call:
        """The call with ``fn`` applied to every tensor that the operator multiplies."""
        ...

    @property
    def run(self) -> Callable[[nn.Module, Tensor, Tensor], Tensor] | None:
        """``run(layer, x, weight)``: the layer's geometry with another weight and no bias; None where the input
        alone does not say what the layer's forward computes."""
        ...


def map_first(args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[Tensor], Tensor]) -> Call:
    """:meth:`LayerKind.map_input` of layers with one input, positional or ``input=``."""
    if args:
        return (fn(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": fn(kwargs["input"])}


def input_shift(op: Operator, weight: Tensor, shift: Tensor) -> Tensor:
    """What a constant ``shift`` (in,) at the input adds to the output away from borders: (out,).

    Between the strides of a transposed convolution an output sees a part of the kernel only. There the unmerged
    path adds this same constant after the layer, so it folds exactly whatever its value.
    """
    canonical = op.canonical(weight)
    kernel_sum = canonical.flatten(2).sum(-1) if op.kernel else canonical
    if op.groups == 1:
        return kernel_sum @ shift
    per_group = kernel_sum.unflatten(0, (op.groups, -1)) @ shift.view(op.groups, -1, 1)
    return per_group.reshape(-1)


def fold_input(op: Operator, weight: Tensor, map: ChannelMap) -> tuple[Tensor, Tensor | None]:
    """``W M`` and the output shift ``(sum over the kernel of W) c``, None where the map has no shift.

    A zero-padded convolution gets the same shift everywhere, borders included: there the unmerged path adds
    it after the layer, because zeros padded around ``M x + c`` would not have been shifted.
    """
    shift = None if map.shift is None else input_shift(op, weight, map.shift)
    return op.stored(map.before(op.canonical(weight), op.groups)), shift


def fold_output(
    op: Operator, weight: Tensor, bias: Tensor | None, map: ChannelMap
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``M W``, ``M b`` (None without a bias) and the shift ``c``."""
    moved = None if bias is None else map.after(bias, op.groups)
    return op.stored(map.after(op.canonical(weight), op.groups)), moved, map.shift


def fold_weight(op: Operator, weight: Tensor, bias: Tensor | None, map: WeightMap) -> tuple[Tensor, Tensor | None]:
    """The layer's weight and bias under a weight map, which sees the canonical layout."""
    mapped, moved = map(op.canonical(weight), bias)
    return op.stored(mapped), moved
