"""What of a block speaks of the places of its tokens, and how it looks while more tokens are in its sequence.

Prompts have no place in the image. Attention that adds a bias by relative position adds none for them, attention that
rotates queries and keys leaves them alone like class tokens, masks let them through. Modules read such tables from
their attributes, so an attribute is covered for as long as the block's forward runs: an entry in ``__dict__`` wins over
a parameter or buffer in attribute look-up, as in :mod:`refold.hosting`, and what was there comes back behind it. Which
attributes are known is data here; that nothing else speaks of places is proved for every block, in
:mod:`refold.prompting`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from refold.errors import SiteError

__all__ = ["Covered", "Insertion", "cover", "keeps_positions", "spares_prefix", "spread", "uncover"]

#: Tokens at the front of a sequence that its attention does not rotate.
PREFIX = "num_prefix_tokens"
#: A number for each pair of tokens, flat or square: the row of the table that holds their bias.
INDEX = "relative_position_index"
#: Biases, one row a number, one column a head.
TABLE = "relative_position_bias_table"
#: Tokens at the front that get zero bias behind a table for the rest.
ZEROS = "prefix_tokens"

#: A module, the name of its attribute, and what its ``__dict__`` held under it.
Covered = tuple[nn.Module, str, Any]
_NOTHING = object()


@dataclass(frozen=True)
class Insertion:
    """Tokens put into a sequence.

    Attributes:
        length: tokens of the sequence without them.
        at: tokens in front of them.
        count: how many they are.
        order: where the tokens of the longer sequence come from if they are rearranged, as only proofs do.
    """

    length: int
    at: int
    count: int
    order: Tensor | None = None

    def origin(self, device: torch.device) -> Tensor:
        """For each token its number in the shorter sequence, ``length`` for those put in: (length + count,)."""
        numbers = torch.arange(self.length, device=device)
        new = numbers.new_full((self.count,), self.length)
        origin = torch.cat((numbers[: self.at], new, numbers[self.at :]))
        return origin if self.order is None else origin[self.order.to(device)]

    def pairs(self, values: Tensor, fill: float) -> Tensor:
        """Values for pairs of tokens (..., length, length), with ``fill`` where one of a pair was put in."""
        origin = self.origin(values.device)
        return F.pad(values, (0, 1, 0, 1), value=fill)[..., origin, :][..., origin]


def keeps_positions(module: nn.Module) -> bool:
    """Whether the module has an attribute that :func:`cover` knows."""
    return isinstance(getattr(module, PREFIX, None), int) or isinstance(getattr(module, INDEX, None), Tensor)


def spares_prefix(module: nn.Module) -> bool:
    """Whether the module has relative positions for the tokens behind the first ones only, which get zero bias."""
    known = isinstance(getattr(module, INDEX, None), Tensor) and isinstance(getattr(module, ZEROS, None), int)
    return known and getattr(module, TABLE, None) is None


def cover(modules: Iterable[nn.Module], insertion: Insertion) -> list[Covered]:
    """Let modules see the longer sequence; what :func:`uncover` needs to undo it.

    Raises:
        SiteError: relative positions that are not kept in one of the known forms. Nothing is covered then.
    """
    covered: list[Covered] = []
    try:
        for module in modules:
            for name, value in _seen(module, insertion).items():
                covered.append((module, name, module.__dict__.get(name, _NOTHING)))
                module.__dict__[name] = value
    except SiteError:
        uncover(covered)
        raise
    return covered


def uncover(covered: list[Covered]) -> None:
    """Undo :func:`cover`; empties the list."""
    while covered:
        module, name, before = covered.pop()
        if before is _NOTHING:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = before


def _seen(module: nn.Module, insertion: Insertion) -> dict[str, Any]:
    """What the module's attributes are while the longer sequence passes."""
    seen: dict[str, Any] = {}
    if isinstance(getattr(module, PREFIX, None), int):
        seen[PREFIX] = getattr(module, PREFIX) + insertion.count
    index, table = getattr(module, INDEX, None), getattr(module, TABLE, None)
    if not isinstance(index, Tensor):
        return seen
    size = math.isqrt(index.numel())
    square = index.reshape(size, size)
    if spares_prefix(module) and getattr(module, ZEROS) == insertion.at and size == insertion.length - insertion.at:
        seen[ZEROS] = insertion.at + insertion.count
        if insertion.order is not None:
            behind = insertion.order[seen[ZEROS] :].to(index.device) - seen[ZEROS]
            seen[INDEX] = square[behind][:, behind].reshape(index.shape)
        return seen
    if not isinstance(table, Tensor) or table.dim() != 2 or size != insertion.length:
        raise SiteError(f"its relative positions are not those of {insertion.length} tokens in a table of biases")
    longer = insertion.pairs(square, len(table))
    # One row more, of zeros, for pairs with a token that has no place.
    return (
        seen
        | {TABLE: F.pad(table, (0, 0, 0, 1)), INDEX: longer.reshape(-1) if index.dim() == 1 else longer}
        | (_lengths(module, size, insertion.count))
    )


def _lengths(module: nn.Module, size: int, count: int) -> dict[str, Any]:
    """The attribute from which a module reads how many tokens its table of relative positions is for."""
    shape, area = getattr(module, "bias_shape", None), getattr(module, "window_area", None)
    window = getattr(module, "window_size", None)
    if isinstance(shape, tuple) and shape[:2] == (size, size):  # timm's RelPosBias
        return {"bias_shape": (size + count, size + count, *shape[2:])}
    if area == size:  # timm's Swin
        return {"window_area": size + count}
    if isinstance(window, tuple) and len(window) == 2 and 0 <= size - window[0] * window[1] <= 1:  # timm's BEiT
        return {"window_size": (window[0] * window[1] + count, 1)}
    return {}


def spread(values: Any, insertion: Insertion) -> Any:
    """Arguments with zeros for the pairs of which one is a new token, in those that have a number for each pair.

    Raises:
        SiteError: an argument for pairs of tokens that is no bias to add.
    """

    def longer(value: Tensor) -> Tensor:
        if value.shape[-2:] != (insertion.length, insertion.length):
            return value
        if not value.is_floating_point():
            raise SiteError(
                f"an attention mask of {value.dtype}, in which it is not known whether True lets a token through",
                remedy="Pass a mask of numbers to add, 0 and -inf",
            )
        return insertion.pairs(value, 0.0)

    return tree_map_only(Tensor, longer, values)
