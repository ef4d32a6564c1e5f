"""Every layer kind with every map and every geometry: folded exactly, or refused with the documented error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import refold
from reference import formulas
from refold.fold import refusal
from zoo import perturb, relative

WIDTH = 8
EXACT = 1e-12
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
METHODS = [refold.RepAdapter(rank=4, scale=0.7, dropout=0.0), refold.LoRA(rank=3, scale=-0.6)]


class Host(nn.Module):
    """One layer inside a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def adapted(layer: nn.Module, example: Any, method: refold.Method, **options: Any) -> Host:
    """The layer in float64 at evaluation with a trained adapter on it."""
    model = Host(layer).double().eval()
    refold.attach(model, method, example=example, trainable=(), **options)
    perturb(refold.trainable_parameters(model), 0.3)
    return model


def assert_folds(model: Host, *inputs: Any, **named: Any) -> None:
    """Merged equals unmerged, the adapter mattered, and the way back is exact."""
    with torch.no_grad():
        with refold.disabled(model):
            plain = model(*inputs, **named)
        unmerged = model(*inputs, **named)
        report = refold.merge(model)
        merged = model(*inputs, **named)
        refold.unmerge(model)
        again = model(*inputs, **named)
    if isinstance(unmerged, tuple):
        plain, unmerged, merged, again = plain[0], unmerged[0], merged[0], again[0]
    assert report.folded
    assert relative(plain, unmerged) > 1e-3
    assert relative(merged, unmerged) <= EXACT
    assert torch.equal(again, unmerged)


def example(dims: int, channels: int = WIDTH) -> Tensor:
    sizes = (9, 7, 5)[:dims]
    return torch.randn(2, channels, *sizes, dtype=torch.float64)


@pytest.fixture(params=METHODS, ids=lambda m: type(m).__name__)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return request.param


# -- Linear -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 5, WIDTH), (2, 3, 5, WIDTH), (2, 2, 3, 5, WIDTH), (WIDTH,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(method, shape, bias):
    x = torch.randn(shape, dtype=torch.float64)
    assert_folds(adapted(nn.Linear(WIDTH, 6, bias=bias), x, method), x)


def test_linear_called_by_keyword(method):
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    assert_folds(adapted(nn.Linear(WIDTH, 6), {"input": x}, method), input=x)


def test_linear_on_a_strided_view_and_an_empty_batch(method):
    x = torch.randn(WIDTH, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    model = adapted(nn.Linear(WIDTH, 6), x, method)
    assert_folds(model, x)
    assert model(x[:0]).shape == (0, 5, 6)


# -- convolutions --------------------------------------------------------------------------------------------------

PADDINGS = [0, 1, 2, "same", "valid"]
MODES = ["zeros", "reflect", "replicate", "circular"]


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_every_padding(method, dims, mode, padding, bias):
    if dims == 3 and mode == "reflect" and padding in (2, "same"):
        padding = 1  # torch pads five-dimensional reflection by less than the smallest axis only
    layer = CONVS[dims](WIDTH, 6, 3, padding=padding, padding_mode=mode, bias=bias)
    x = example(dims)
    assert_folds(adapted(layer, x, method), x)


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (2, 2, 1), (3, 2, 1), (3, 1, 2), (2, 3, 2)]
)
@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_of_every_geometry(method, dims, kernel, stride, dilation, padding):
    layer = CONVS[dims](WIDTH, 6, kernel, stride=stride, dilation=dilation, padding=padding)
    x = example(dims)
    assert_folds(adapted(layer, x, method), x)


def test_an_unbatched_and_a_channels_last_image(method):
    x = example(2)
    model = adapted(nn.Conv2d(WIDTH, 6, 3, padding=1), x, method)
    assert_folds(model, x[0])
    assert_folds(model, x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(("stride", "padding"), [((2, 1), (0, 2)), ((1, 3), (1, 0))])
def test_convolutions_with_a_geometry_per_axis(method, stride, padding):
    layer = nn.Conv2d(WIDTH, 6, (3, 1), stride=stride, padding=padding, dilation=(1, 2))
    x = example(2)
    assert_folds(adapted(layer, x, method), x)


@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("groups", [2, 4, WIDTH])
def test_grouped_convolutions_take_a_weight_map(dims, mode, groups):
    layer = CONVS[dims](WIDTH, 2 * WIDTH, 3, padding=1, padding_mode=mode, groups=groups)
    x = example(dims)
    assert_folds(adapted(layer, x, refold.LoRA(rank=2, sites="layer")), x)


@pytest.mark.parametrize("groups", [2, WIDTH])
def test_grouped_convolutions_refuse_a_mixing_map(groups):
    layer = nn.Conv2d(WIDTH, WIDTH, 3, groups=groups)
    with pytest.raises(refold.SiteError, match=rf"layer: .*{groups} groups would make it dense.*per-channel"):
        adapted(layer, example(2), refold.RepAdapter(rank=4, sites="layer"))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [2, (4, 1), (3, 2)], ids=str)
def test_same_padding_of_even_kernels_is_lopsided(method, mode, kernel):
    x = example(2)
    assert_folds(adapted(nn.Conv2d(WIDTH, 6, kernel, padding="same", padding_mode=mode), x, method), x)


# -- transposed convolutions ---------------------------------------------------------------------------------------

GEOMETRIES = [
    {},
    {"stride": 2},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"stride": 3, "dilation": 2, "padding": 1, "output_padding": 2},
    {"dilation": 2, "padding": 1},
    {"padding": 2},  # every output sees the whole kernel: the only one whose shift folds inside
    {"padding": 3, "stride": 2, "output_padding": 1},
]


@pytest.mark.parametrize("dims", TRANSPOSED)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions_of_every_geometry(method, dims, geometry, bias):
    x = example(dims)
    assert_folds(adapted(TRANSPOSED[dims](WIDTH, 6, 3, bias=bias, **geometry), x, method), x)


@pytest.mark.parametrize("dims", TRANSPOSED)
@pytest.mark.parametrize("groups", [2, WIDTH])
def test_grouped_transposed_convolutions_take_a_weight_map_and_no_mixing_one(dims, groups):
    x = example(dims)

    def layer() -> nn.Module:
        return TRANSPOSED[dims](WIDTH, 2 * WIDTH, 3, stride=2, padding=1, groups=groups)

    assert_folds(adapted(layer(), x, refold.LoRA(rank=2, sites="layer")), x)
    with pytest.raises(refold.SiteError, match=f"{groups} groups would make it dense"):
        adapted(layer(), x, refold.RepAdapter(rank=4, sites="layer"))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_transposed_convolution_against_the_formula(geometry):
    """The unmerged path: the layer itself on ``M x``, with the constant inside where that is the same everywhere."""
    layer, x = nn.ConvTranspose2d(WIDTH, 6, 3, **geometry), example(2)
    model = adapted(layer, x, refold.RepAdapter(rank=4, scale=0.7))
    adapter = model.layer.get_submodule("refold.default")
    numbers = {n: p.detach().numpy() for n, p in adapter.named_parameters()}
    matrix, shift = formulas.repadapter(**numbers, scale=0.7, groups=2)
    mixed = torch.from_numpy(np.einsum("ij,bjhw->bihw", matrix, x.numpy()))
    constant = torch.from_numpy(np.einsum("iohw,i->o", layer.weight.detach().numpy(), shift))
    inside = torch.from_numpy(shift)[:, None, None].expand(mixed.shape)
    with refold.disabled(model), torch.no_grad():
        after = layer(mixed) + constant[:, None, None]
        uniform = torch.allclose(layer(mixed + inside), after)
    assert uniform == (geometry == {"padding": 2})
    assert relative(model(x), after) <= EXACT


def test_a_transposed_convolution_asked_for_an_output_size(method):
    x = example(2)
    model = adapted(nn.ConvTranspose2d(WIDTH, 6, 3, stride=2, padding=1), x, method)
    assert model(x, [18, 14]).shape[2:] == (18, 14)
    assert_folds(model, x, [18, 14])
    assert_folds(model, x, output_size=[17, 14])


def test_a_transposed_convolution_gives_its_adapters_the_right_gradients(method):
    model = adapted(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=1), example(1, 4), method)
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    trained = tuple(refold.trainable_parameters(model).values())
    assert torch.autograd.gradcheck(lambda x, *parameters: model(x), (x, *trained))


# -- attention -----------------------------------------------------------------------------------------------------


def attention_inputs(batch_first: bool, cross: bool) -> tuple[Tensor, Tensor, Tensor]:
    def tokens(count: int) -> Tensor:
        shape = (2, count, WIDTH) if batch_first else (count, 2, WIDTH)
        return torch.randn(shape, dtype=torch.float64)

    query = tokens(5)
    return (query, tokens(7), tokens(7)) if cross else (query, query, query)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention(method, batch_first, cross, bias, options):
    layer = nn.MultiheadAttention(WIDTH, 2, bias=bias, batch_first=batch_first, **options)
    inputs = attention_inputs(batch_first, cross)
    model = adapted(layer, inputs, method)
    assert_folds(model, *inputs)
    assert_folds(model, *inputs, need_weights=False)
    assert_folds(model, query=inputs[0], key=inputs[1], value=inputs[2])
    assert not {"in_proj_weight", "in_proj_bias"} & layer.__dict__.keys()


def test_attention_with_masks(method):
    inputs = attention_inputs(batch_first=True, cross=False)
    model = adapted(nn.MultiheadAttention(WIDTH, 2, batch_first=True), inputs, method)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    assert_folds(model, *inputs, attn_mask=causal, key_padding_mask=padding)


def test_attention_trains_through_its_packed_weight():
    """The gradients of a low-rank addition, against those of the same addition written out."""
    inputs = attention_inputs(batch_first=True, cross=True)
    model = adapted(nn.MultiheadAttention(WIDTH, 2, batch_first=True), inputs, refold.LoRA(rank=3, sites="layer"))
    adapter = model.layer.get_submodule("refold.default")
    model(*inputs)[0].pow(2).sum().backward()
    found = {n: p.grad.clone() for n, p in adapter.named_parameters()}

    model.zero_grad()
    plain = nn.MultiheadAttention(WIDTH, 2, batch_first=True).double().eval()
    weight = model.layer.in_proj_weight + adapter.up @ adapter.down
    values = dict(model.layer.named_parameters()) | {"in_proj_weight": weight}
    values = {n: v for n, v in values.items() if not n.startswith("refold")}
    torch.func.functional_call(plain, values, inputs)[0].pow(2).sum().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_attention_that_raises_leaves_no_shadow_of_its_weight():
    inputs = attention_inputs(batch_first=True, cross=False)
    model = adapted(nn.MultiheadAttention(WIDTH, 2, batch_first=True), inputs, refold.LoRA(rank=3))
    wrong = torch.randn(2, 5, WIDTH + 1, dtype=torch.float64)
    with pytest.raises((AssertionError, RuntimeError)):
        model(wrong, wrong, wrong)
    assert not {"in_proj_weight", "in_proj_bias"} & model.layer.__dict__.keys()
    assert isinstance(model.layer.in_proj_weight, nn.Parameter)
    assert_folds(model, *inputs)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.MultiheadAttention(WIDTH, 2, kdim=4, vdim=4), "separate kdim or vdim projections"),
        (nn.LayerNorm(WIDTH, elementwise_affine=False), "no affine weight"),
        (nn.LayerNorm((3, WIDTH)), "more than the channel dimension"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 2)), "parametrized"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(WIDTH, 2, 1)), "parametrized"),
        (nn.GELU(), "not a layer refold can fold into"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_layers_that_do_not_use_their_weight_as_stored_are_refused(layer, reason):
    told = refusal(layer)
    assert told is not None
    assert reason in told


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_is_refused():
    layer = nn.utils.weight_norm(nn.Linear(WIDTH, 2))
    told = refusal(layer)
    assert told is not None
    assert "not a parameter of its own" in told
    with pytest.raises(refold.SiteError, match="not a parameter of its own"):
        adapted(layer, torch.randn(2, WIDTH, dtype=torch.float64), refold.RepAdapter(rank=4))


def test_one_layer_called_twice_folds_for_both_calls(method):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.shared(torch.tanh(self.shared(x))))

    model = Twice().double().eval()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    refold.attach(model, method, example=x)
    perturb(refold.trainable_parameters(model), 0.2)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) <= EXACT


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_layer_with_its_fast_path(method, norm_first, training):
    """In evaluation torch may compute the whole layer in one kernel that would never see an adapter."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    model = adapted(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), x, method).train(training)
    assert len(refold.explain(model).rows) >= 6
    assert_folds(model, x)
