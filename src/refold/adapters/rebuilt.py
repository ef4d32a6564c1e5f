"""What a highway's backward pass needs, made again from less: from the codes of ``rank`` channels, or from a result.

The state is a function of the codes that adapters made of features, so where a module of the backbone turns it, codes
that are kept anyway stand in for it. A norm's output, which the neck keeps, stands in for its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["History", "normed", "turned"]

Turn = Callable[[Tensor], Tensor]
#: How many times larger than its weight a norm's bias may be, so that the output still tells the input to a few bits.
_STEEPEST = 16.0


@dataclass(frozen=True)
class History:
    """How a state came about.

    Attributes:
        steps: in order: (what gives a term from codes, None) or (None, what turns the state).
        codes: of each step that has a term.
        weights: of the terms, which autograd watches until the state has been made again.
    """

    steps: tuple[tuple[Turn | None, Turn | None], ...] = ()
    codes: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()

    def plus(self, term: Turn, codes: Tensor, weights: Iterable[Tensor] = ()) -> History:
        """With ``term(codes)`` added to the state."""
        watched = (*self.weights, *(weight.detach() for weight in weights))
        return History((*self.steps, (term, None)), (*self.codes, codes.detach()), watched)

    def through(self, turn: Turn) -> History:
        """With the state turned."""
        return History((*self.steps, (None, turn)), self.codes, self.weights)


def turned(turn: Turn, state: Tensor, history: History) -> Tensor:
    """``turn(state)``, (B, N, C), of a function without trainable parameters: the state is not kept."""
    return _Turned.apply(turn, history.steps, state, *history.codes, *history.weights)  # pyright: ignore[reportReturnType]


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x (B, N, C), kept of which is the result, where it tells x."""
    tells = (bias.abs() <= _STEEPEST * weight.abs()) & (weight != 0)
    if x.dtype not in (torch.float32, torch.float64) or not bool(tells.all()):
        return torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)
    return _Normed.apply(x, weight, bias, eps)  # pyright: ignore[reportReturnType]


def _rebuilt(steps: Sequence[tuple[Turn | None, Turn | None]], codes: Iterable[Tensor]) -> Tensor:
    state, given = None, iter(codes)
    for term, turn in steps:
        if turn is not None:
            assert state is not None
            state = turn(state)
        if term is not None:
            added = term(next(given))
            state = added if state is None else state + added
    assert state is not None
    return state


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        turn: Turn,
        steps: tuple[tuple[Turn | None, Turn | None], ...],
        state: Tensor,
        *kept: Tensor,
    ) -> Tensor:
        ctx.turn, ctx.steps, kind = turn, steps, state.device.type
        ctx.autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.save_for_backward(*kept)
        return turn(state)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides that it is static)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,), kept = grad_outputs, ctx.saved_tensors
        enabled, dtype = ctx.autocast
        with torch.autocast(gradient.device.type, dtype=dtype, enabled=enabled):
            state = _rebuilt(ctx.steps, kept).requires_grad_()
            with torch.enable_grad():
                result = ctx.turn(state)
        (found,) = torch.autograd.grad(result, state, gradient)
        return None, None, found, *(None for _ in kept)


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        result, _, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(result, scale, weight, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides that it is static)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,), (result, scale, weight, bias) = grad_outputs, ctx.saved_tensors
        unit = (result - bias) / weight  # of mean 0 and, but for eps, variance 1
        inner = gradient * weight
        of_x = scale * (inner - inner.mean(-1, keepdim=True) - unit * (inner * unit).mean(-1, keepdim=True))
        others = tuple(range(gradient.dim() - 1))
        return of_x, (gradient * unit).sum(others), gradient.sum(others), None
