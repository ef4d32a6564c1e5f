"""The convolutional side methods in float64 numpy, written from the papers' formulas and sharing no code with refold.

Maps are (B, C, H, W), tokens (B, N, C); weights are laid out as torch's.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["conv", "conv_adapter", "conv_adapter_size", "convpass", "gelu", "linear", "quick_gelu", "st_adapter"]

Array = np.ndarray
_erf = np.vectorize(math.erf)


def quick_gelu(x: Array) -> Array:
    return x / (1 + np.exp(-1.702 * x))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """Along the last axis."""
    return x @ weight.T + bias


def conv(x: Array, weight: Array, bias: Array, *, stride: int = 1, pads: tuple[int, int] | None = None) -> Array:
    """A grouped convolution: each filter reads the next weight.shape[1] channels. Loops over positions, no library.

    Args:
        weight: (out, in / groups, K, K).
        pads: zeros before and behind rows and columns; None keeps height and width.
    """
    out, inside, kernel, _ = weight.shape
    before, behind = ((kernel - 1) // 2, kernel // 2) if pads is None else pads
    padded = np.pad(x, ((0, 0), (0, 0), (before, behind), (before, behind)))
    rows = (padded.shape[2] - kernel) // stride + 1
    columns = (padded.shape[3] - kernel) // stride + 1
    groups = x.shape[1] // inside
    result = np.zeros((len(x), out, rows, columns))
    for o in range(out):
        first = (o // (out // groups)) * inside
        for r in range(rows):
            for c in range(columns):
                patch = padded[
                    :, first : first + inside, r * stride : r * stride + kernel, c * stride : c * stride + kernel
                ]
                result[:, o, r, c] = (patch * weight[o]).sum(axis=(1, 2, 3)) + bias[o]
    return result


def convpass(tokens: Array, numbers: dict[str, Array], grid: tuple[int, int], prefix: int, act=quick_gelu) -> Array:
    """Up act(Conv act(Down x)) of tokens (B, prefix + H W, C); each prefix token is an image of one pixel.

    With a depthwise convolution, whose weight is (h, 1, K, K), it is Pro-tuning's block as well.
    """
    hidden = act(linear(tokens, numbers["down.weight"], numbers["down.bias"]))
    weight, bias = numbers["conv.weight"], numbers["conv.bias"]
    mixed = np.empty_like(hidden)
    for index in range(prefix):
        pixel = hidden[:, index, :, None, None]
        mixed[:, index] = conv(pixel, weight, bias)[..., 0, 0]
    maps = hidden[:, prefix:].transpose(0, 2, 1).reshape(len(hidden), -1, *grid)
    mixed[:, prefix:] = conv(maps, weight, bias).reshape(*maps.shape[:2], -1).transpose(0, 2, 1)
    return linear(act(mixed), numbers["up.weight"], numbers["up.bias"])


def conv_adapter(
    maps: Array, numbers: dict[str, Array], act, *, stride: int = 1, pads: tuple[int, int] | None = None
) -> Array:
    """gamma (Up act(Down x + a) + b) of maps (B, C, H, W)."""
    hidden = act(conv(maps, numbers["down.weight"], numbers["down.bias"], stride=stride, pads=pads))
    out = np.einsum("oh,bhrc->borc", numbers["up.weight"][:, :, 0, 0], hidden) + numbers["up.bias"][:, None, None]
    return numbers["gamma"][:, None, None] * out


def conv_adapter_size(inside: int, outside: int, kernel: int, reduction: int) -> int:
    """Its parameters: Down and its bias, Up and its bias, and gamma."""
    hidden = inside // reduction
    return inside * kernel**2 + hidden + hidden * outside + outside + outside


def st_adapter(tokens: Array, numbers: dict[str, Array], frames: int, prefix: int, act=lambda x: x) -> Array:
    """What is added to the stream (clips * frames, prefix + N, C): each frame sees itself and its two neighbours."""
    hidden = linear(tokens[:, prefix:], numbers["down.weight"], numbers["down.bias"])
    mixed = np.empty_like(hidden)
    for image in range(len(hidden)):
        clip, total = image // frames, numbers["shift"].copy()
        for tap, neighbour in enumerate((image - 1, image, image + 1)):
            if 0 <= neighbour < len(hidden) and neighbour // frames == clip:
                total = total + numbers["taps"][tap] * hidden[neighbour]
        mixed[image] = total
    added = np.zeros_like(tokens)
    added[:, prefix:] = linear(act(mixed), numbers["up.weight"], numbers["up.bias"])
    return added
