"""One linear operator inside a layer, and the two exact folds of a channel map into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from refold.maps import ChannelMap

__all__ = ["LayerKind", "Operator", "fold_input", "fold_output", "input_shift"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Operator:
    """What folding needs to know of a layer.

    Attributes:
        weight, bias: names of the layer's parameters; the bias may be absent (None in the module).
        in_width, out_width: channels in and out.
        groups: independent channel groups; a per-channel norm has as many as channels.
        channel_dim: position of the channels in input and output, from the end (-1 for Linear, -3 for Conv2d).
        folds_input: False where the operator is not linear in its input (a norm).
        pads_zeros: the input is padded with zeros, so a shift before the layer is not a shift after it.
    """

    weight: str
    bias: str
    in_width: int
    out_width: int
    groups: int
    channel_dim: int
    folds_input: bool = True
    pads_zeros: bool = False


class LayerKind(Protocol):
    """All that refold knows about one kind of layer. One file each, listed in ``fold/__init__.py``."""

    name: str

    def refuses(self, layer: nn.Module) -> str | None:
        """Why this layer, of this kind by type, cannot be folded into; None if it can."""
        ...

    def operator(self, layer: nn.Module) -> Operator: ...

    def map_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[Tensor], Tensor]) -> Call:
        """The call with ``fn`` applied to every tensor that the operator multiplies."""
        ...

    @property
    def run(self) -> Callable[[nn.Module, Tensor, Tensor], Tensor] | None:
        """``run(layer, x, weight)``: the layer's geometry with another weight and no bias; None where the layer's
        own forward does not multiply the activations a hook can see."""
        ...


def map_first(args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[Tensor], Tensor]) -> Call:
    """:meth:`LayerKind.map_input` of layers with one input, positional or ``input=``."""
    if args:
        return (fn(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": fn(kwargs["input"])}


def input_shift(weight: Tensor, shift: Tensor, groups: int) -> Tensor:
    """What a constant ``shift`` (in,) at the input adds to the output away from borders: (out,)."""
    kernel_sum = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
    if groups == 1:
        return kernel_sum @ shift
    per_group = kernel_sum.unflatten(0, (groups, -1)) @ shift.view(groups, -1, 1)
    return per_group.reshape(-1)


def fold_input(op: Operator, weight: Tensor, map: ChannelMap) -> tuple[Tensor, Tensor | None]:
    """``W M`` and the output shift ``(sum over the kernel of W) c``, None where the map has no shift.

    A zero-padded convolution gets the same shift everywhere, borders included: there the unmerged path adds
    it after the layer, because zeros padded around ``M x + c`` would not have been shifted.
    """
    shift = None if map.shift is None else input_shift(weight, map.shift, op.groups)
    return map.before(weight, op.groups), shift


def fold_output(
    op: Operator, weight: Tensor, bias: Tensor | None, map: ChannelMap
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``M W``, ``M b`` (None without a bias) and the shift ``c``."""
    moved = None if bias is None else map.after(bias, op.groups)
    return map.after(weight, op.groups), moved, map.shift
