"""Methods whose layers share parameters: one tensor, whatever is done to the model that holds it."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from torch import nn

import refold
from refold.hosting import hosted
from zoo import build, images, perturb, relative

METHODS = [
    refold.FacT(rank=4, form="tt", scale=0.7, dropout=0.0),
    refold.FacT(rank=4, form="tk", scale=0.7, dropout=0.0),
    refold.KAdaptation(rank=8, scale=10.0),
    refold.ARC(rank=4, dropout=0.0),
]


@pytest.fixture(params=METHODS, ids=lambda m: m.describe())
def method(request: pytest.FixtureRequest) -> refold.Method:
    return request.param


def trained(method: refold.Method, *names: str) -> nn.Module:
    """A small ViT with perturbed adapters of these names, the last one in use."""
    model = build("vit", torch.float64)
    for name in names or ("default",):
        refold.attach(model, method, name=name)
        perturb(refold.trainable_parameters(model), 0.1)
    return model


def users(model: nn.Module, name: str = "default") -> list[tuple[str, int]]:
    """Every use of a shared part, as (attribute, identity), over the model's adapters."""

    def parts(adapter: nn.Module) -> Iterator[tuple[str, int]]:
        for module in adapter.modules():
            yield from ((key, id(part)) for key, part in vars(module).items() if isinstance(part, nn.Module))

    return [part for slot in hosted(model).values() for part in parts(slot[name])]


def shared_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    ids = {identity for _, identity in users(model, name)}
    return {
        f"{path}.{leaf}": value
        for path, module in model.named_modules()
        if id(module) in ids
        for leaf, value in module.named_parameters()
    }


def test_each_shared_tensor_is_trained_counted_and_saved_once(method, tmp_path):
    model = trained(method)
    shared = shared_parameters(model)
    assert shared
    assert shared.keys() <= refold.trainable_parameters(model).keys()
    assert len({id(p) for p in refold.trainable_parameters(model).values()}) == len(refold.trainable_parameters(model))
    groups = refold.param_groups(model)
    assert sum(len(g["params"]) for g in groups) == len(refold.trainable_parameters(model))
    head = 32 * 3 + 3
    own = sum(p.numel() for p in refold.trainable_parameters(model).values()) - head
    assert refold.explain(model).adapter_parameters == own
    with safe_open(refold.save(model, tmp_path / "a.safetensors"), framework="pt") as file:
        stored = [k for k in file.keys() if k.startswith("adapter/")]  # noqa: SIM118 (not a dict)
        assert sum(file.get_tensor(k).numel() for k in stored) == own


def test_its_gradient_is_the_sum_over_its_layers(method):
    """By finite differences in float64, which see every use of the tensor."""
    model = trained(method)
    x = images(model)

    def loss() -> torch.Tensor:
        return model(x).square().sum()

    loss().backward()
    for parameter in shared_parameters(model).values():
        direction, step = torch.randn_like(parameter), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                values.append(loss())
                parameter.sub_(sign * step * direction)
        slope = float(values[0] - values[1]) / (2 * step)
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_copies_share_among_themselves_alone(method, merged):
    model = trained(method)
    before, x = users(model), images(model)
    expected = model(x).detach()
    if merged:
        refold.merge(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        if merged:
            refold.unmerge(other)
        found = users(other)
        assert [key for key, _ in found] == [key for key, _ in before]
        assert len({identity for _, identity in found}) == len({identity for _, identity in before})
        assert not {identity for _, identity in found} & {identity for _, identity in before}
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            for parameter in shared_parameters(other).values():
                parameter.mul_(2)
        assert relative(other(x), expected) > 1e-3
    if merged:
        refold.unmerge(model)
    assert users(model) == before
    assert torch.equal(model(x), expected)


def test_files_and_state_dicts_carry_it(method, tmp_path):
    model = trained(method)
    x = images(model)
    expected = model(x).detach()
    other = refold.load(build("vit", torch.float64), refold.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(other(x), expected)
    assert len(users(other)) == len(users(model))
    third = refold.attach(build("vit", torch.float64), method)
    third.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(third(x), expected)
    assert len({i for _, i in users(third)}) == len({i for _, i in users(model)})


def test_it_comes_back_from_a_merge_and_trains_on(method):
    model = trained(method)
    before, x = users(model), images(model)
    refold.merge(model)
    refold.unmerge(model)
    assert users(model) == before
    parameters = refold.trainable_parameters(model)
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=1e-2))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    optimizer.step()
    moved = model(x).detach()
    assert refold.merge(model).rel_l2 <= 1e-10
    assert relative(model(x), moved) <= 1e-10
    refold.detach(model)
    plain = build("vit", torch.float64).state_dict()
    assert all(torch.equal(v, plain[n]) for n, v in model.state_dict().items())


def test_two_adapters_do_not_share_with_each_other(method):
    model = trained(method, "a", "b")
    x = images(model)
    assert not {i for _, i in users(model, "a")} & {i for _, i in users(model, "b")}
    outputs = {}
    for name in ("a", "b"):
        refold.activate(model, name)
        outputs[name] = model(x).detach()
        for other in ("a", "b"):
            assert all(p.requires_grad == (other == name) for p in shared_parameters(model, other).values())
    assert relative(outputs["a"], outputs["b"]) > 1e-3
    refold.merge(model)
    for name in ("a", "b", "a"):
        refold.switch(model, name)
        assert relative(model(x), outputs[name]) <= 1e-10
    refold.unmerge(model)
    refold.activate(model, "b")
    assert torch.equal(model(x), outputs["b"])


@pytest.mark.parametrize("when", ["attached", "merged"])
def test_a_cast_reaches_it_wherever_it_is(method, when):
    model = trained(method)
    x = images(model)
    expected = model(x).detach()
    if when == "merged":
        refold.merge(model)
    model.to(torch.float32)
    assert relative(model(x.float()), expected) < 1e-5
    if when == "merged":
        refold.unmerge(model)
    assert relative(model(x.float()), expected) < 1e-5
    if when == "attached":
        assert {p.dtype for p in shared_parameters(model).values()} == {torch.float32}


def test_what_has_no_sum_and_no_counterpart_is_refused(method, tmp_path):
    model = trained(method, "a", "b")
    with pytest.raises(refold.SiteError, match=f"a weighted sum of {type(method).__name__} adapters is no"):
        refold.combine(model, {"a": 0.5, "b": 0.5})
    with pytest.raises(refold.StoreError, match=f"{type(method).__name__} has no counterpart in PEFT"):
        refold.save_peft(model, tmp_path / "peft")


def test_it_compiles(method):
    model = trained(method)
    x = images(model)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative(compiled(x), expected) < 1e-12
    torch.compiler.reset()
