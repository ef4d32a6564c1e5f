"""DenseCLIP's score maps in float64 numpy, from the paper's formulas and torch's names of tensors; shares no code.

A pre-norm transformer decoder layer is  x += self(n1 x);  x += cross(n2 x, memory);  x += W2 GELU(W1 n3 x).
"""

from __future__ import annotations

import numpy as np

from reference.conv_side import gelu, linear
from reference.side import layer_norm, softmax

__all__ = ["scores"]

Array = np.ndarray
Tensors = dict[str, Array]
_EPS = 1e-5


def normed(x: Array, t: Tensors, name: str) -> Array:
    return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], _EPS)


def attention(x: Array, memory: Array, t: Tensors, name: str, heads: int) -> Array:
    width = x.shape[-1]
    weights = np.split(t[f"{name}.in_proj_weight"], 3)
    biases = np.split(t[f"{name}.in_proj_bias"], 3)
    q, k, v = (linear(z, w, b) for z, w, b in zip((x, memory, memory), weights, biases, strict=True))
    parts = []
    for head in range(heads):
        own = slice(head * width // heads, (head + 1) * width // heads)
        shares = softmax(q[..., own] @ k[..., own].transpose(0, 2, 1) / np.sqrt(width // heads))
        parts.append(shares @ v[..., own])
    return linear(np.concatenate(parts, -1), t[f"{name}.out_proj.weight"], t[f"{name}.out_proj.bias"])


def scores(maps: Array, t: Tensors, heads: int = 4) -> Array:
    """Cosines (B, K, h, w) of pixels z = P x and words t + gamma A(t; [mean z, z]); without A if there is none."""
    batch, _, rows, columns = maps.shape
    z = linear(
        maps.reshape(batch, maps.shape[1], -1).transpose(0, 2, 1), t["project.weight"][..., 0, 0], t["project.bias"]
    )
    words = np.repeat(t["text"][None], batch, 0)
    if "gamma" in t:
        seen = np.concatenate((z.mean(1, keepdims=True), z), 1)
        seen = normed(linear(normed(seen, t, "see.0"), t["see.1.weight"], t["see.1.bias"]), t, "see.2")
        x = linear(normed(words, t, "read.0"), t["read.1.weight"], t["read.1.bias"])
        for k in range(1 + max(int(n.split(".")[2]) for n in t if n.startswith("context.layers."))):
            name = f"context.layers.{k}"
            n = normed(x, t, f"{name}.norm1")
            x = x + attention(n, n, t, f"{name}.self_attn", heads)
            x = x + attention(normed(x, t, f"{name}.norm2"), seen, t, f"{name}.multihead_attn", heads)
            hidden = gelu(linear(normed(x, t, f"{name}.norm3"), t[f"{name}.linear1.weight"], t[f"{name}.linear1.bias"]))
            x = x + linear(hidden, t[f"{name}.linear2.weight"], t[f"{name}.linear2.bias"])
        words = words + t["gamma"] * linear(normed(x, t, "speak.0"), t["speak.1.weight"], t["speak.1.bias"])
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    words = words / np.linalg.norm(words, axis=-1, keepdims=True)
    return np.einsum("bkc,bnc->bkn", words, z).reshape(batch, -1, rows, columns)
