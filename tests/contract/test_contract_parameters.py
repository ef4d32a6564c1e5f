"""Parameters in odd places, formats and precisions: folded exactly, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import refold
from exactness import METHODS, WIDTH, adapted_rows, assert_exact, attached, rows
from zoo import perturb, relative


@pytest.fixture(params=METHODS, ids=lambda m: type(m).__name__)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return request.param


# -- parameters in odd places --------------------------------------------------------------------------------------


def test_models_without_weights_are_refused(method):
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH), nn.Linear(5, 5))

    with torch.device("meta"):
        model = build()
    x, weights = torch.randn(2, WIDTH, 5, dtype=torch.float64), build().state_dict()
    with pytest.raises(refold.SiteError, match=r"has no values yet.*meta.*Load the weights first"):
        refold.attach(model, method, example=x.to("meta"), trainable=())
    model.to_empty(device="cpu").load_state_dict(weights)
    assert_exact(attached(model, method, x), lambda m: m(x))


def test_parameters_that_are_not_contiguous(method):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Conv1d(5, 4, 3)).double()
    model[0].weight = nn.Parameter(torch.randn(WIDTH, WIDTH).double().T)
    model[1].weight = nn.Parameter(torch.randn(3, 5, 4).double().permute(2, 1, 0))
    model[0].bias = nn.Parameter(torch.randn(2 * WIDTH).double()[::2])
    assert not any(p.is_contiguous() for p in (model[0].weight, model[1].weight, model[0].bias))
    x = rows(2, 5)
    strides = [p.stride() for p in model.parameters()]
    model = attached(model, method, x)
    assert_exact(model, lambda m: m(x))
    assert [p.stride() for p in model.parameters()] == strides


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_parameters_that_are_expanded_are_refused(leaf):
    layer = nn.Linear(WIDTH, WIDTH).double()
    shape = getattr(layer, leaf).shape
    setattr(layer, leaf, nn.Parameter(torch.randn(*shape[:-1], 1).double().expand(shape)))
    for method in METHODS:
        with pytest.raises(refold.SiteError, match=rf"{leaf}.*one number of memory.*contiguous"):
            refold.attach(nn.Sequential(layer), method, example=rows(), trainable=())


def test_a_shift_never_goes_into_an_expanded_norm():
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)).double()
    model[0].bias = nn.Parameter(torch.zeros(1).double().expand(WIDTH))
    x = rows()
    refold.attach(model.eval(), METHODS[0], example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.2)
    assert adapted_rows(model)["1"].shift == "none"
    assert_exact(model, lambda m: m(x))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.randn(WIDTH, WIDTH, dtype=torch.complex64), "complex"),
        (torch.randint(-9, 9, (WIDTH, WIDTH), dtype=torch.int8), "int8"),
        (torch.eye(WIDTH).to_sparse(), "sparse"),
    ],
    ids=["complex", "integer", "sparse"],
)
def test_weights_that_are_no_plain_numbers_are_refused(weight, reason):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2)
            self.layer.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x.to(weight.dtype))
            return self.last(x)

    x = torch.randn(3, WIDTH)
    sites = {"sites": "layer"}
    model = Own()
    if reason == "int8":
        model.layer.forward = lambda x: x  # torch has no integer product of this kind
        x = torch.randn(3, WIDTH)
    for method in (refold.RepAdapter(rank=4, **sites), refold.LoRA(**sites)):
        with pytest.raises(refold.SiteError, match=reason):
            refold.attach(model, method, example=x, trainable=())


def test_a_weight_that_is_a_buffer_is_refused(method):
    layer = nn.Linear(WIDTH, WIDTH).double()
    weight = layer.weight.data
    del layer.weight
    layer.register_buffer("weight", weight)
    with pytest.raises(refold.SiteError, match="not a parameter of its own"):
        refold.attach(nn.Sequential(layer), method, example=rows(), trainable=())


# -- several precisions --------------------------------------------------------------------------------------------


class MixedPrecision(nn.Module):
    """A backbone in half precision around a norm in float32, cast back and forth as mixed models do."""

    def __init__(self, low: torch.dtype) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1).to(low)
        self.norm = nn.LayerNorm(WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH).to(low)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.to(self.stem.weight.dtype)).flatten(2).mT
        return self.body(self.norm(x.float()).to(self.body.weight.dtype))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_precisions_side_by_side(method, low):
    torch.manual_seed(0)
    model = MixedPrecision(low).eval()
    x = torch.randn(2, 3, 4, 4)
    refold.attach(model, method, example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.2)
    with refold.disabled(model):
        plain = model(x).detach()
    unmerged = model(x).detach()
    dtypes = {n: p.dtype for n, p in model.named_parameters() if "refold" not in n}
    assert refold.merge(model).rel_l2 <= 1e-5
    assert {n: p.dtype for n, p in model.named_parameters()} == dtypes
    rounding = 4 * torch.finfo(low).eps
    assert relative(plain, unmerged) > 10 * rounding
    assert relative(model(x), unmerged) < rounding


# -- what users put on layers --------------------------------------------------------------------------------------


def test_hooks_that_were_there_before(method):
    """What a user's hooks change is part of the layer's input and output, merged or not."""
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH)).double(), rows()
    model[0].register_forward_pre_hook(lambda module, args: (torch.tanh(args[0]),))
    model[0].register_forward_hook(lambda module, args, output: torch.sigmoid(output))
    assert_exact(attached(model, method, x), lambda m: m(x))


def test_a_forward_that_was_replaced_on_the_instance(method):
    """As accelerate's device hooks do; here with a weight that is normalised at every call."""
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).double(), rows()
    layer = model[0]
    layer.forward = lambda x: F.linear(x, F.normalize(layer.weight, dim=1), layer.bias)
    model = attached(model, method, x)
    left_out = {row.path for row in refold.explain(model).rows if row.slot == "-"}
    assert left_out == ({"0"} if isinstance(method, refold.SSF) else set())
    assert_exact(model, lambda m: m(x))


# -- weights that are computed at every call -----------------------------------------------------------------------

COMPUTED = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, "parametrized"),
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "parametrized"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "parametrized"),
    "weight_norm hook": (nn.utils.weight_norm, "not a parameter of its own"),
    "spectral_norm hook": (nn.utils.spectral_norm, "not a parameter of its own"),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.3), "not a parameter of its own"),
    "parametrized bias": (lambda layer: parametrize.register_parametrization(layer, "bias", nn.Tanh()), "parametrized"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.parametrize("make", [lambda: nn.Linear(WIDTH, WIDTH), lambda: nn.Conv1d(WIDTH, WIDTH, 1)])
def test_computed_weights_are_refused_by_name_and_left_out_otherwise(method, make, kind):
    parametrization, reason = COMPUTED[kind]
    x = rows(WIDTH)  # as tokens and as an image of one axis
    model = nn.Sequential(parametrization(make()), nn.Linear(WIDTH, WIDTH)).double()
    with pytest.raises(refold.SiteError, match=f"0: .*{reason}"):
        refold.attach(model, type(method)(sites="0"), example=x, trainable=())
    model = attached(model, method, x)
    assert set(adapted_rows(model)) == {"1"}
    assert reason in next(row.reason for row in refold.explain(model).rows if row.path == "0")
    assert_exact(model, lambda m: m(x))


def test_lazy_layers_are_refused_until_they_have_weights(method):
    x = rows()
    model = nn.Sequential(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, WIDTH)).double()
    with pytest.raises(refold.SiteError, match=r"0.weight: it has no values yet \(lazy.*call the model once"):
        refold.attach(model, method, example=x, trainable=())
    model(x)
    assert_exact(attached(model, method, x), lambda m: m(x))
