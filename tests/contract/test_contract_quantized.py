"""Quantized backbones: adapters train beside their weights; merging refuses, or dequantizes what it folds into."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refold
from refold.maps import is_quantized, to_dense
from zoo import build, images, perturb, relative

METHODS = [
    refold.RepAdapter(rank=4, scale=0.7, dropout=0.0),
    refold.LoRA(rank=3),
    refold.DoRA(rank=3),
    refold.SSF(),
    refold.OFT(block=4),
]


@pytest.fixture(params=METHODS, ids=lambda m: type(m).__name__)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return request.param


@pytest.fixture(scope="module")
def torchao() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization")


def quantized(torchao: Any, family: str = "vit", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A member of the family whose Linear layers outside the head hold int8 weights."""
    model = build(family, dtype)
    inside = {path for path, m in model.named_modules() if isinstance(m, nn.Linear) and not path.startswith("head")}
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, path: path in inside)
    return model


def trained(model: nn.Module, method: refold.Method) -> nn.Module:
    refold.attach(model, method)
    perturb(refold.trainable_parameters(model))
    return model


def parts(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model's state, quantized ones by what they are made of."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if is_quantized(value):
            found |= {f"{name}.{inner}": getattr(value, inner) for inner in value.__tensor_flatten__()[0]}
        else:
            found[name] = value
    return {name: value.clone() for name, value in found.items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[n], v) for n, v in wanted.items())


def floating(model: nn.Module) -> nn.Module:
    """A copy with the same numbers in ordinary weights."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        for name, value in list(module._parameters.items()):
            if value is not None and is_quantized(value):
                module._parameters[name] = nn.Parameter(to_dense(value).clone())
    return twin


def test_adapters_train_beside_quantized_weights(torchao, method):
    model = quantized(torchao)
    before = parts(model)
    refold.attach(model, method)
    adapted = {row.path: row for row in refold.explain(model).rows if row.slot in ("input", "weight", "output")}
    assert {"blocks.0.attn.qkv", "blocks.1.attn.qkv"} <= adapted.keys()
    model.train()
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=1e-2))
    x, losses = images(model, count=4), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapters = [p for n, p in refold.trainable_parameters(model).items() if "refold" in n]
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapters)
    refold.detach(model)
    assert_same(parts(model), before)


def test_the_adapted_output_is_that_of_the_same_numbers_in_floating_point(torchao, method):
    """The same adapter on ordinary weights that hold what the quantized ones stand for."""
    model = trained(quantized(torchao), method)
    x = images(model)
    with torch.no_grad():
        assert relative(model(x), floating(model)(x)) < 1e-5


def test_merging_refuses_and_changes_nothing(torchao, method):
    model = trained(quantized(torchao), method)
    before, x = parts(model), images(model)
    expected = model(x).detach()
    with pytest.raises(refold.MergeError, match=r"blocks.0.*weight: its weight is quantized.*dequantize=True"):
        refold.merge(model)
    assert_same(parts(model), before)
    assert torch.equal(model(x), expected)


def test_merging_dequantizes_on_request_and_says_what_it_costs(torchao, method):
    model = trained(quantized(torchao), method)
    before, x = parts(model), images(model)
    unmerged = model(x).detach()
    sites = {row.path for row in refold.explain(model).rows if row.slot in ("input", "weight", "output")}
    linear = [p for p, m in model.named_modules() if p in sites and isinstance(m, nn.Linear)]

    report = refold.merge(model, dequantize=True)
    assert set(report.dequantized) == {f"{path}.weight" for path in linear}
    assert report.checked
    assert 0.0 < report.loss < 1e-5
    assert relative(model(x), unmerged) < 1e-5
    grown = sum(model.get_submodule(path).weight.nbytes for path in linear)
    assert report.extra_bytes == grown - sum(before[n].nbytes for n in before if n.startswith(report.dequantized))
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.startswith("head"):
            assert is_quantized(module.weight) == (path not in linear)

    refold.unmerge(model)
    assert_same(parts(model), before)
    assert torch.equal(model(x), unmerged)
    refold.merge(model, dequantize=True)
    refold.detach(model)
    assert_same(parts(model), parts(quantized(torchao)))


def test_a_failed_check_puts_the_quantized_weights_back(torchao, monkeypatch):
    model = trained(quantized(torchao), METHODS[0])
    before, x = parts(model), images(model)
    expected = model(x).detach()
    monkeypatch.setitem(refold.merging.LIMITS, torch.float32, 0.0)
    with pytest.raises(refold.MergeError, match="the merge was undone"):
        refold.merge(model, dequantize=True)
    assert_same(parts(model), before)
    assert torch.equal(model(x), expected)


def test_without_its_base_a_dequantized_merge_is_for_good(torchao):
    model = trained(quantized(torchao), METHODS[0])
    x = images(model)
    unmerged = model(x).detach()
    refold.merge(model, dequantize=True, keep_base=False)
    assert relative(model(x), unmerged) < 1e-5
    with pytest.raises(refold.MergeError, match="the base weights were not kept"):
        refold.unmerge(model)


def test_switching_between_tasks_from_quantized_weights(torchao):
    model = quantized(torchao)
    x, outputs = images(model), {}
    for name, one in (("first", METHODS[0]), ("second", METHODS[1])):
        refold.attach(model, one, name=name)
        perturb(refold.trainable_parameters(model))
        outputs[name] = model(x).detach()
    refold.merge(model, dequantize=True)
    for name in ("first", "second", "first"):
        refold.switch(model, name)
        assert relative(model(x), outputs[name]) < 1e-5
    refold.detach(model)
    assert_same(parts(model), parts(quantized(torchao)))


def test_bfloat16(torchao, method):
    model = trained(quantized(torchao, dtype=torch.bfloat16), method)
    before, x = parts(model), images(model)
    with torch.no_grad():
        unmerged = model(x)
        with refold.disabled(model):
            effect = relative(model(x), unmerged)
        report = refold.merge(model, dequantize=True)
        assert report.rel_l2 <= 1e-5  # the fold, proven on a float32 copy
        assert 0.0 <= report.loss < 0.3 * effect
        assert relative(model(x), unmerged) < 0.3 * effect
    refold.unmerge(model)
    assert_same(parts(model), before)


def test_files_and_copies(torchao, method, tmp_path):
    model = trained(quantized(torchao), method)
    x = images(model)
    expected = model(x).detach()
    assert torch.equal(copy.deepcopy(model)(x), expected)
    path = refold.save(model, tmp_path / "adapter.safetensors")
    other = refold.load(quantized(torchao), path)
    assert torch.equal(other(x), expected)
    refold.merge(model, dequantize=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    refold.unmerge(twin)
    assert torch.equal(twin(x), expected)


def test_a_quantized_weight_that_another_module_reads_is_left_out(torchao):
    class Bypassing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(x, self.body.weight, self.body.bias))

    model, x = Bypassing(), torch.randn(2, 16)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    for method in METHODS[:2]:
        with pytest.raises(refold.SiteError, match="body: another module reads its quantized weight itself"):
            refold.attach(model, type(method)(sites="body"), example=x, trainable=())
    refold.attach(model, METHODS[0], example=x, trainable=())
    assert [row.path for row in refold.explain(model).rows if row.slot == "input"] == ["last"]


# -- bitsandbytes, by what its classes look like -------------------------------------------------------------------


def stand_in(bits: int) -> type[nn.Linear]:
    """A Linear built as bitsandbytes builds them: class paths, integer storage, a forward of its own.

    The package has kernels for GPUs only and is not needed here: what refold knows of it are its classes' names.
    """
    name = {8: "Int8Params", 4: "Params4bit"}[bits]
    parameter = type(name, (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})

    class Stored(nn.Linear):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__(inside, outside)
            step = float(self.weight.detach().abs().max()) / (7 if bits == 4 else 127)
            levels = (self.weight.detach() / step).round().to(torch.int8)
            packed = levels.reshape(-1, 1) if bits == 4 else levels
            self.weight = parameter(packed, requires_grad=False)
            self.step = step

        def forward(self, x: Tensor) -> Tensor:
            levels = self.weight.detach().reshape(self.out_features, self.in_features)
            return F.linear(x, self.step * levels.to(x.dtype), self.bias)

    return Stored


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3]], ids=lambda m: type(m).__name__)
def test_bitsandbytes_trains_beside_and_never_merges(method, bits):
    layer = stand_in(bits)
    model, x = nn.Sequential(layer(8, 16), nn.GELU(), layer(16, 8)), torch.randn(4, 8)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    plain = model(x).detach()
    refold.attach(model, method, example=x, trainable=())
    assert len([row for row in refold.explain(model).rows if row.slot != "-"]) == 2
    perturb(refold.trainable_parameters(model), 0.2)
    model(x).pow(2).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in refold.trainable_parameters(model).values())
    adapted = model(x).detach()
    assert relative(adapted, plain) > 1e-2
    with pytest.raises(refold.MergeError, match=r"0.weight: its weight is quantized"):
        refold.merge(model)
    with pytest.raises(refold.MergeError, match=r"0.weight: the values of a .* cannot be read.*without quantization"):
        refold.merge(model, dequantize=True)
    assert torch.equal(model(x), adapted)
    refold.detach(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(model(x), plain)
