"""Random layers of every kind, in random surroundings, under random adapters: exact, or refused for a known reason.

Each example builds a small float64 model with one adapted layer. Its unmerged output is compared with a formula
that shares no code with refold, its merged output with the unmerged one; both ways back are compared bit for bit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from math import gcd

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import refold
from random_layers import KINDS, TRANSPOSED, BlockMap, Case, Surrounded, cases
from reference import formulas
from zoo import perturb

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")]

EXACT = 1e-10
EXAMPLES = 400


# -- what is expected ------------------------------------------------------------------------------------------------


def turning_block(case: Case) -> int:
    """The channels of OFT's blocks: the most that fit into a group."""
    width = case.width // case.groups
    return max(b for b in range(1, min(case.method.block, width) + 1) if width % b == 0)


def refusal(case: Case) -> str | None:
    """Why refold must refuse the case; nothing else may be refused."""
    if isinstance(case.method, BlockMap) and case.method.groups % case.groups:
        return "would make it dense"
    if isinstance(case.method, refold.OFT) and turning_block(case) == 1:
        return "nothing to rotate"
    if isinstance(case.method, refold.RepAdapter) and case.groups > 1:
        return "would make it dense"
    return None


def canonical_order(case: Case, shape: tuple[int, ...]) -> np.ndarray:
    """Where the entries of a weight (out, in / groups, ...) are stored, which transposed convolutions do otherwise."""
    stored = np.arange(np.prod(shape)).reshape(shape)
    if not isinstance(case.layer, tuple(TRANSPOSED.values())):
        return stored
    inside, outside = shape[0] // case.groups, shape[1]
    order = np.empty((outside * case.groups, inside, *shape[2:]), dtype=int)
    for group in range(case.groups):
        for o in range(outside):
            for i in range(inside):
                order[group * outside + o, i] = stored[group * inside + i, o]
    return order


def channel_matrix(case: Case, numbers: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """M and c of a map before the layer."""
    method = case.method
    if isinstance(method, refold.OFT):
        return formulas.rotation(numbers["skew"], turning_block(case)), np.zeros(case.width)
    if isinstance(method, refold.RepAdapter):
        biases = numbers.get("down_bias"), numbers.get("up_bias")
        groups = gcd(method.groups, case.width)  # fewer where they do not divide the width
        return formulas.repadapter(numbers["down"], numbers["up"], *biases, scale=method.scale, groups=groups)
    matrix, size = np.zeros((case.width, case.width)), case.width // method.groups
    for index, block in enumerate(numbers["blocks"]):
        matrix[index * size : (index + 1) * size, index * size : (index + 1) * size] = block
    return matrix, numbers.get("constant", np.zeros(case.width))


def expected(case: Case, plain: Surrounded, numbers: dict[str, np.ndarray]) -> Tensor:
    """The adapted model's output, from the untouched model and the adapter's numbers."""
    packed = isinstance(plain.layer, nn.MultiheadAttention)
    parameter = plain.layer.get_parameter("in_proj_weight" if packed else "weight")
    order = canonical_order(case, tuple(parameter.shape))
    weight, method = parameter.numpy().ravel()[order], case.method

    def apply(x: Tensor, fn: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        y = fn(np.moveaxis(x.numpy(), case.channel_dim, -1))
        return torch.from_numpy(np.moveaxis(y, -1, case.channel_dim).copy())

    def layer(*inputs: Tensor) -> Tensor:
        y = plain.layer(*inputs)
        return y[0] if packed else y

    def rewritten(changed: np.ndarray) -> Tensor:
        flat = np.empty(weight.size)
        flat[order.ravel()] = changed.ravel()
        parameter.copy_(torch.from_numpy(flat).view(parameter.shape))
        return plain(*case.inputs)

    if isinstance(method, refold.LoRA):
        moved = formulas.lora(weight, numbers["down"], numbers["up"], method.scale)
        if isinstance(method, refold.DoRA):
            axes = tuple(range(1, weight.ndim))
            before, after = (np.sqrt((w**2).sum(axes, keepdims=True)) for w in (weight, moved))
            moved = numbers["magnitude"].reshape(before.shape) * before * moved / after
        return rewritten(moved)
    if isinstance(method, refold.SSF):
        gamma, beta = numbers["gamma"], numbers.get("beta", 0.0)
        if packed:  # after the packed projection, inside the attention
            if plain.layer.in_proj_bias is not None:
                plain.layer.in_proj_bias.copy_(torch.from_numpy(gamma * plain.layer.in_proj_bias.numpy() + beta))
            return rewritten(gamma[:, None] * weight)
        return plain.after(apply(layer(*map(plain.before, case.inputs)), lambda y: gamma * y + beta))
    matrix, shift = channel_matrix(case, numbers)
    inside = 0.0 if case.pads_zeros else shift
    mapped = [apply(plain.before(x), lambda x: x @ matrix.T + inside) for x in case.inputs]
    y = layer(*mapped)
    if case.pads_zeros:
        outside = formulas.fold_conv(weight, np.eye(case.width), shift, case.groups)[1]
        y = apply(y, lambda y: y + outside)
    return plain.after(y)


# -- the tests -------------------------------------------------------------------------------------------------------


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[n], v) for n, v in wanted.items())


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm()) <= EXACT * float(wanted.norm())


@torch.no_grad()
def settled(case: Case) -> Surrounded:
    """The model in float64 at evaluation, with statistics, norms and biases that matter."""
    model = Surrounded(case.before, case.layer, case.after).double().eval().requires_grad_(False)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and value.dim() == 1:
            value.add_(0.3 * torch.randn_like(value))
    return model


def verdict(case: Case) -> str:
    """``"exact"`` or ``"refused"``; anything else fails."""
    model = settled(case)
    plain = copy.deepcopy(model)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    reason = refusal(case)
    options = {"trainable": (), "allow_new_bias": case.allow_new_bias}
    if reason is not None:
        with pytest.raises(refold.SiteError, match=reason):
            refold.attach(model, case.method, example=case.inputs, **options)
        assert_same(model.state_dict(), before)
        return "refused"
    refold.attach(model, case.method, example=case.inputs, **options)
    perturb(refold.trainable_parameters(model), 0.3)
    adapter = model.layer.get_submodule("refold.default")
    numbers = {n: p.detach().numpy() for n, p in adapter.named_parameters()}
    attached = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        unmerged = model(*case.inputs)
        assert_equal(unmerged, expected(case, plain, numbers))
        refold.merge(model)
        assert_equal(model(*case.inputs), unmerged)
        created = set(model.state_dict()) - set(before)
        assert not created or (case.allow_new_bias and len(created) == 1)
        refold.unmerge(model)
        assert_same(model.state_dict(), attached)
        assert torch.equal(model(*case.inputs), unmerged)
    refold.detach(model)
    assert_same(model.state_dict(), before)
    return "exact"


@pytest.mark.parametrize("kind", KINDS)
def test_random_layers_are_exact_or_refused(kind):
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES)
    @given(cases(kind))
    def check(case: Case) -> None:
        seen[verdict(case)] += 1

    check()
    total = sum(seen.values())
    print(f"{kind}: {dict(seen)}")
    assert total >= EXAMPLES
    assert seen["exact"] >= 0.7 * total


def test_enough_examples_are_drawn():
    assert EXAMPLES * len(KINDS) >= 2000
