"""Torch's own attention and encoder: every way to call them, their fast paths and their nested tensors."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import refold
from zoo import perturb, relative

WIDTH = 8
EXACT = 1e-12
METHODS = [
    refold.RepAdapter(rank=4, scale=0.7, dropout=0.0),
    refold.LoRA(rank=3, scale=-0.6),
    refold.DoRA(rank=3),
    refold.SSF(),
]


@pytest.fixture(params=METHODS, ids=lambda m: type(m).__name__)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return request.param


class Host(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def adapted(layer: nn.Module, example: Any, method: refold.Method) -> Host:
    model = Host(layer).double().eval()
    perturb({n: p for n, p in model.named_parameters() if p.dim() == 1}, 0.2)
    refold.attach(model, method, example=example, trainable=())
    perturb(refold.trainable_parameters(model), 0.3)
    return model


def flat(output: Any) -> Tensor:
    tensors = output if isinstance(output, tuple) else (output,)
    return torch.cat([t.detach().flatten() for t in tensors if t is not None])


def assert_folds(model: Host, *inputs: Any, gradient: bool = True, **named: Any) -> None:
    with torch.set_grad_enabled(gradient):
        with refold.disabled(model):
            plain = flat(model(*inputs, **named))
        unmerged = flat(model(*inputs, **named))
        refold.merge(model)
        merged = flat(model(*inputs, **named))
        refold.unmerge(model)
        again = flat(model(*inputs, **named))
    assert relative(plain, unmerged) > 1e-3
    assert relative(merged, unmerged) <= EXACT
    assert torch.equal(again, unmerged)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


# -- MultiheadAttention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "fast path"])
@pytest.mark.parametrize("options", [{"need_weights": False}, {"average_attn_weights": False}, {}], ids=str)
def test_outputs_and_attention_weights(method, gradient, options):
    x = tokens(2, 5)
    model = adapted(nn.MultiheadAttention(WIDTH, 2, batch_first=True), (x, x, x), method)
    assert_folds(model, x, x, x, gradient=gradient, **options)


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "fast path"])
def test_unbatched_causal_and_masked(method, gradient):
    x, row = tokens(2, 5), tokens(5)
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = adapted(nn.MultiheadAttention(WIDTH, 2, batch_first=True), (x, x, x), method)
    assert_folds(model, row, row, row, gradient=gradient)
    assert_folds(model, x, x, x, attn_mask=causal, is_causal=True, need_weights=False, gradient=gradient)
    assert_folds(model, x, x, x, key_padding_mask=padding, need_weights=False, gradient=gradient)


def test_key_and_value_of_the_models_width_are_packed(method):
    layer = nn.MultiheadAttention(WIDTH, 2, kdim=WIDTH, vdim=WIDTH)
    inputs = tokens(5, 2), tokens(7, 2), tokens(7, 2)
    assert_folds(adapted(layer, inputs, method), *inputs)


@pytest.mark.parametrize("widths", [{"kdim": 4}, {"vdim": 6}, {"kdim": 4, "vdim": 6}], ids=str)
def test_separate_projections_are_refused_by_name_and_left_out_otherwise(widths):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(WIDTH, 2, **widths), "body": nn.Linear(WIDTH, WIDTH)})
    inputs = tokens(5, 2), *(torch.randn(7, 2, widths.get(k, WIDTH)).double() for k in ("kdim", "vdim"))

    class Cross(Host):
        def forward(self, *inputs: Tensor) -> Tensor:
            return self.layer["body"](self.layer["attention"](*inputs)[0])

    for method in METHODS:
        named = type(method)(sites="layer.attention")
        with pytest.raises(refold.SiteError, match=r"layer.attention: separate kdim or vdim projections"):
            refold.attach(Cross(model).double(), named, example=inputs, trainable=())
    host = Cross(model).double().eval()
    refold.attach(host, METHODS[3], example=inputs, trainable=())
    left_out = {row.path: row.reason for row in refold.explain(host).rows if row.slot == "-"}
    assert "separate kdim or vdim" in left_out["layer.attention"]
    perturb(refold.trainable_parameters(host), 0.3)
    assert_folds(host, *inputs)


# -- the encoder -------------------------------------------------------------------------------------------------------


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)


def fast_calls(model: nn.Module, *inputs: Any) -> int:
    """How often torch computes an encoder layer in one kernel, past its children."""
    kernel = torch._transformer_encoder_layer_fwd
    with mock.patch.object(torch, "_transformer_encoder_layer_fwd", side_effect=kernel) as seen, torch.no_grad():
        model(*inputs)
    return seen.call_count


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu"}, {"bias": False}], ids=str)
def test_the_fast_path_is_left_while_attached_and_taken_again_when_merged(method, options):
    x = tokens(2, 5)
    plain = Host(encoder(**options)).double().eval()
    expected = fast_calls(plain, x)
    assert expected == (0 if options == {"bias": False} else 2)
    model = adapted(encoder(**options), x, method)
    assert fast_calls(model, x) == 0
    assert_folds(model, x, gradient=False)
    refold.merge(model)
    assert fast_calls(model, x) == expected
    refold.detach(model)
    assert fast_calls(model, x) == expected


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_in_front_of_an_adapter(method):
    """With a padding mask and no gradients torch drops the padding from the batch: every row has its own length."""
    x = tokens(2, 5)
    model = adapted(encoder(), x, method)
    with torch.no_grad(), pytest.raises(refold.SiteError, match=r"NestedTensor.*use_nested_tensor = False"):
        model(x, src_key_padding_mask=PADDING)
    # In front of packed projections there is none: their weight itself is replaced.
    model = adapted(encoder(), x, refold.LoRA(rank=3, sites="*.self_attn"))
    assert_folds(model, x, src_key_padding_mask=PADDING, gradient=False)


def test_without_nested_tensors_padding_masks_are_exact(method):
    x = tokens(2, 5)
    layers = encoder()
    layers.use_nested_tensor = False
    model = adapted(layers, x, method)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            unmerged = model(x, src_key_padding_mask=PADDING)
            refold.merge(model)
            merged = model(x, src_key_padding_mask=PADDING)
            refold.unmerge(model)
        # What stands at padded positions is nobody's business: torch's own paths differ there.
        assert relative(merged[~PADDING], unmerged[~PADDING]) <= EXACT


def test_the_whole_transformer(method):
    model = nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    inputs = tokens(2, 5), tokens(2, 3)
    host = adapted(model, inputs, method)
    assert_folds(host, *inputs)
    assert_folds(host, *inputs, gradient=False)
