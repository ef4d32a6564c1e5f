"""What lies between the results of adapters beside a backbone and its maps: found once, proved, and run without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refold.errors import SiteError
from refold.training.inference import in_evaluation
from refold.wires import Wire

__all__ = ["Call", "Tail", "calls_behind", "find_tail"]

_ROUNDINGS = 8  # times the machine's precision: a tail does the same operations

Results = Sequence[tuple[Wire, Tensor]]  # what stands in for the results that are read out, and who gives it
Tail = Callable[[Results], Tensor]
_Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Laid:
    """A result in another layout, with or without a norm in front.

    Attributes:
        source: which result.
        channel_dim: of it.
        norm: a frozen LayerNorm of the body in between.
        size: rows and columns of the map.
    """

    source: int
    channel_dim: int
    norm: nn.LayerNorm | None
    size: tuple[int, int]

    def __call__(self, results: Results) -> Tensor:
        _, x = results[self.source]
        if self.norm is None and self.channel_dim == -3:
            return x
        x = x.movedim(self.channel_dim, -1)
        if self.norm is not None:
            x = F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        if x.dim() == 3:  # tokens, the prefix in front
            x = x[:, x.shape[1] - prod(self.size) :].unflatten(1, self.size)
        return x.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class _Row:
    """The last result, through modules of the body one after the other.

    Attributes:
        steps: each module, and the way from what is there to what it is given.
        last: the way from there to the map.
    """

    steps: tuple[tuple[_Way, nn.Module], ...]
    last: _Way

    def __call__(self, results: Results) -> Tensor:
        _, x = results[-1]
        for way, module in self.steps:
            with in_evaluation(module):
                x = module(way(x))
        return self.last(x)


class Call(NamedTuple):
    """A module's call with one tensor, which gave one."""

    module: nn.Module
    given: Tensor
    output: Tensor


@contextmanager
def calls_behind(body: nn.Module, path: str, apart: Iterable[str]) -> Iterator[list[Call]]:
    """Inside, the list fills with what a forward of ``body`` calls once the module ``path`` has returned.

    Only the outermost modules are in it: of what is around the modules ``apart`` its parts, and of these nothing.
    """
    calls: list[Call] = []
    left_out = {id(body.get_submodule(path)) for path in apart}
    opened = {id(body.get_submodule(".".join(p.split(".")[:k]))) for p in apart for k in range(p.count(".") + 1)}
    host, begun = body.get_submodule(path), False
    running: tuple[nn.Module, Tensor | None] | None = None

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal running
        if begun and running is None and id(module) not in opened:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and id(module) not in left_out
            running = module, args[0].clone() if alone else None  # it may go on in place

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal begun, running
        if module is host:
            begun = True
        elif running is not None and module is running[0]:
            if running[1] is not None and isinstance(output, Tensor):
                calls.append(Call(module, running[1], output))
            running = None

    handles = []
    for module in body.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def find_tail(
    number: int, wanted: Tensor, results: Results, norms: Iterable[nn.LayerNorm], calls: Sequence[Call]
) -> Tail:
    """How map ``number`` is made of the results.

    Args:
        wanted: the map.
        results: of the forward that gave it.
        norms: of the body.
        calls: of that forward, behind the last result.

    Raises:
        SiteError: in another way than refold knows.
    """
    tail = (_laid(wanted, results, norms) if wanted.dim() == 4 else None) or _row(wanted, results, calls)
    if tail is not None:
        return tail
    raise SiteError(
        f"map {number} is not what the adapters give here, in another layout or behind a norm",
        where=results[min(number, len(results) - 1)][0].site.path if results else f"map {number}",
        remedy="Train without cached features",
    )


def _laid(wanted: Tensor, results: Results, norms: Iterable[nn.LayerNorm]) -> Tail | None:
    size = (wanted.shape[-2], wanted.shape[-1])
    for norm in (None, *norms):
        for source, (wire, result) in enumerate(results):
            dim = wire.site.channel_dim
            if result.shape[dim] != wanted.shape[1] or result[0].numel() < wanted[0].numel():
                continue
            if norm is not None and norm.normalized_shape != (wanted.shape[1],):
                continue
            tail = _Laid(source, dim, norm, size)
            if _error(tail(results), wanted) <= 1:
                return tail
    return None


def _row(wanted: Tensor, results: Results, calls: Sequence[Call]) -> Tail | None:
    if not results:
        return None
    wire, x = results[-1]
    prefix = wire.site.route.prefix if wire.site.route else 0
    steps: list[tuple[_Way, nn.Module]] = []
    for call in calls:
        if call.given.shape == call.output.shape and torch.equal(call.given, call.output):
            continue  # it changes nothing
        way = _way(x, call.given, prefix)
        if way is not None:
            steps.append((way, call.module))
            x = call.output
    last = _way(x, wanted, prefix)
    if last is None:
        return None
    row = _Row(tuple(steps), last)
    return row if _error(row(results), wanted) <= 1 else None


def _way(x: Tensor, wanted: Tensor, prefix: int) -> _Way | None:
    """What a backbone does between two modules to turn ``x`` into what is wanted: other layouts, and pooling."""
    ways: list[_Way] = [lambda x: x]
    if x.dim() == 3:  # (B, N, C)
        ways += [lambda x: x[:, 0], lambda x: x.mean(1), lambda x: x[:, prefix:].mean(1)]
    elif x.dim() == 4:
        ways += [lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2)]
        ways += [lambda x: x.mean((1, 2)), lambda x: x.mean((2, 3))]
    best = min(ways, key=lambda way: _error(way(x), wanted))
    return best if _error(best(x), wanted) <= 1 else None


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative to what rounding may make of it."""
    if found.shape != wanted.shape:
        return float("inf")
    distance, norm = float((found - wanted).norm()), float(wanted.norm())
    return distance / (_ROUNDINGS * torch.finfo(wanted.dtype).eps * norm) if norm else distance
