"""The two folds of a channel map into every layer kind, and where the constant part of the map goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import refold
from refold.fold import KINDS, fold_input, fold_output, kind_of
from refold.maps import ChannelMap
from zoo import perturb, relative

WIDTH = 8
EXACT = 1e-12


# -- the two folds, directly ---------------------------------------------------------------------------------------


def random_map(width: int, groups: int, *, shift: bool = True) -> ChannelMap:
    """A map with exactly ``groups`` diagonal blocks; ``width`` blocks are per-channel factors."""
    blocks = [torch.randn(width // groups, width // groups, dtype=torch.float64) for _ in range(groups)]
    constant = torch.randn(width, dtype=torch.float64) if shift else None
    return ChannelMap.dense(torch.block_diag(*blocks), constant, groups)


LAYERS = {
    "linear": (lambda: nn.Linear(WIDTH, 12), (2, 5, WIDTH)),
    "conv1d": (lambda: nn.Conv1d(WIDTH, 12, 3, stride=2), (2, WIDTH, 9)),
    "conv2d": (lambda: nn.Conv2d(WIDTH, 12, 3, padding=1), (2, WIDTH, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(WIDTH, 12, 2, dilation=2), (2, WIDTH, 5, 5, 5)),
    "grouped": (lambda: nn.Conv2d(WIDTH, 12, 3, padding=1, groups=2), (2, WIDTH, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), (2, WIDTH, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(WIDTH, 12, 3, stride=2), (2, WIDTH, 5, 5)),
    "transposed_grouped": (lambda: nn.ConvTranspose1d(WIDTH, 12, 3, padding=2, groups=4), (2, WIDTH, 9)),
    "transposed_depthwise": (lambda: nn.ConvTranspose1d(WIDTH, WIDTH, 2, stride=2, groups=WIDTH), (2, WIDTH, 9)),
    "unbiased": (lambda: nn.Linear(WIDTH, 12, bias=False), (3, WIDTH)),
    "layer_norm": (lambda: nn.LayerNorm(WIDTH), (2, 5, WIDTH)),
    "batch_norm": (lambda: nn.BatchNorm2d(WIDTH), (2, WIDTH, 7, 7)),
    "group_norm": (lambda: nn.GroupNorm(2, WIDTH), (2, WIDTH, 7, 7)),
}
NORMS = ("layer_norm", "batch_norm", "group_norm")


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    layer = make().double().eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5)
    return layer, torch.randn(shape, dtype=torch.float64)


def with_tensors(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in NORMS])
@pytest.mark.parametrize("groups", [1, 2, 4, WIDTH])
@pytest.mark.parametrize("shift", [True, False])
def test_a_map_before_a_layer_folds_into_it(name, groups, shift):
    layer, x = layer_and_input(name)
    operator = kind_of(layer).operator(layer)
    if groups % operator.groups:
        with pytest.raises(ValueError, match="not block-diagonal"):
            fold_input(operator, layer.weight, random_map(WIDTH, groups))
        return
    channel_map = random_map(WIDTH, groups, shift=shift)
    weight, moved = fold_input(operator, layer.weight.detach(), channel_map)
    assert weight.shape == layer.weight.shape
    assert (moved is not None) == shift
    # Zeros are padded around the mapped input: the shift is added after such a layer, and inside others.
    unshifted = ChannelMap(channel_map.scale, channel_map.up, channel_map.down, None, groups)
    before = unshifted if operator.pads_zeros else channel_map
    expected = layer(before.apply(x, operator.channel_dim))
    if moved is not None and operator.pads_zeros:
        expected = expected + moved.view(-1, *[1] * (-operator.channel_dim - 1))
    bias = layer.bias
    if moved is not None:
        bias = moved if bias is None else bias + moved
    folded = type(layer).__new__(type(layer))
    folded.__dict__.update(layer.__dict__ | {"_parameters": dict(layer._parameters)})
    folded._parameters.update(weight=nn.Parameter(weight), bias=None if bias is None else nn.Parameter(bias.detach()))
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("groups", [1, 2, 4, "channel"])
def test_a_map_after_a_layer_folds_into_it(name, groups):
    layer, x = layer_and_input(name)
    operator = kind_of(layer).operator(layer)
    blocks = operator.out_width if groups == "channel" else groups
    channel_map = random_map(operator.out_width, blocks)
    if blocks % operator.groups:
        with pytest.raises(ValueError, match="not block-diagonal"):
            fold_output(operator, layer.weight, layer.bias, channel_map)
        return
    dim = 1 if name in ("batch_norm", "group_norm") else operator.channel_dim
    expected = channel_map.apply(layer(x), dim)
    weight, bias, shift = fold_output(operator, layer.weight.detach(), layer.bias, channel_map)
    bias = shift if bias is None else bias + shift
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter(bias.detach())
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-11)


# -- where the shift goes ------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Layers in a row, the last the head."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x.flatten(2).mean(-1) if x.dim() == 4 else x)


class Branching(nn.Module):
    """A norm or a projection whose output is read twice."""

    def __init__(self, first: nn.Module, second: nn.Module, *, through_first: bool) -> None:
        super().__init__()
        self.first, self.second, self.through_first = first, second, through_first
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.first(x)
        x = self.second(shared) + shared
        return self.head(x.flatten(2).mean(-1) if x.dim() == 4 else x)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, options.pop("kernel", 1), bias=False, **options)


def batch_norm(**options: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(WIDTH, **options)
    if norm.running_mean is not None:
        norm.running_mean.uniform_(-1, 1)
    return norm


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=False)


IMAGE, ROW = (2, WIDTH, 5, 5), (4, WIDTH)
SHIFTS = {
    "own bias": (lambda: Chain(nn.Linear(WIDTH, WIDTH)), ROW, "own bias"),
    "batch norm after": (lambda: Chain(conv(), batch_norm()), IMAGE, "BatchNorm body.1"),
    "batch norm after a padded conv": (
        lambda: Chain(conv(kernel=3, padding=1), batch_norm()),
        IMAGE,
        "BatchNorm body.1",
    ),
    "activation between": (lambda: Chain(conv(), nn.ReLU(), batch_norm()), IMAGE, "none"),
    "activation in place between": (lambda: Chain(conv(), nn.ReLU(inplace=True), batch_norm()), IMAGE, "none"),
    "batch norm without statistics": (lambda: Chain(conv(), batch_norm(track_running_stats=False)), IMAGE, "none"),
    "batch norm that something else joins": (
        lambda: Branching(conv(), batch_norm(), through_first=True),
        IMAGE,
        "none",
    ),
    "norm before": (lambda: Chain(nn.LayerNorm(WIDTH), linear()), ROW, "norm body.0"),
    "group norm before": (lambda: Chain(nn.GroupNorm(2, WIDTH), conv()), IMAGE, "norm body.0"),
    "batch norm before": (lambda: Chain(batch_norm(), conv()), IMAGE, "norm body.0"),
    "norm before zero padding": (lambda: Chain(nn.GroupNorm(2, WIDTH), conv(kernel=3, padding=1)), IMAGE, "none"),
    "norm before reflected padding": (
        lambda: Chain(nn.GroupNorm(2, WIDTH), conv(kernel=3, padding=1, padding_mode="reflect")),
        IMAGE,
        "norm body.0",
    ),
    "norm and activation before": (lambda: Chain(nn.LayerNorm(WIDTH), nn.GELU(), linear()), ROW, "none"),
    "norm and activation in place before": (
        lambda: Chain(nn.LayerNorm(WIDTH), nn.ReLU(inplace=True), linear()),
        ROW,
        "none",
    ),
    "norm that applies an activation itself": (lambda: Chain(BatchNormAct2d(WIDTH), conv()), IMAGE, "none"),
    "batch norm with an activation after": (lambda: Chain(conv(), BatchNormAct2d(WIDTH)), IMAGE, "BatchNorm body.1"),
    "norm with two readers": (lambda: Branching(nn.LayerNorm(WIDTH), linear(), through_first=False), ROW, "none"),
    "norm without bias": (lambda: Chain(nn.LayerNorm(WIDTH, bias=False), linear()), ROW, "none"),
    "norm without weights": (lambda: Chain(nn.LayerNorm(WIDTH, elementwise_affine=False), linear()), ROW, "none"),
    "nothing": (lambda: Chain(nn.GELU(), linear()), ROW, "none"),
}


@pytest.mark.parametrize("case", SHIFTS)
def test_the_shift_goes_where_explain_says_and_merges_exactly(case):
    make, shape, place = SHIFTS[case]
    model = make().double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    keys = list(model.state_dict())
    refold.attach(model, refold.RepAdapter(rank=4), example=x)
    row = refold.explain(model).rows[-2]
    assert row.shift == place
    assert ("built without a shift" in row.reason) == (place == "none")
    perturb(refold.trainable_parameters(model), 0.2)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) <= EXACT
    assert list(model.state_dict()) == keys


def test_the_shift_in_training_is_the_shift_in_evaluation():
    """A frozen BatchNorm uses its statistics in both, so a shift before it acts the same way."""
    model = Chain(conv(), batch_norm()).double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    refold.attach(model, refold.RepAdapter(rank=4, dropout=0.0), example=x)
    perturb(refold.trainable_parameters(model), 0.2)
    assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.Sequential(nn.GELU(), linear()), torch.randn(4, WIDTH).double()),
        (lambda: nn.Sequential(nn.GELU(), conv(kernel=3, padding=1)), torch.randn(IMAGE).double()),
        (lambda: nn.MultiheadAttention(WIDTH, 2, bias=False), (torch.randn(5, 2, WIDTH).double(),) * 3),
    ],
    ids=["linear", "padded conv", "attention"],
)
def test_a_new_bias_only_by_permission(make, inputs):
    model = make().double().eval()
    keys = set(model.state_dict())
    refold.attach(model, refold.RepAdapter(rank=4), example=inputs, trainable=(), allow_new_bias=True)
    assert refold.explain(model).rows[0].shift == "new bias"
    perturb(refold.trainable_parameters(model), 0.2)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)

    def output() -> Tensor:
        found = model(*arguments)
        return (found[0] if isinstance(found, tuple) else found).detach()

    unmerged = output()
    refold.merge(model)
    assert len(set(model.state_dict()) - keys) == 1
    assert relative(output(), unmerged) <= EXACT
    refold.unmerge(model)
    assert torch.equal(output(), unmerged)
    refold.detach(model)
    assert set(model.state_dict()) == keys


def test_a_layer_kind_never_meets_a_map_of_the_wrong_groups():
    """Whatever the values: a map promises its blocks by structure."""
    layer = nn.Conv2d(WIDTH, WIDTH, 3, groups=4)
    dense = ChannelMap.dense(torch.eye(WIDTH, dtype=torch.float64))
    operator = KINDS["conv"].operator(layer)
    with pytest.raises(ValueError, match="not block-diagonal over 4 groups"):
        fold_input(operator, layer.weight.double(), dense)
    with pytest.raises(ValueError, match="not block-diagonal over 4 groups"):
        fold_output(operator, layer.weight.double(), layer.bias, dense)
