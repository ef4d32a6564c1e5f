"""A state that runs beside the backbone: adapters fill it from branch to branch, and stages are read out of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from refold.adapters.ladder import Carrier
from refold.adapters.rebuilt import History, normed, turned
from refold.adapters.recall import Forward, Recall
from refold.adapters.side import Layout

__all__ = ["Highway", "Joint", "Junction", "Ramp", "ReadOut"]


class _State(NamedTuple):
    """What is handed on.

    Attributes:
        rows: h, (B, N, C); None while the model runs again for what adapters read.
        history: how h can be made again; None where it is kept.
    """

    rows: Tensor | None
    history: History | None = None


class Highway(Carrier):
    """One step of the highway. Its state h is (B, N, C), whatever layout features have; None before the first step.

    Nothing of it is remembered for a gradient checkpoint's second run, which is refused: in a backbone without a graph
    it would save nothing, and what is remembered would cost what a highway is there to save.
    """

    beside = True

    def _take(self, given: Tensor) -> Any:
        assert self.before is not None
        state, self.before._state = self.before._state, None
        return state


def _rows(x: Tensor, layout: Layout) -> Tensor:
    """Features in any layout as (B, N, C)."""
    return layout.last(x).flatten(1, -2)


def _unrows(rows: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """(B, N, C) as features again; ``shape`` is theirs, channels last."""
    return layout.unlast(rows.reshape(shape))


class Ramp(Highway):
    """``h = x``: the state begins as the features that enter the first block."""

    def forward(self, x: Tensor, layout: Layout) -> None:
        rows = _rows(x, layout)
        self.keep(_State(rows, None if rows.requires_grad else History().plus(_same, rows)))


def _same(rows: Tensor) -> Tensor:
    return rows


class Junction(Highway):
    """``h <- h + U1 U2 GELU(D1 D2 z + p) + q``; adds nothing to the backbone.

    D2 (rank, width), D1 (hidden, rank), U2 (rank, hidden), U1 (width, rank), as torch starts linear layers.

    Args:
        width: channels of z and h.
        hidden: channels of the bottleneck.
        rank: of its two projections.
        empty: start with U1 and q zero, which adds nothing.
        recompute: what the backward pass computes again. ``"inside"``: all behind D2 z, of ``rank`` channels, so that
            nothing wide is kept but the features z, which D2's gradient needs. ``"taps"``: these as well, by running
            the model again, where nothing in it trains. ``"nothing"``.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        rank: int,
        *,
        empty: bool,
        recompute: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.recalled: Tensor | None = None
        self._recall: Recall | None = None
        self.down = nn.Sequential(
            nn.Linear(width, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, hidden, device=device, dtype=dtype),
        )
        self.up = nn.Sequential(
            nn.Linear(hidden, rank, bias=False, device=device, dtype=dtype),
            nn.Linear(rank, width, device=device, dtype=dtype),
        )
        if empty:
            for parameter in self.up[1].parameters():
                nn.init.zeros_(parameter)

    @property
    def reruns(self) -> bool:  # type: ignore[override]
        return self.recompute == "taps"

    @property
    def projection(self) -> Tensor:
        return self.down.get_parameter("0.weight")

    def begin(self, forward: Forward | None) -> None:
        super().begin(forward)
        self._recall = None
        if forward is not None and self.reruns:
            self._recall = forward.recall
            self._recall.readers.append(self)

    def release(self) -> None:
        super().release()
        if self._recall is not None:
            self._recall.token = None  # whose graph would hold the notes that hold it
        self._recall = None

    def _widen(self, codes: Tensor) -> Tensor:
        # The sum of all that the adapters add, 48 terms on Swin-B, is not for bfloat16.
        return self.up(F.gelu(self.down[1](codes))).to(self.projection.dtype)

    def _wide(self) -> list[Tensor]:
        """The parameters of :meth:`_widen`."""
        return [*self.down[1].parameters(), *self.up.parameters()]

    def forward(self, x: Tensor, layout: Layout) -> None:
        rows, left = _rows(x, layout), self.taken()
        if self.recalled is not None:  # the model runs again in the backward pass
            gradient = self.recalled.flatten(0, 1)
            self.recalled = (gradient.T @ rows.flatten(0, 1).to(gradient.dtype)).to(self.projection.dtype)
            self.keep(_State(None))
            return
        history = History() if left is None else left.history
        if self._recall is not None and not rows.requires_grad:
            codes = self._recall.codes(self, rows, layout.where)
            history = None if history is None else history.plus(self._widen, codes, self._wide())
        else:
            codes, history = self.down[0](rows), None
        if self.recompute != "nothing" and codes.requires_grad:
            added = checkpoint(self._widen, codes, use_reentrant=False, preserve_rng_state=False)
        else:
            added = self._widen(codes)
        self.keep(_State(added if left is None else left.rows + added, history))


class Joint(Highway):
    """``h <- D(h)`` with a module D of the backbone that the features pass between two stages.

    Args:
        recompute: compute D(h) again in the backward pass: kept is h.
    """

    reads = False

    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute

    def forward(self, x: Tensor, layout: Layout) -> None:
        left, rerun = self.taken(), layout.rerun
        assert rerun is not None
        if left is None or left.rows is None:
            self.keep(left)
            return
        shape, dtype = layout.last(x).shape, x.dtype  # x itself would be kept by what runs again

        def passed(state: Tensor) -> Tensor:
            return _rows(rerun(_unrows(state, shape, layout).to(dtype)), layout).to(state.dtype)

        state, history = left
        if history is not None and state.requires_grad:
            rows = turned(passed, state, history)
        elif self.recompute and state.requires_grad:
            rows = checkpoint(passed, state, use_reentrant=False, preserve_rng_state=False)
        else:
            rows = passed(state)
        self.keep(_State(rows, None if history is None else history.through(passed)))


class ReadOut(Highway):
    """``LN(h + y)`` in place of a block's output y where the model reads it out, or ``LN(h)``.

    Args:
        width: channels.
        skip: whether y is added.
    """

    def __init__(
        self, width: int, *, skip: bool, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.skip = self.reads = skip
        self.norm = nn.LayerNorm(width, device=device, dtype=dtype)

    def forward(self, x: Tensor, layout: Layout) -> Tensor | None:
        left = self.taken()
        self.keep(left)
        if left.rows is None:  # the model runs again for the taps
            return None
        features = left.rows + _rows(x, layout) if self.skip else left.rows
        if left.history is not None and features.requires_grad:
            result = normed(features, self.norm.weight, self.norm.bias, self.norm.eps)
        else:
            result = self.norm(features)
        return _unrows(result, layout.last(x).shape, layout)

    def compose(self, output: Tensor, added: Tensor) -> Tensor:
        return added.to(output.dtype)
