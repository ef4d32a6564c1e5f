"""DTL, LST and PACE in float64 numpy, written from the papers' formulas and sharing no code with refold.

Features are (B, N, C) with the tokens before those of a grid first; weights are laid out as torch's.
"""

from __future__ import annotations

import numpy as np

from reference.conv_side import conv, gelu, linear

__all__ = ["consistency", "dtl", "lst_entry", "lst_exit", "lst_handed", "lst_rung"]

Array = np.ndarray
Numbers = dict[str, Array]


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(x / 2))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return weight * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) + bias


def dtl(
    state: Array | float,
    x: Array,
    numbers: Numbers,
    beta: float,
    kernel: Array | None = None,
    grid: tuple[int, int] = (1, 1),
) -> tuple[Array, Array]:
    """h after one more block, and what a block gets of it: swish(h), its grid convolved depthwise with zeros around.

    Args:
        state: h of the block before, 0 at the start.
        x: what enters the block.
        kernel: (C, 1, 3, 3) of DTL+.
        grid: rows and columns of the last tokens.
    """
    h = state + x @ numbers["down.weight"].T @ numbers["up.weight"].T
    gated = h * sigmoid(beta * h)
    if kernel is None:
        return h, gated
    tokens = grid[0] * grid[1]
    prefix, positions = gated[:, :-tokens], gated[:, -tokens:]
    maps = positions.transpose(0, 2, 1).reshape(len(x), -1, *grid)
    mixed = conv(maps, kernel, np.zeros(len(kernel)))
    return h, np.concatenate([prefix, mixed.reshape(len(x), -1, tokens).transpose(0, 2, 1)], axis=1)


def lst_entry(x: Array, numbers: Numbers) -> Array:
    """s_0 = E x."""
    return linear(x, numbers["down.weight"], numbers["down.bias"])


def lst_rung(state: Array, y: Array, numbers: Numbers) -> Array:
    """One rung: the gate, then a pre-norm transformer block; heads have 8 channels, or 4, 2, 1 where 8 do not fit."""
    gate = sigmoid(numbers["alpha"] / 0.1)
    s = gate * linear(y, numbers["down.weight"], numbers["down.bias"]) + (1 - gate) * state
    normed = layer_norm(s, numbers["norm1.weight"], numbers["norm1.bias"])
    query, key, value = np.split(linear(normed, numbers["qkv.weight"], numbers["qkv.bias"]), 3, axis=-1)
    size = next(size for size in (8, 4, 2, 1) if s.shape[-1] % size == 0)
    heads = []
    for first in range(0, s.shape[-1], size):
        q, k, v = (part[..., first : first + size] for part in (query, key, value))
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(size))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    s = s + linear(np.concatenate(heads, axis=-1), numbers["proj.weight"], numbers["proj.bias"])
    normed = layer_norm(s, numbers["norm2.weight"], numbers["norm2.bias"])
    hidden = gelu(linear(normed, numbers["fc1.weight"], numbers["fc1.bias"]))
    return s + linear(hidden, numbers["fc2.weight"], numbers["fc2.bias"])


def lst_exit(state: Array, numbers: Numbers) -> Array:
    """U norm(s) + b."""
    normed = layer_norm(state, numbers["norm.weight"], numbers["norm.bias"])
    return linear(normed, numbers["up.weight"], numbers["up.bias"])


def lst_handed(state: Array, carry: Array, grid: tuple[int, int], factor: int) -> Array:
    """A stage's last state on the next stage's grid, ``factor`` times coarser: means of patches, mapped."""
    rows, columns = grid[0] // factor, grid[1] // factor
    patches = state.reshape(len(state), rows, factor, columns, factor, -1)
    return patches.mean(axis=(2, 4)).reshape(len(state), rows * columns, -1) @ carry.T


def consistency(first: Array, second: Array, weight: float) -> float:
    """lambda times the mean over samples of the squared L2 distance."""
    return weight * float(np.mean([np.sum((a - b) ** 2) for a, b in zip(first, second, strict=True)]))
