"""VPT in float64 numpy, written from the paper block by block: no hooks, and nothing of refold.

Tokens are (B, N, C), maps (B, H, W, C); weights are laid out as torch's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Block", "deep", "none", "rotation", "shallow", "swin_stage", "without_place"]

Array = np.ndarray
_erf = np.vectorize(math.erf, otypes=[float])


@dataclass
class Block:
    """Weights of ``x + g1 attention(norm1 x)``, then ``x + g2 mlp(norm2 x)``; one row of ``qkv`` an output.

    Attributes:
        bias: (heads, N, N) added to the attention of the tokens without prompts.
        rotation: (heads, N - at, head width / 2) complex, of queries and keys behind the first ``at`` tokens.
        half: whether a complex number's parts are in the two halves of a head, not side by side.
        epsilon: of the norms.
    """

    heads: int
    norm1: tuple[Array, Array]
    qkv: tuple[Array, Array]
    proj: tuple[Array, Array]
    norm2: tuple[Array, Array]
    fc1: tuple[Array, Array]
    fc2: tuple[Array, Array]
    gains: tuple[Array | float, Array | float] = (1.0, 1.0)
    bias: Array | None = None
    rotation: Array | None = None
    half: bool = False
    epsilon: float = 1e-6
    quick: bool = False

    def norm(self, x: Array, numbers: tuple[Array, Array]) -> Array:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * numbers[0] + numbers[1]

    def mlp(self, x: Array) -> Array:
        hidden = self.norm(x, self.norm2) @ self.fc1[0].T + self.fc1[1]
        hidden = hidden / (1 + np.exp(-1.702 * hidden)) if self.quick else hidden * (1 + _erf(hidden / 2**0.5)) / 2
        return (hidden @ self.fc2[0].T + self.fc2[1]) * self.gains[1]

    def attention(self, x: Array, bias: Array | None, rotation: Array | None) -> Array:
        """Of tokens behind their norm (N, C)."""
        parts = np.split(x @ self.qkv[0].T + self.qkv[1], 3, axis=-1)
        results = []
        for head, (q, k, v) in enumerate(zip(*(np.split(part, self.heads, axis=-1) for part in parts), strict=True)):
            if rotation is not None:
                q, k = (self._rotated(t, rotation[head]) for t in (q, k))
            logits = q @ k.T / math.sqrt(q.shape[-1]) + (0 if bias is None else bias[head])
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            results.append(weights / weights.sum(-1, keepdims=True) @ v)
        return (np.concatenate(results, -1) @ self.proj[0].T + self.proj[1]) * self.gains[0]

    def _rotated(self, x: Array, rotation: Array) -> Array:
        first = len(x) - len(rotation)  # tokens without a place stay as they are
        moved, out = x[first:], x.copy()
        middle = x.shape[-1] // 2
        real, imaginary = (moved[:, :middle], moved[:, middle:]) if self.half else (moved[:, ::2], moved[:, 1::2])
        turned = (real + 1j * imaginary) * rotation
        if self.half:
            out[first:] = np.concatenate((turned.real, turned.imag), -1)
        else:
            out[first:, ::2], out[first:, 1::2] = turned.real, turned.imag
        return out

    def __call__(self, tokens: Array, at: int, prompts: int) -> Array:
        bias = None if self.bias is None else without_place(self.bias, at, prompts)
        rows = []
        for x in tokens:
            x = x + self.attention(self.norm(x, self.norm1), bias, self.rotation)
            rows.append(x + self.mlp(x))
        return np.stack(rows)


def rotation(table: Array, heads: int, half: bool) -> Array:
    """Of a table ([heads,] N, 2 head width) of sines, then cosines: one complex number a pair of channels."""
    sines, cosines = np.split(table, 2, axis=-1)
    pairs = slice(None, sines.shape[-1] // 2) if half else slice(None, None, 2)
    return np.broadcast_to(cosines[..., pairs] + 1j * sines[..., pairs], (heads, *sines[..., pairs].shape[-2:]))


def without_place(bias: Array, at: int, prompts: int) -> Array:
    """(heads, N, N) with zero rows and columns for ``prompts`` tokens behind the first ``at``."""
    length = bias.shape[-1]
    old = [i if i < at else i + prompts for i in range(length)]
    longer = np.zeros((len(bias), length + prompts, length + prompts))
    for i in range(length):
        for j in range(length):
            longer[:, old[i], old[j]] = bias[:, i, j]
    return longer


def none(tokens: Array, blocks: Sequence[Block], at: int) -> Array:
    """No prompts."""
    for block in blocks:
        tokens = block(tokens, at, 0)
    return tokens


def deep(tokens: Array, blocks: Sequence[Block], at: int, prompts: Sequence[Array]) -> Array:
    """[c, _, E] = L_i([c, P_i, E])."""
    for block, own in zip(blocks, prompts, strict=True):
        every = np.broadcast_to(own, (len(tokens), *own.shape))
        longer = block(np.concatenate((tokens[:, :at], every, tokens[:, at:]), 1), at, len(own))
        tokens = np.concatenate((longer[:, :at], longer[:, at + len(own) :]), 1)
    return tokens


def shallow(tokens: Array, blocks: Sequence[Block], at: int, prompts: Array) -> Array:
    """[c, Z, E] = L_i([c, Z, E]), Z = P before the first."""
    every = np.broadcast_to(prompts, (len(tokens), *prompts.shape))
    longer = np.concatenate((tokens[:, :at], every, tokens[:, at:]), 1)
    for block in blocks:
        longer = block(longer, at, len(prompts))
    return np.concatenate((longer[:, :at], longer[:, at + len(prompts) :]), 1)


# -- Swin -------------------------------------------------------------------------------------------------------


def swin_stage(
    maps: Array, blocks: Sequence[Block], window: int, shifts: Sequence[int], prompts: Sequence[Array | None]
) -> Array:
    """The blocks of one stage on maps (B, H, W, C) whose sides are multiples of the window.

    Args:
        shifts: of each block's windows.
        prompts: of each block (p, C); None goes on with what the block before made of its own, for each image.
    """
    results = []
    for image in maps:
        kept = None
        for block, shift, own in zip(blocks, shifts, prompts, strict=True):
            kept = own if own is not None else kept
            assert kept is not None
            image, kept = _swin_block(image, block, window, shift, kept)
        results.append(image)
    return np.stack(results)


def _swin_block(image: Array, block: Block, window: int, shift: int, prompts: Array) -> tuple[Array, Array]:
    height, width, _ = image.shape
    normed, count = block.norm(image, block.norm1), len(prompts)
    front = block.norm(prompts, block.norm1)
    added, of_prompts = np.zeros_like(image), []
    assert block.bias is not None
    for top in range(0, height, window):
        for left in range(0, width, window):
            places = [(top + i, left + j) for i in range(window) for j in range(window)]  # after the shift
            source = [((r + shift) % height, (c + shift) % width) for r, c in places]
            regions = [
                (_region(r, height, window, shift), _region(c, width, window, shift)) if shift else (0, 0)
                for r, c in places
            ]
            apart = np.array([[-100.0 * (a != b) for b in regions] for a in regions])
            x = np.concatenate((front, np.stack([normed[place] for place in source])))
            y = block.attention(x, without_place(block.bias + apart, 0, count), None)
            of_prompts.append(y[:count])
            for place, value in zip(source, y[count:], strict=True):
                added[place] = value
    image = image + added
    prompts = prompts + np.mean(of_prompts, axis=0)
    return image + block.mlp(image), prompts + block.mlp(prompts)


def _region(place: int, size: int, window: int, shift: int) -> int:
    """Of three parts of a shifted map: what was neighbours before, and what was brought together by the shift."""
    return 0 if place < size - window else 1 if place < size - shift else 2
