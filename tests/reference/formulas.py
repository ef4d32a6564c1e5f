"""The papers' formulas in float64 numpy, written from the texts and sharing no code with refold.

RepAdapter (arXiv 2302.08106): f(x) = x + s (B (A x + a) + b) before a frozen projection, B grouped. Folded:
M = I + s B A, c = s (B a + b), W' = W M, b' = b + W c.
LoRA (arXiv 2106.09685): W' = W + s B A.
DoRA (arXiv 2402.09353): W' = m (W + s B A) / ||W + s B A||, norms over each output channel.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "batchnorm_absorbs",
    "block_diagonal",
    "channel_norms",
    "conv2d",
    "dora",
    "fold_behind",
    "fold_conv",
    "fold_linear",
    "layer_norm_absorbs",
    "lora",
    "repadapter",
]

Array = np.ndarray


def block_diagonal(up: Array, groups: int) -> Array:
    """The grouped projection (d, r / g) written out as (d, r): group i maps its r / g inputs to its d / g outputs."""
    width, per_group = up.shape
    full = np.zeros((width, per_group * groups))
    for group in range(groups):
        rows = slice(group * width // groups, (group + 1) * width // groups)
        columns = slice(group * per_group, (group + 1) * per_group)
        full[rows, columns] = up[rows]
    return full


def repadapter(
    down: Array, up: Array, down_bias: Array | None, up_bias: Array | None, *, scale: float, groups: int
) -> tuple[Array, Array]:
    """M (d, d) and c (d,) of one adapter; absent biases count as zero."""
    full = block_diagonal(up, groups)
    matrix = np.eye(len(full)) + scale * full @ down
    shift = np.zeros(len(full))
    if down_bias is not None and up_bias is not None:
        shift = scale * (full @ down_bias + up_bias)
    return matrix, shift


def fold_linear(weight: Array, matrix: Array, shift: Array) -> tuple[Array, Array]:
    """``W M`` and ``W c``."""
    return weight @ matrix, weight @ shift


def fold_conv(weight: Array, matrix: Array, shift: Array, groups: int = 1) -> tuple[Array, Array]:
    """K'[o, i, uv] = sum_j K[o, j, uv] M[j, i] and sum_j sum_uv K[o, j, uv] c[j], for any number of kernel axes.

    With groups, output channel o sees only its group's inputs, and M must not mix groups.
    """
    out, inside = weight.shape[:2]
    folded = np.zeros_like(weight)
    moved = np.zeros(out)
    for o in range(out):
        first = (o // (out // groups)) * inside
        block = matrix[first : first + inside, first : first + inside]
        folded[o] = np.tensordot(block, weight[o], axes=(0, 0))
        moved[o] = weight[o].reshape(inside, -1).sum(axis=1) @ shift[first : first + inside]
    return folded, moved


def fold_behind(weight: Array, bias: Array | None, matrix: Array, shift: Array) -> tuple[Array, Array]:
    """A map of the output, ``M (W x + b) + c``: the new W, for any number of kernel axes, and what b becomes."""
    folded = np.tensordot(matrix, weight, axes=(1, 0))
    return folded, shift if bias is None else matrix @ bias + shift


def lora(weight: Array, down: Array, up: Array, scale: float) -> Array:
    """``W + s B A`` for a weight (out, in, *kernel), A (r, in, *kernel) and B (out, r)."""
    return weight + scale * np.tensordot(up, down, axes=(1, 0))


def channel_norms(weight: Array) -> Array:
    """The length of each output channel of a weight (out, in, *kernel): (out,)."""
    return np.array([np.sqrt((channel**2).sum()) for channel in weight])


def dora(weight: Array, down: Array, up: Array, magnitude: Array, scale: float) -> Array:
    """``m (W + s B A) / ||W + s B A||``, channel by channel."""
    direction = lora(weight, down, up, scale)
    return np.stack([m * d / n for m, d, n in zip(magnitude, direction, channel_norms(direction), strict=True)])


def scale_and_shift(weight: Array, bias: Array | None, gamma: Array, beta: Array) -> tuple[Array, Array]:
    """SSF after a layer: every output channel of ``W x + b`` times gamma, plus beta; the new W and what b becomes."""
    scaled = np.stack([g * channel for g, channel in zip(gamma, weight, strict=True)])
    return scaled, gamma * (0 if bias is None else bias) + beta


def rotation(skew: Array, block: int) -> Array:
    """OFT's R: each block solves (I - Q) R = I + Q, with Q filled row by row above the diagonal."""
    width = len(skew) * block
    matrix = np.zeros((width, width))
    for index, entries in enumerate(skew):
        q, values = np.zeros((block, block)), iter(entries)
        for i in range(block):
            for j in range(i + 1, block):
                q[i, j] = next(values)
                q[j, i] = -q[i, j]
        inside = slice(index * block, (index + 1) * block)
        matrix[inside, inside] = np.linalg.inv(np.eye(block) - q) @ (np.eye(block) + q)
    return matrix


def batchnorm_absorbs(running_mean: Array, moved: Array) -> Array:
    """A constant ``moved`` added before a BatchNorm in evaluation equals a running mean lowered by it."""
    return running_mean - moved


def layer_norm_absorbs(bias: Array, matrix: Array, shift: Array) -> Array:
    """``M y + c = M (y + M^-1 c)``: the shift as part of the norm's bias, before M."""
    return bias + np.linalg.inv(matrix) @ shift


def conv2d(x: Array, weight: Array, bias: Array | None, *, padding: int = 0, stride: int = 1) -> Array:
    """Plain 2-d convolution of (B, I, H, W) with (O, I, K, K), zero padded: loops, no library."""
    batch, _, height, width = x.shape
    out, _, kernel, _ = weight.shape
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows = (height + 2 * padding - kernel) // stride + 1
    columns = (width + 2 * padding - kernel) // stride + 1
    result = np.zeros((batch, out, rows, columns))
    for r in range(rows):
        for c in range(columns):
            patch = padded[:, :, r * stride : r * stride + kernel, c * stride : c * stride + kernel]
            result[:, :, r, c] = np.tensordot(patch, weight, axes=((1, 2, 3), (1, 2, 3)))
    return result if bias is None else result + bias[None, :, None, None]
