"""WiSE-FT: "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), a model between two of the same architecture.

    theta = (1 - alpha) theta_start + alpha theta_end      over all weights, the head's among them

The start is the zero-shot model, the end the same one adapted and merged. It costs nothing when the model runs: the
result is one model of the plain architecture. Merged weights are averaged, not adapters, of whose factors the weights
are no linear function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from refold.attachment import is_attached
from refold.errors import MergeError
from refold.maps import is_quantized, to_float64
from refold.state import require_whole

__all__ = ["interpolate"]


def interpolate(
    start: nn.Module | Mapping[str, Tensor], end: nn.Module | Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """The state dict ``(1 - alpha) start + alpha end``; 0 and 1 give the two ends bit for bit.

    Computed in float64 and rounded once; neither end is changed, and nothing of the result is shared with them. A
    BatchNorm's running statistics are averaged as its weights are; its counter of batches is the end's, or for
    ``alpha=0`` the start's.

    Args:
        start: the zero-shot model or its state dict: ``{k: v.clone() for k, v in model.state_dict().items()}`` before
            :func:`refold.attach`, say.
        end: the adapted model, merged, or its state dict.
        alpha: from 0 to 1.

    Returns:
        for ``load_state_dict`` of either model, on the end's devices and in its dtypes.

    Raises:
        MergeError: ``alpha`` out of range, adapters that are not merged, other keys, shapes or dtypes, quantized
            weights, or whole numbers that differ.
    """
    if not 0 <= alpha <= 1:
        raise MergeError(f"must be between 0 and 1 (got {alpha})", where="alpha")
    first, last = _tensors(start, "start"), _tensors(end, "end")
    if odd := sorted(first.keys() ^ last.keys()):
        there = "start" if odd[0] in first else "end"
        raise MergeError(
            f"is in the {there} alone ({len(odd)} such tensors)",
            where=odd[0],
            remedy="Take two models of one architecture, the adapted one merged",
        )
    return {name: _between(name, first[name], last[name], alpha) for name in last}


def _tensors(side: nn.Module | Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    if isinstance(side, nn.Module):
        require_whole(side, "interpolate")
        if any(is_attached(module) for module in side.modules()):
            raise MergeError(
                "adapters are attached and not merged: weights alone would leave them out",
                where=name,
                remedy="Call refold.merge first; a method that does not merge has no weights to average",
            )
        side = side.state_dict()
    if adapters := next((key for key in side if "refold" in key.split(".")), None):
        raise MergeError("belongs to an adapter", where=adapters, remedy="Merge before taking the state dict")
    return dict(side)


def _between(name: str, start: Tensor, end: Tensor, alpha: float) -> Tensor:
    for tensor in (start, end):
        if is_quantized(tensor) or (tensor.is_floating_point() and tensor.dtype.itemsize < 2):
            raise MergeError(
                "is quantized, and an average would be rounded to the few values it can take",
                where=name,
                remedy="Interpolate floating models, then quantize",
            )
    for what in ("shape", "dtype"):
        if (here := getattr(start, what)) != (there := getattr(end, what)):
            raise MergeError(f"its {what} is {here} in the start and {there} in the end", where=name)
    start, end = start.detach().to(end.device), end.detach()
    if alpha in (0, 1) or torch.equal(start, end):
        return (start if alpha == 0 else end).clone()
    if not end.is_floating_point():
        if end.numel() == 1:  # a counter
            return end.clone()
        raise MergeError(f"holds values of {end.dtype} that differ, and have nothing between them", where=name)
    return ((1 - alpha) * to_float64(start) + alpha * to_float64(end)).to(end.device, end.dtype)
