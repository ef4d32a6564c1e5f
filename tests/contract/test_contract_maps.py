"""The algebra of channel maps against dense numpy, on random structures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.maps import ChannelMap, to_float64

WIDTH = 12
DIVISORS = [1, 2, 3, 4, 6, 12]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@dataclass
class Pair:
    """The same map twice: refold's structured form and dense numpy."""

    structured: ChannelMap
    matrix: np.ndarray
    shift: np.ndarray


@st.composite
def maps(draw: st.DrawFn, groups: int | None = None) -> Pair:
    """Diagonal, low-rank, grouped or dense maps, with or without a shift."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blocks = draw(st.sampled_from(DIVISORS)) if groups is None else groups
    kind = draw(st.sampled_from(["diagonal", "structured", "dense"]))
    scale = rng.normal(size=WIDTH) if draw(st.booleans()) else np.ones(WIDTH)
    shift = rng.normal(size=WIDTH) if draw(st.booleans()) else None
    size = WIDTH // blocks
    constant = None if shift is None else torch.from_numpy(shift)
    if kind == "diagonal":
        found = ChannelMap(torch.from_numpy(scale), shift=constant, groups=WIDTH)
        matrix = np.diag(scale)
    elif kind == "structured":
        rank = draw(st.integers(1, 3))
        up, down = np.zeros((WIDTH, rank * blocks)), np.zeros((rank * blocks, WIDTH))
        for block in range(blocks):
            rows, columns = slice(block * size, (block + 1) * size), slice(block * rank, (block + 1) * rank)
            up[rows, columns], down[columns, rows] = rng.normal(size=(size, rank)), rng.normal(size=(rank, size))
        found = ChannelMap(
            torch.from_numpy(scale), torch.from_numpy(up), torch.from_numpy(down), constant, groups=blocks
        )
        matrix = np.diag(scale) + up @ down
    else:
        matrix = np.zeros((WIDTH, WIDTH))
        for block in range(blocks):
            rows = slice(block * size, (block + 1) * size)
            matrix[rows, rows] = rng.normal(size=(size, size))
        found = ChannelMap.dense(torch.from_numpy(matrix), constant, groups=blocks)
    return Pair(found, matrix, np.zeros(WIDTH) if shift is None else shift)


def check(found: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found.numpy(), expected, **CLOSE)


@given(maps())
def test_matrix_and_apply(pair):
    check(pair.structured.matrix(), pair.matrix)
    x = np.random.default_rng(0).normal(size=(2, WIDTH, 3, 4))
    expected = np.einsum("ij,bjhw->bihw", pair.matrix, x) + pair.shift[None, :, None, None]
    check(pair.structured.apply(torch.from_numpy(x), dim=1), expected)
    check(pair.structured.apply(torch.from_numpy(np.moveaxis(x, 1, -1).copy())), np.moveaxis(expected, 1, -1))


@given(maps(), maps())
def test_then_composes(first, second):
    both = first.structured.then(second.structured)
    check(both.matrix(), second.matrix @ first.matrix)
    shift = second.matrix @ first.shift + second.shift
    check(torch.zeros(WIDTH).double() if both.shift is None else both.shift, shift)
    check(torch.block_diag(*both.blocks(both.groups)), second.matrix @ first.matrix)


@given(maps(), maps(), maps())
def test_then_is_associative(a, b, c):
    left = a.structured.then(b.structured).then(c.structured)
    right = a.structured.then(b.structured.then(c.structured))
    np.testing.assert_allclose(left.matrix().numpy(), right.matrix().numpy(), rtol=1e-8, atol=1e-8)
    assert left.groups == right.groups


@given(maps())
def test_identity_is_neutral(pair):
    one = ChannelMap.identity(WIDTH)
    for both in (one.then(pair.structured), pair.structured.then(one)):
        check(both.matrix(), pair.matrix)
        assert both.groups == pair.structured.groups
        assert (both.shift is None) == (pair.structured.shift is None)


@given(st.data())
def test_before_is_the_weight_times_the_map(data):
    pair = data.draw(maps())
    groups = data.draw(st.sampled_from([g for g in DIVISORS if pair.structured.groups % g == 0]))
    kernel = data.draw(st.sampled_from([(), (3,), (2, 3), (2, 1, 2)]))
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2 * groups, WIDTH // groups, *kernel))
    dense = np.zeros((2 * groups, WIDTH, *kernel))
    for group in range(groups):
        inside = slice(group * WIDTH // groups, (group + 1) * WIDTH // groups)
        dense[2 * group : 2 * group + 2, inside] = weight[2 * group : 2 * group + 2]
    expected = np.moveaxis(np.tensordot(dense, pair.matrix, axes=(1, 0)), -1, 1)
    found = pair.structured.before(torch.from_numpy(weight), groups)
    for group in range(groups):
        inside = slice(group * WIDTH // groups, (group + 1) * WIDTH // groups)
        check(found[2 * group : 2 * group + 2], expected[2 * group : 2 * group + 2, inside])


@given(st.data())
def test_after_is_the_map_times_the_weight(data):
    pair = data.draw(maps())
    groups = data.draw(st.sampled_from([g for g in DIVISORS if pair.structured.groups % g == 0]))
    shape = data.draw(st.sampled_from([(), (4,), (4, 3), (2, 3, 3)]))
    weight = np.random.default_rng(0).normal(size=(WIDTH, *shape))
    check(pair.structured.after(torch.from_numpy(weight), groups), np.tensordot(pair.matrix, weight, axes=(1, 0)))


@given(maps())
def test_solve_undoes_the_matrix(pair):
    if np.linalg.cond(pair.matrix) > 1e6:
        return
    vector = np.random.default_rng(0).normal(size=WIDTH)
    np.testing.assert_allclose(
        pair.matrix @ pair.structured.solve(torch.from_numpy(vector)).numpy(), vector, rtol=1e-6, atol=1e-6
    )


@given(maps(), st.sampled_from(DIVISORS))
def test_blocks_follow_the_promise_not_the_values(pair, groups):
    if pair.structured.groups % groups:
        with pytest.raises(ValueError, match="not block-diagonal"):
            pair.structured.blocks(groups)
    else:
        check(torch.block_diag(*pair.structured.blocks(groups)), pair.matrix)


def test_a_singular_map_cannot_be_solved():
    with pytest.raises(RuntimeError):
        ChannelMap(torch.zeros(WIDTH, dtype=torch.float64), groups=WIDTH).solve(torch.ones(WIDTH, dtype=torch.float64))


@settings(max_examples=20)
@given(st.integers(2, 30))
def test_long_chains_stay_exact_in_float64(length):
    """Adapters near the identity, composed one by one, against the product of their matrices."""
    rng = np.random.default_rng(length)
    chain, product = ChannelMap.identity(WIDTH), np.eye(WIDTH)
    for _ in range(length):
        up, down = 0.1 * rng.normal(size=(WIDTH, 2)), 0.1 * rng.normal(size=(2, WIDTH))
        chain = chain.then(
            ChannelMap(torch.ones(WIDTH, dtype=torch.float64), torch.from_numpy(up), torch.from_numpy(down))
        )
        product = (np.eye(WIDTH) + up @ down) @ product
    np.testing.assert_allclose(chain.matrix().numpy(), product, rtol=1e-13, atol=1e-14)
    assert chain.up is not None
    assert chain.up.shape == (WIDTH, 2 * length)


def test_to_float64_detaches():
    source = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    copy = to_float64(source)
    assert copy.dtype == torch.float64
    assert not copy.requires_grad
    double = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert not to_float64(double).requires_grad
