"""Bottlenecks beside and behind a ViT's branches, in float64 numpy from the papers' formulas, the whole ViT by hand.

Shares no code with refold or timm: of a model only its tensors are read, by their names.

    x <- x + layer_scale * behind(z) + beside(x, n),   n = norm(x),   z = attention(before(n)), then MLP(before(n))
    x <- x + after(x)                                   behind each of the two sums
    y <- y + along(m)                                   y = W m + b, the first projection of attention and MLP

Adapter (arXiv 1902.00751, 2005.00052, 2206.04673): behind(z) = z + U act(D z + a) + b.
Adapter+ (arXiv 2406.06820): after(x) = gamma (U GELU(D x + a) + b) behind the MLP's sum.
AdaptFormer (arXiv 2205.13535): beside(x, n) = s (U ReLU(D x + a) + b) at the MLP.
Scaled parallel adapter (arXiv 2110.04366): beside(x, n) = s (U ReLU(D n + a) + b) at the MLP.
LoRand (CVPR 2023): behind(z) = z + U GELU(D z + a) + b, D and U sums of Q K P.
RepAdapter with an activation (arXiv 2302.08106): before(n) = n + s (B act(A n + a) + b); or behind(z), or along(n).
Mona (arXiv 2408.08345): after(x) = U GELU(m + Mix m) + b, m = u + (F3 u + F5 u + F7 u) / 3, u = D (g LN(x) + f x) + a.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

__all__ = ["ACTIVATIONS", "bottleneck", "identity", "layer_norm", "linear", "mona", "product_bottleneck", "vit"]

Array = np.ndarray
Tensors = Mapping[str, Array]
_erf = np.vectorize(math.erf)


def identity(x: Array) -> Array:
    return x


#: By the names that methods use.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "identity": identity,
}


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """Along the last axis, for a weight (out, in)."""
    return x @ weight.T + (0 if bias is None else bias)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) + bias


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


# -- the adapters -----------------------------------------------------------------------------------------------


def bottleneck(x: Array, t: Tensors, activation: str, scale: float | Array = 1.0) -> Array:
    """``scale (U act(D x + a) + b)``."""
    hidden = ACTIVATIONS[activation](linear(x, t["down.weight"], t["down.bias"]))
    return scale * linear(hidden, t["up.weight"], t["up.bias"])


def product_bottleneck(x: Array, t: Tensors) -> Array:
    """LoRand's, with D and U written out."""

    def whole(name: str) -> Array:
        products = zip(t[f"{name}.outer"], t[f"{name}.core"], t[f"{name}.inner"], strict=True)
        return sum(outer @ core @ inner for outer, core, inner in products)

    hidden = ACTIVATIONS["gelu"](linear(x, whole("down"), t["down.bias"]))
    return linear(hidden, whole("up"), t["up.bias"])


def depthwise(maps: Array, weight: Array, bias: Array) -> Array:
    """Maps (B, C, H, W) filtered channel by channel with (C, 1, K, K), zeros around them."""
    kernel, (rows, columns) = weight.shape[-1], maps.shape[-2:]
    padded = np.pad(maps, ((0, 0), (0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    result = np.zeros_like(maps) + bias[:, None, None]
    for i in range(kernel):
        for j in range(kernel):
            result += weight[:, 0, i, j, None, None] * padded[:, :, i : i + rows, j : j + columns]
    return result


def mona(x: Array, t: Tensors, grid: tuple[int, int], prefix: int) -> Array:
    """Mona's, for tokens (B, prefix + H W, C); each prefix token is an image of one pixel."""
    mixed = t["norm_scale"] * layer_norm(x, t["norm.weight"], t["norm.bias"], 1e-5) + t["stream_scale"] * x
    codes = linear(mixed, t["down.weight"], t["down.bias"])
    images = [codes[:, token, :, None, None] for token in range(prefix)]
    images.append(codes[:, prefix:].transpose(0, 2, 1).reshape(len(x), -1, *grid))
    tokens = []
    for u in images:
        m = u + sum(depthwise(u, t[f"filters.{i}.weight"], t[f"filters.{i}.bias"]) for i in range(3)) / 3
        mix = np.einsum("oi,bihw->bohw", t["mix.weight"][:, :, 0, 0], m) + t["mix.bias"][:, None, None]
        tokens.append((m + mix).reshape(*u.shape[:2], -1).transpose(0, 2, 1))
    return linear(ACTIVATIONS["gelu"](np.concatenate(tokens, 1)), t["up.weight"], t["up.bias"])


# -- the backbone -----------------------------------------------------------------------------------------------

Behind = Callable[[int, str, Array], Array]
Beside = Callable[[int, str, Array, Array], Array]
After = Callable[[int, str, Array], Array]


def vit(
    t: Tensors,
    images: Array,
    heads: int,
    *,
    behind: Behind = lambda block, role, z: z,
    beside: Beside = lambda block, role, x, n: np.zeros_like(x),
    after: After = lambda block, role, x: np.zeros_like(x),
    before: Behind = lambda block, role, n: n,
    along: Behind = lambda block, role, m: np.zeros(1),
    eps: float = 1e-6,
) -> Array:
    """Logits of timm's plain ViT, with or without layer scale, for images (B, channels, H, W).

    Args:
        t: its tensors by name.
        behind: (block, role, z) -> what takes the place of z, that projection's output.
        beside: (block, role, x, n) -> what is added to the sum, from the stream and its norm.
        after: (block, role, x) -> what is added behind the sum, from the new stream.
        before: (block, role, n) -> what takes the place of the norm's output.
        along: (block, role, m) -> what is added to the first projection's output, from its input.
    """
    patch = t["patch_embed.proj.weight"].shape[-1]
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    patches = images.reshape(len(images), -1, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(len(images), rows * columns, -1)
    x = linear(patches, t["patch_embed.proj.weight"].reshape(len(t["norm.weight"]), -1), t["patch_embed.proj.bias"])
    x = np.concatenate((np.repeat(t["cls_token"], len(images), 0), x), 1) + t["pos_embed"]
    for block in range(1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))):
        name = f"blocks.{block}"
        for role, norm, scale, branch in (("attention", "norm1", "ls1", attention), ("mlp", "norm2", "ls2", mlp)):
            n = layer_norm(x, t[f"{name}.{norm}.weight"], t[f"{name}.{norm}.bias"], eps)
            m = before(block, role, n)
            z = behind(block, role, branch(m, t, name, heads, along(block, role, m)))
            x = x + t.get(f"{name}.{scale}.gamma", 1.0) * z + beside(block, role, x, n)
            x = x + after(block, role, x)
    x = layer_norm(x, t["norm.weight"], t["norm.bias"], eps)
    return linear(x[:, 0], t["head.weight"], t["head.bias"])


def attention(n: Array, t: Tensors, name: str, heads: int, added: Array) -> Array:
    batch, tokens, width = n.shape
    qkv = linear(n, t[f"{name}.attn.qkv.weight"], t[f"{name}.attn.qkv.bias"]) + added
    q, k, v = qkv.reshape(batch, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    weights = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(width // heads))
    mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(n.shape)
    return linear(mixed, t[f"{name}.attn.proj.weight"], t[f"{name}.attn.proj.bias"])


def mlp(n: Array, t: Tensors, name: str, heads: int, added: Array) -> Array:
    hidden = ACTIVATIONS["gelu"](linear(n, t[f"{name}.mlp.fc1.weight"], t[f"{name}.mlp.fc1.bias"]) + added)
    return linear(hidden, t[f"{name}.mlp.fc2.weight"], t[f"{name}.mlp.fc2.bias"])
