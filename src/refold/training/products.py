"""Attention as two matrix products and a softmax in the inputs' own low precision, forward and backward.

What ``scaled_dot_product_attention`` computes when nothing is masked, without what PyTorch's own "math" kernel adds:
three passes over the scores in search of rows that are masked throughout, and scaled copies of queries and keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["MatrixProducts"]

_LOW = (torch.bfloat16, torch.float16)


class MatrixProducts(TorchFunctionMode):
    """Unmasked attention in low precision runs as plain products inside the block, any other call as without it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **other: Any,
) -> Tensor:
    kind = query.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if attn_mask is not None or dropout_p or is_causal or any(other.values()) or low not in _LOW or not same:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **other
        )
    leading = query.shape[:-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    flat = (t.to(low).reshape(-1, *t.shape[-2:]) for t in (query, key, value))
    with torch.autocast(kind, enabled=False):
        output: Tensor = _Products.apply(*flat, scale)
    return output.view(*leading, *output.shape[-2:])


class _Products(torch.autograd.Function):
    """softmax(scale Q K^T) V for (n, queries, d), (n, keys, d) and (n, keys, v)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        weights = _scaled(query, key.transpose(1, 2), scale).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return weights @ value

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator hides that it is static)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = grad_outputs
        query, key, value, weights = ctx.saved_tensors
        needs_query, needs_key, needs_value, _ = ctx.needs_input_grad
        to_query = to_key = to_value = None
        if needs_value:
            to_value = weights.transpose(1, 2) @ gradient
        if needs_query or needs_key:
            to_weights = gradient @ value.transpose(1, 2)
            to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
            if needs_query:
                to_query = _scaled(to_scores, key, ctx.scale)
            if needs_key:
                to_key = _scaled(to_scores.transpose(1, 2), query, ctx.scale)
        return to_query, to_key, to_value, None


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left @ right`` in one pass, scaled before it is rounded."""
    ignored = left.new_empty(()).expand(left.shape[0], left.shape[1], right.shape[2])
    return torch.baddbmm(ignored, left, right, beta=0, alpha=scale)
