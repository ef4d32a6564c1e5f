"""What an adapter is: a small module that knows channels and weights, never layer types."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refold.maps import ChannelMap, to_dense, to_float64

__all__ = ["Adapter", "Call", "ChannelAdapter", "WeightAdapter", "autocast_input", "widened"]


class Adapter(nn.Module):
    """Base of all adapters. Identity at initialisation, or its paper's published start."""

    def refer(self, name: str, module: nn.Module) -> None:
        """Make another adapter's part reachable as an attribute, without being a part of this adapter."""
        self.__dict__[name] = module

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:  # type: ignore[override]
        # A plain checkpoint of the backbone must load strictly while adapters are attached: an adapter of which
        # the file says nothing keeps its values. One that is there in part is still reported as missing.
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ChannelAdapter(Adapter, ABC):
    """Before or after a layer: ``x -> M x + c`` along one dimension."""

    @abstractmethod
    def forward(self, x: Tensor, *, with_shift: bool = True) -> Tensor:
        """The mapped activation, same shape as ``x``; without c if ``with_shift`` is False."""

    @abstractmethod
    def shift(self) -> Tensor | None:
        """c as (d,), differentiable; None if the map has none."""

    @abstractmethod
    def channel_map(self, cast: Callable[[Tensor], Tensor] = to_float64) -> ChannelMap:
        """The map at evaluation, made of the adapter's tensors after ``cast``, by default detached and in float64."""


@dataclass(frozen=True)
class Call:
    """One call of a frozen layer, for the weight adapter beside it.

    Attributes:
        x: what the layer was given.
        run: the layer's own geometry with another weight and no bias, ``run(x, weight)``.
        output: what it returned.
        weight, bias: its own, as stored.
    """

    x: Tensor
    run: Callable[[Tensor, Tensor], Tensor]
    output: Tensor
    weight: Tensor
    bias: Tensor | None


class WeightAdapter(Adapter, ABC):
    """On a layer's weight: ``(W, b) -> (W', b')``, and a cheaper equal path over activations where there is one.

    Attributes:
        channel_dim: position of the channels in the layer's output, from the end.
    """

    channel_dim: int

    @abstractmethod
    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The adapted weight and bias in the dtype of ``weight``; differentiable, no dropout."""

    def branch(self, call: Call) -> Tensor:
        """What the adapter adds to the layer's output: here ``(W' - W) x + b' - b``.

        A map with structure overrides it with less work: this one costs as much as the layer itself.
        """
        wide, bias = widened(call.weight, self), call.bias
        moved, shift = self.reparameterize(wide, None if bias is None else bias.to(wide.dtype))
        x = autocast_input(call.x)
        added = call.run(x, (moved - wide).to(x.dtype))
        if shift is None or shift is bias:
            return added
        shift = shift if bias is None else shift - bias
        return added + shift.to(added.dtype).view(-1, *[1] * (-self.channel_dim - 1))


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype autocast would compute in.

    Cast once here, because the adapter's two products and the frozen layer behind it would each cast it again.
    """
    kind = x.device.type
    # Device "meta", where shapes alone are computed, has no autocast and refuses the question.
    if x.dtype == torch.float32 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def widened(weight: Tensor, adapter: Adapter) -> Tensor:
    """A frozen weight, dense and in at least the adapter's own precision: bfloat16 would round small changes away."""
    weight = to_dense(weight)
    return weight.to(torch.promote_types(weight.dtype, next(adapter.parameters()).dtype))
