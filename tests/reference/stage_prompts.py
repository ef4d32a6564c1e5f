"""Prompts behind stages in float64 numpy, written from the formulas in the methods' headers: SPM's and LV-Adapter's.

Tokens are (B, prefix + H W, C); weights are laid out as torch's. Shares no code with refold.
"""

from __future__ import annotations

import numpy as np

from reference.conv_side import conv, gelu, linear

__all__ = ["language", "matcher"]

Array = np.ndarray


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def matcher(tokens: Array, t: dict[str, Array], grid: tuple[int, int], prefix: int, steps: int) -> Array:
    """U z_T + b; z_t = z + GELU(F(z + E softmax(C z + c)) + f). A prefix token is an image of one pixel."""
    z = linear(tokens, t["down.weight"], t["down.bias"])
    weight, bias = t["filters.weight"], t["filters.bias"]
    for _ in range(steps):
        shares = softmax(linear(z, t["classify.weight"], t["classify.bias"]))
        guided = z + np.einsum("hk,bnk->bnh", t["embed.weight"], shares)
        filtered = np.empty_like(guided)
        for index in range(prefix):
            filtered[:, index] = conv(guided[:, index, :, None, None], weight, bias)[..., 0, 0]
        maps = guided[:, prefix:].transpose(0, 2, 1).reshape(len(z), -1, *grid)
        filtered[:, prefix:] = conv(maps, weight, bias).reshape(*maps.shape[:2], -1).transpose(0, 2, 1)
        z = z + gelu(filtered)
    return linear(z, t["up.weight"], t["up.bias"])


def language(tokens: Array, t: dict[str, Array], words: Array) -> Array:
    """U (v + sum_k p_k V t_k) + b; p = softmax over k of v . K t_k / sqrt(h), v = GELU(D x + a)."""
    v = gelu(linear(tokens, t["down.weight"], t["down.bias"]))
    keys = np.einsum("hc,kc->kh", t["key.weight"], words)
    values = np.einsum("hc,kc->kh", t["value.weight"], words)
    p = softmax(np.einsum("bnh,kh->bnk", v, keys) / np.sqrt(v.shape[-1]))
    return linear(v + np.einsum("bnk,kh->bnh", p, values), t["up.weight"], t["up.bias"])
