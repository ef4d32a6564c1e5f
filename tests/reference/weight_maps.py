"""What each adapter makes of a layer's weight and bias, in float64 numpy from the papers' formulas, by its class.

``WEIGHT_MAPS`` give the weight and bias, ``CHANNEL_MAPS`` the matrix and shift of a map before the layer.

Shares no code with refold: the adapters are read for their tensors and hyper-parameters alone.

FacT (arXiv 2212.03145): every slice changes by s V S_i U, with S_i = sum_k P_ik C_k in form TK.
KronA (arXiv 2212.10650): W + s A (x) B, the kernel in B.
KAdaptation (arXiv 2203.16329): W + s sum_i (u_i v_i^T) (x) (p_i q_i^T), b + c.
ARC (arXiv 2310.06234): M = I + D^T diag(c) D, with D shared by the layers, and a shift b.
RLRR (arXiv 2403.19067): W + diag(l) W diag(r), b + c.
GLoRA (arXiv 2306.07967): W + W * A + B, b + b * D + E + W c. PACE (arXiv 2409.17137): W + W * A, b + b * D + W c.
Hydra (arXiv 2309.06922): W + s (W_p + W_s W), b + s (b_p + b_s + W_s b), W_p = B_p A_p, b_p = B_p a_p + b'_p.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from reference import formulas
from refold.adapters import BlockRotation, Decomposed, LinearBottleneck, LowRank, RowBlocks
from refold.adapters.branches import Branches
from refold.adapters.factored import Factored
from refold.adapters.kronecker import Kronecker, KroneckerBlock
from refold.adapters.kronecker_sum import KroneckerSum
from refold.adapters.modulated import Modulated
from refold.adapters.recomposed import Recomposed
from refold.adapters.rescaled import Rescaled

__all__ = ["CHANNEL_MAPS", "WEIGHT_MAPS", "folded", "kron", "tensors"]

Array = np.ndarray
Folded = tuple[Array, Array | None]


def tensors(adapter: nn.Module) -> dict[str, Array]:
    """An adapter's parameters by name, those of shared parts that belong to another adapter included."""
    referred = {name: part for name, part in vars(adapter).items() if isinstance(part, nn.Module)}
    named = dict(adapter.named_parameters())
    for name, part in referred.items():
        named |= {f"{name}.{leaf}": value for leaf, value in part.named_parameters()}
    return {name: value.detach().double().numpy().copy() for name, value in named.items()}


def folded(adapter: nn.Module, weight: Array, bias: Array | None) -> Folded:
    """The layer's weight (out, in / groups, *kernel) and bias with the adapter folded in."""
    return WEIGHT_MAPS[type(adapter)](adapter, tensors(adapter), weight, bias)


def _lora(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    return formulas.lora(weight, values["down"], values["up"], adapter.scale), bias


def _dora(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    magnitude = values["magnitude"] * formulas.channel_norms(weight)
    return formulas.dora(weight, values["down"], values["up"], magnitude, adapter.scale), bias


def _rows(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    weight, bias = weight.copy(), None if bias is None else bias.copy()
    for (start, stop), block in zip(adapter.spans, adapter.blocks, strict=True):
        rows = slice(start, stop)
        weight[rows], moved = folded(block, weight[rows], None if bias is None else bias[rows])
        if moved is not None:
            bias = np.zeros(len(weight)) if bias is None else bias
            bias[rows] = moved
    return weight, bias


def fact(weight: Array, slices: dict[tuple[int, ...], Array], down: Array, up: Array, scale: float) -> Array:
    """``s V S U`` added to each d x d slice; keys are the slice's row, its column and its place in the kernel."""
    width, weight = len(up), weight.copy()
    for (row, column, *tap), core in slices.items():
        inputs, outputs = down.shape[1] * column, width * row
        part = weight[(slice(outputs, outputs + width), slice(inputs, inputs + width), *tap)]
        part += scale * (up @ core @ down)[: part.shape[0], : part.shape[1]]
    return weight


def _fact(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    up, down, codes = values["factors.up"], values["factors.down"], values["codes"]
    width, rank = up.shape
    rows, columns = (-(-size // width) for size in weight.shape[:2])
    slices = {}
    for row, column, *tap in itertools.product(range(rows), range(columns), *map(range, weight.shape[2:])):
        if adapter.form == "tt":
            inside = slice(row * rank, (row + 1) * rank), slice(column * rank, (column + 1) * rank)
            core = codes[(*inside, *tap)]
        else:
            core = sum(codes[(row, column, *tap, k)] * values["factors.core"][k] for k in range(rank))
        slices[row, column, *tap] = core
    return fact(weight, slices, down, up, adapter.scale), bias


def _hydra(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    def branch(name: str) -> tuple[Array, Array | None]:
        up, down = values[f"{name}.up"], values[f"{name}.down"]
        constant = up @ values[f"{name}.down_bias"] + values[f"{name}.up_bias"] if f"{name}.up_bias" in values else None
        return np.tensordot(up, down, axes=(1, 0)), constant

    (beside, beside_bias), (behind, behind_bias) = branch("parallel"), branch("sequential")
    moved = weight + adapter.scale * (beside + np.tensordot(behind, weight, axes=(1, 0)))
    if beside_bias is None or behind_bias is None:
        return moved, bias
    before = np.zeros(len(weight)) if bias is None else bias
    return moved, before + adapter.scale * (beside_bias + behind_bias + behind @ before)


def kron(left: Array, right: Array) -> Array:
    """The Kronecker product of two matrices, block by block; further axes of ``right`` stay."""
    rows, columns = right.shape[:2]
    full = np.zeros((left.shape[0] * rows, left.shape[1] * columns, *right.shape[2:]))
    for i, j in itertools.product(*map(range, left.shape)):
        full[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = left[i, j] * right
    return full


def _krona(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    return weight + adapter.scale * kron(values["left"], values["right"]), bias


def _kadaptation(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    terms = zip(*(values[name] for name in ("slow.u", "slow.v", "p", "q")), strict=True)
    change = sum(kron(np.outer(u, v), np.tensordot(p, q, axes=0)) for u, v, p, q in terms)
    moved = weight + adapter.scale * change
    if "constant.value" not in values:
        return moved, bias
    return moved, values["constant.value"] + (0 if bias is None else bias)


def _rlrr(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    moved = np.empty_like(weight)
    for (o, i), factor in np.ndenumerate(np.outer(values["rows"], values["columns"])):
        moved[o, i] = weight[o, i] + factor * weight[o, i]
    return moved, bias if "bias" not in values else values["bias"] + (0 if bias is None else bias)


def _glora(adapter: Any, values: dict[str, Array], weight: Array, bias: Array | None) -> Folded:
    def path(name: str, shape: tuple[int, ...]) -> Array | None:
        rows, columns = values.get(f"paths.{name}.rows"), values.get(f"paths.{name}.columns")
        if rows is None:
            return None
        if columns is not None:
            return np.tensordot(rows, columns, axes=(1, 0)).reshape(shape)
        return np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape)

    out, inside = weight.shape[:1], weight.shape[1:2]
    zeros = np.zeros(weight.shape)
    factor, addition, prompt = path("a", weight.shape), path("b", weight.shape), path("c", inside)
    bias_factor, bias_addition = path("d", out), path("e", out)
    moved = weight * (1 + (zeros if factor is None else factor)) + (zeros if addition is None else addition)
    if prompt is None and bias_factor is None and bias_addition is None:
        return moved, bias
    before = np.zeros(out) if bias is None else bias
    shift = before * (1 + (0 if bias_factor is None else bias_factor))
    shift = shift + (0 if bias_addition is None else bias_addition)
    if prompt is not None:
        shift = shift + weight.reshape(*weight.shape[:2], -1).sum(-1) @ prompt
    return moved, shift


#: Adapter class -> (adapter, its tensors, weight, bias) -> (weight, bias).
WEIGHT_MAPS: dict[type, Callable[[Any, dict[str, Array], Array, Array | None], Folded]] = {
    LowRank: _lora,
    Decomposed: _dora,
    RowBlocks: _rows,
    Factored: _fact,
    Branches: _hydra,
    Kronecker: _krona,
    KroneckerSum: _kadaptation,
    Rescaled: _rlrr,
    Modulated: _glora,
}


def _repadapter(adapter: Any, values: dict[str, Array]) -> tuple[Array, Array]:
    biases = values.get("down_bias"), values.get("up_bias")
    return formulas.repadapter(values["down"], values["up"], *biases, scale=adapter.scale, groups=adapter.groups)


def _oft(adapter: Any, values: dict[str, Array]) -> tuple[Array, Array]:
    matrix = formulas.rotation(values["skew"], adapter.block)
    return matrix, np.zeros(len(matrix))


def _krona_block(adapter: Any, values: dict[str, Array]) -> tuple[Array, Array]:
    product = kron(values["left"], values["right"])
    return float(values["residual"][0]) * np.eye(len(product)) + adapter.scale * product, np.zeros(len(product))


def _arc(adapter: Any, values: dict[str, Array]) -> tuple[Array, Array]:
    down = values["shared.matrix"]
    matrix = np.eye(down.shape[1]) + sum(c * np.outer(d, d) for c, d in zip(values["coefficients"], down, strict=True))
    return matrix, values.get("bias", np.zeros(len(matrix)))


#: Adapter class -> (adapter, its tensors) -> (matrix, shift).
CHANNEL_MAPS: dict[type, Callable[[Any, dict[str, Array]], tuple[Array, Array]]] = {
    LinearBottleneck: _repadapter,
    BlockRotation: _oft,
    KroneckerBlock: _krona_block,
    Recomposed: _arc,
}
