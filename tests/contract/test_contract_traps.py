"""Models that do something unusual: each is adapted and merged exactly, or refused with a reason. Never in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refold
from exactness import METHODS, WIDTH, adapted_rows, assert_exact, attached, outputs, rows
from zoo import build, perturb


@pytest.fixture(params=METHODS, ids=lambda m: type(m).__name__)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return request.param


# -- who calls what, and how often ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """One block for every depth (ALBERT), norm included."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.body(self.norm(x)))
        return x


def test_a_block_that_is_called_for_every_depth(method):
    x = rows()
    model = attached(Recurrent(), method, x)
    assert_exact(model, lambda m: m(x))


class OneModuleTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = self.first
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(torch.tanh(self.first(x))))


def test_one_module_under_two_names_is_one_layer(method):
    x = rows()
    model = attached(OneModuleTwoNames(), method, x)
    assert set(adapted_rows(model)) == {"first", "other"}
    assert_exact(model, lambda m: m(x))


class SharedNormBias(nn.Module):
    """Two norms, one bias: a shift that moved into the first would come out of the second as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.LayerNorm(WIDTH)
        self.last.bias = self.norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.norm(x)))


def test_a_shift_never_goes_into_a_bias_that_two_norms_share():
    x = rows()
    model = attached(SharedNormBias(), METHODS[0], x)
    assert adapted_rows(model)["body"].shift == "none"
    assert_exact(model, lambda m: m(x))


class SameMemory(nn.Module):
    """Two parameters, two modules, one memory: torch calls them different."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, WIDTH)
        self.view = view

    def tie(self) -> SameMemory:
        self.second.weight = nn.Parameter(self.view(self.first.weight.data))
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(torch.tanh(self.first(x))))


@pytest.mark.parametrize("view", [lambda w: w, lambda w: w.T, lambda w: w[1:]], ids=["same", "transposed", "rows"])
def test_parameters_that_overlap_in_memory_are_left_out(method, view):
    x = rows()
    model = SameMemory(view).double()
    model.tie()
    if model.second.weight.shape[0] != WIDTH:
        model.second.bias = nn.Parameter(torch.randn(WIDTH - 1).double())
        model.second.out_features = model.third.in_features = WIDTH - 1
        model.third.weight = nn.Parameter(torch.randn(WIDTH, WIDTH - 1).double())
    model = attached(model, method, x)
    assert set(adapted_rows(model)) == {"third"}
    assert_exact(model, lambda m: m(x))


class Sometimes(nn.Module):
    """Small inputs skip a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.long = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        return self.long(x) if x.shape[0] > 2 else x


def test_a_layer_that_some_inputs_never_reach(method):
    many, few = rows(4), rows(2)
    assert_exact(attached(Sometimes(), method, many), lambda m: m(many), lambda m: m(few))
    # Probed with an input that skips it, it gets no adapter, and the user is told.
    model = attached(Sometimes(), method, few)
    assert set(adapted_rows(model)) == {"always"}
    assert "never used" in next(row.reason for row in refold.explain(model).rows if row.path == "long")
    assert_exact(model, lambda m: m(few), lambda m: m(many))


class TrainingOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return (x, self.auxiliary(x)) if self.training else x


def test_a_layer_for_training_only_gets_no_adapter_and_says_so(method):
    x = rows()
    model = attached(TrainingOnly(), method, x)
    assert set(adapted_rows(model)) == {"body"}
    assert_exact(model, lambda m: m(x))


# -- what lies between the layers ----------------------------------------------------------------------------------


class Gated(nn.Module):
    """SwiGLU with separate projections of one normalised input."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 12, bias=bias), nn.Linear(WIDTH, 12, bias=bias)
        self.down = nn.Linear(12, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlps(method, bias):
    x = rows(2, 3)
    model = attached(Gated(bias=bias), method, x)
    assert {"gate", "up", "down"} <= set(adapted_rows(model))
    if isinstance(method, refold.RepAdapter):
        assert {row.shift for row in adapted_rows(model).values()} == {"own bias" if bias else "none"}
    assert_exact(model, lambda m: m(x))


class ChannelsLast(nn.Module):
    """ConvNeXt's way: a depthwise convolution on NCHW, projections on NHWC."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(self.mix(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_features_with_channels_last(method, layout):
    x = torch.randn(2, WIDTH, 5, 4, dtype=torch.float64).to(memory_format=layout)
    model = attached(ChannelsLast().to(memory_format=layout), method, x)
    assert_exact(model, lambda m: m(x))


class Detached(nn.Module):
    """A second reader that autograd does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.norm(y) * torch.sigmoid(y.detach().mean((2, 3), keepdim=True))


def test_a_reader_behind_detach_is_exact_or_refused(method):
    x = torch.randn(2, WIDTH, 4, 4, dtype=torch.float64)
    model = attached(Detached(), method, x)
    unmerged = outputs(model, lambda m: m(x))
    if isinstance(method, refold.LoRA):
        assert_exact(model, lambda m: m(x))
        return
    # The probe gives the shift to the norm; the check of the merge sees that it is missing elsewhere.
    with pytest.raises(refold.MergeError, match="the merge was undone"):
        refold.merge(model)
    assert torch.equal(outputs(model, lambda m: m(x)), unmerged)


class HalfWithoutGradient(nn.Module):
    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.stem, self.body, self.context = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            x = self.stem(x)
        return self.body(x.clone())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_stem_that_runs_without_gradients(method, context):
    x = rows()
    assert_exact(attached(HalfWithoutGradient(context), method, x), lambda m: m(x))


# -- what models take and give -------------------------------------------------------------------------------------


@dataclass
class Features:
    """What research code returns: neither a tuple nor a dict."""

    logits: Tensor
    levels: list[Tensor]


class NestedTensor:
    """DETR's pair of padded images and mask."""

    def __init__(self, tensors: Tensor, mask: Tensor) -> None:
        self.tensors, self.mask = tensors, mask


class Returning(nn.Module):
    """Returns the convolution's output and what a norm makes of it, wrapped in some container."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)
        self.wrap = wrap

    def forward(self, x: Any) -> Any:
        y = self.body(x.tensors if isinstance(x, NestedTensor) else x)
        return self.wrap(self.norm(y), y)


WRAPS = {
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: [a, {"level": [b, None]}],
    "dict": lambda a, b: {"logits": a, "features": b},
    "dataclass": lambda a, b: Features(a, [b]),
    "object": lambda a, b: NestedTensor(a, b),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_every_output_counts_however_it_is_wrapped(method, wrap):
    """Here a shift must not move into the BatchNorm: the output before it is given away too."""
    x = torch.randn(2, WIDTH, 4, 4, dtype=torch.float64)
    model = attached(Returning(WRAPS[wrap]), method, x)
    if isinstance(method, refold.RepAdapter):
        assert adapted_rows(model)["body"].shift == "none"
    assert outputs(model, lambda m: m(x)).numel() == 2 * x.numel()
    assert_exact(model, lambda m: m(x))


def test_inputs_that_are_objects(method):
    x = NestedTensor(torch.randn(2, WIDTH, 4, 4, dtype=torch.float64), torch.zeros(2, 4, 4, dtype=torch.bool))
    model = attached(Returning(WRAPS["tuple"]), method, (x,))
    assert_exact(model, lambda m: m(x))


class Anything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0]["pixels"] if args else kwargs["images"][0]
        return self.body(x) * kwargs.get("factor", 1.0)


def test_a_forward_that_takes_anything(method):
    x = rows()
    for example in ([{"pixels": x}], {"images": [x], "factor": 2.0}):
        model = attached(Anything(), method, example)
        assert_exact(model, lambda m: m({"pixels": x}), lambda m: m(images=[x], factor=0.5))


# -- the probe -----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts its forwards, keeps statistics, draws random numbers and caches tables as buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.cached = False
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x.shape[0])
        self.seen += 1
        self.replaced = self.replaced + 1
        if not self.cached:
            self.register_buffer("table", torch.ones(WIDTH).to(x), persistent=False)
            self.cached = True
        return self.dropout(self.body(x)) * self.table + 0.0 * torch.rand(1).to(x)


@pytest.mark.parametrize("method", [*METHODS, refold.BitFit()], ids=lambda m: type(m).__name__)
def test_the_probe_is_at_most_two_forwards_and_leaves_nothing_behind(method):
    model, x = Counting().double().train(), rows(1)
    model.dropout.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: v.clone() for n, v in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    refold.attach(model, method, example=x, trainable=())
    if isinstance(method, refold.BitFit):  # others draw their adapters' start
        assert torch.equal(torch.rand(3), expected)
    assert 1 <= len(model.batches) <= 2
    assert set(model.batches) == {1}
    assert {n: m.training for n, m in model.named_modules() if "refold" not in n} == modes
    after = {n: v for n, v in model.state_dict().items() if "refold" not in n}
    assert list(after) == list(before)
    assert all(torch.equal(v, before[n]) for n, v in after.items())
    refold.detach(model)
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_the_probes_of_a_merge_leave_nothing_behind_either(method):
    model = Counting().double().eval()
    refold.attach(model, method, example=rows(1), trainable=())
    perturb(refold.trainable_parameters(model), 0.2)
    buffers = {n: v.clone() for n, v in model.named_buffers()}
    model.batches.clear()
    refold.merge(model)
    assert len(model.batches) == 4  # two inputs, before and after
    assert set(model.batches) == {1}
    assert {n: v.tolist() for n, v in model.named_buffers()} == {n: v.tolist() for n, v in buffers.items()}


def test_the_inferred_example_is_a_batch_of_one():
    model = build("vit")
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    refold.attach(model, METHODS[0])
    handle.remove()
    assert seen == [1]
