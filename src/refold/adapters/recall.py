"""Features that adapters read are not kept for the backward pass: the frozen backbone computes them once more.

Of a projection's codes ``c = D z`` the backward pass needs z for the gradient of D alone, ``sum over positions of
dc z^T``. All dc are known when the backward pass has come to where the first adapter read; then one more forward of the
model, without a graph, shows every z again for a moment. Kept in between is dc, of as many channels as D has rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import get_device_states, set_device_states

from refold.errors import SiteError

__all__ = ["Forward", "Reader", "Recall"]


class Forward:
    """One forward of a model with side adapters, which can be run again.

    Args:
        model, args, kwargs: the call.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._run: Callable[[], Any] = lambda: model(*args, **kwargs)
        self._inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
        self._versions = [t._version for t in self._inputs]
        self._model, self._state = model, _state(model)
        self._kind = self._inputs[0].device.type if self._inputs else "cpu"
        self._autocast = torch.is_autocast_enabled(self._kind), torch.get_autocast_dtype(self._kind)
        self._rng, self._devices = torch.get_rng_state(), get_device_states(*self._inputs)
        self._recall: Recall | None = None

    @property
    def recall(self) -> Recall:
        """What adapters that read in this forward have in common."""
        self._recall = self._recall or Recall(self)
        return self._recall

    def again(self, where: str) -> None:
        """Run the model as it ran, without a graph; the random state is left as it was.

        Raises:
            SiteError: its input, its frozen weights or its mode were changed since.
        """
        if [t._version for t in self._inputs] != self._versions:
            raise SiteError(
                "the model's input was changed in place before the backward pass, which runs the model again",
                where=where,
                remedy="Leave the images as they are until then, or use recompute='inside'",
            )
        if _state(self._model) != self._state:
            raise SiteError(
                "frozen weights, or modules' training mode, were changed between the forward and the backward pass, "
                "which runs the model again",
                where=where,
                remedy="Change them after the backward pass, or use recompute='inside'",
            )
        enabled, dtype = self._autocast
        devices, states = self._devices
        autocast = torch.autocast(self._kind, dtype=dtype, enabled=enabled)
        with torch.random.fork_rng(devices=devices), torch.no_grad(), autocast:
            torch.set_rng_state(self._rng)
            set_device_states(devices, states)
            self._run()


def _state(model: nn.Module) -> tuple[list[tuple[int, int]], list[bool]]:
    """What a second forward depends on beside its input: frozen weights by place and version, and modes."""
    frozen = [(p.data_ptr(), p._version) for p in model.parameters() if not p.requires_grad]
    return frozen, [module.training for module in model.modules()]


class Reader(Protocol):
    """An adapter that projects features: ``recalled`` is the gradient of its codes while the model runs again."""

    recalled: Tensor | None

    @property
    def projection(self) -> Tensor:
        """D, (rank, width)."""
        ...


class Recall:
    """The readers of one forward, and the gradients of their codes."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.readers: list[Reader] = []
        self.token: Tensor | None = None  # makes the backward pass come to the first reader last
        self.where = ""
        self._gradients: dict[int, Tensor] = {}

    def codes(self, reader: Reader, rows: Tensor, where: str) -> Tensor:
        """D z for features z, (B, N, width)."""
        index = next(k for k, other in enumerate(self.readers) if other is reader)
        first = self.token is None
        if first:
            self.where = where
        weights = [other.projection for other in self.readers] if first else []
        codes, self.token = _Codes.apply(self, index, rows, reader.projection.detach(), self.token, *weights)
        return codes

    def note(self, index: int, gradient: Tensor) -> None:
        self._gradients[index] = gradient

    def gradients(self) -> list[Tensor | None]:
        """Of each reader's D; None of one that has not read."""
        for index, gradient in self._gradients.items():
            self.readers[index].recalled = gradient
        try:
            self._forward.again(self.where)
            found = [reader.recalled for reader in self.readers]
            if any(found[index] is gradient for index, gradient in self._gradients.items()):
                raise SiteError(
                    "not every adapter of the forward was called again in the backward pass",
                    where=self.where,
                    remedy="Activate, detach or merge adapters after the backward pass, or use recompute='inside'",
                )
        finally:
            for reader in self.readers:
                reader.recalled = None
            self._gradients.clear()
        return found


class _Codes(torch.autograd.Function):
    """``D z``; of the first reader the inputs are the D of all, so that it gives their gradients."""

    @staticmethod
    def forward(
        ctx: Any, recall: Recall, index: int, rows: Tensor, weight: Tensor, token: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.recall, ctx.index, ctx.first = recall, index, token is None
        return F.linear(rows, weight), rows.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides that it is static)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient, token = grad_outputs
        ctx.recall.note(ctx.index, gradient)
        if not ctx.first:
            return None, None, None, None, token
        found = zip(ctx.recall.gradients(), ctx.needs_input_grad[5:], strict=True)
        return None, None, None, None, None, *(gradient if needed else None for gradient, needed in found)
