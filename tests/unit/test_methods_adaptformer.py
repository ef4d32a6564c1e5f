"""AdaptFormer against its formula, its counts, and in every way a model is run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import refold
from by_hand import adapted, counted, large, numbers, vit
from reference import side
from refold.hosting import hosted
from zoo import build, images, perturb, relative

METHOD = refold.AdaptFormer(hidden=5, scale=0.7)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def beside(tensors, activation="relu", scale=0.7):
    """What is added to each sum, from the stream as it enters the branch."""

    def added(block: int, role: str, stream: np.ndarray, normed: np.ndarray) -> np.ndarray:
        t = tensors.get((block, role))
        return np.zeros_like(stream) if t is None else side.bottleneck(stream, t, activation, scale)

    return added


@pytest.mark.parametrize("layer_scale", [False, True], ids=["plain", "layer scale"])
@pytest.mark.parametrize(("sites", "activation"), [(None, "relu"), (("attention", "mlp"), "silu")])
def test_a_whole_vit_is_the_formula(sites, activation, layer_scale):
    """The layer scale is the branch's; what is beside it is added as it is."""
    method = refold.AdaptFormer(hidden=5, scale=0.7, sites=sites, activation=activation)
    model, x, tensors, by_hand = adapted(method, layer_scale=layer_scale)
    assert {role for _, role in tensors} == set(sites or ("mlp",))
    expected = by_hand(beside=beside(tensors, activation))
    assert not np.allclose(by_hand(), expected, rtol=1e-2)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (refold.AdaptFormer(), 156_768),
        (refold.AdaptFormer(hidden=64), 1_189_632),
        (refold.AdaptFormer(overrides=(("blocks.0.*", 3),)), 156_768 - 5 * (2 * 768 + 1)),
    ],
    ids=lambda value: value.describe() if isinstance(value, refold.Method) else "",
)
def test_parameters_on_vit_b16(method, expected):
    assert counted(large("vit_base_patch16_224", img_size=32), method) == expected


def test_parameters_on_swin_b_are_those_of_the_dense_benchmark():
    """Printed as 3.11M for width 64 beside attention and MLP."""
    model = large("swin_base_patch4_window7_224", img_size=64, window_size=2)
    assert counted(model, refold.AdaptFormer(hidden=64, sites=("attention", "mlp"))) == 3_107_328


def test_the_start_is_the_published_one():
    model = refold.attach(large("vit_base_patch16_224", img_size=32, depth=1), refold.AdaptFormer(hidden=64))
    adapter = next(iter(hosted(model).values()))["default"]
    bound = (6 / ((1 + 5) * 768)) ** 0.5  # Kaiming-uniform with a = sqrt 5
    assert 0.99 * bound < float(adapter.down.weight.detach().abs().max()) <= bound
    assert not any(bool(p.any()) for p in (adapter.down.bias, adapter.up.weight, adapter.up.bias))


def test_dropout_is_on_the_code_and_off_in_evaluation():
    model, x, tensors, _ = adapted(refold.AdaptFormer(hidden=5, scale=0.7, dropout=0.5), layer_scale=False)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))
    adapter = model.get_submodule("blocks.0.drop_path2.refold.default")
    assert {name: v.shape for name, v in numbers(adapter).items()} == {n: v.shape for n, v in tensors[0, "mlp"].items()}


def test_stochastic_depth_of_the_backbone_does_not_drop_it():
    """As released: the branch alone is dropped. Here those of the second block always are."""
    method = refold.AdaptFormer(hidden=5, scale=0.7, dropout=0.0)
    model, x, tensors, by_hand = adapted(method, layer_scale=True, drop_path_rate=1.0)
    expected = by_hand(behind=lambda block, role, z: z * (block == 0), beside=beside(tensors))
    np.testing.assert_allclose(model.train()(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


class Unread(nn.Module):
    """The first branch reads the stream by an operation, the second by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        x = x + self.first(x.tanh())
        return self.head(x + self.second(x))


def test_a_branch_whose_stream_cannot_be_read_is_left_out_and_refused_if_named():
    model, x = Unread(), torch.randn(2, 3, 4)
    with pytest.raises(refold.SiteError, match="first: no module reads the residual stream here"):
        refold.attach(model, refold.AdaptFormer(sites="first"), example=x)
    with pytest.raises(refold.SiteError, match="first: no module reads the residual stream here"):
        refold.attach(model, refold.AdaptFormer(), example=x, strict=True)
    refold.attach(model, refold.AdaptFormer(), example=x)
    rows = {row.path: row.reason for row in refold.explain(model).rows if row.slot != "head"}
    assert list(rows) == ["second", "first"]
    assert rows["first"] == "left out: no module reads the residual stream here"


# -- ways to run ----------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x).float().square().sum().backward()
    return {n: p.grad.clone() for n, p in refold.trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_blocks_change_nothing(reentrant):
    model, x, *_ = adapted(METHOD, layer_scale=True)
    expected, output = gradients(model, x), model(x).detach()
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, *args, forward=forward, **kwargs: checkpoint(
            forward, x, *args, use_reentrant=reentrant, **kwargs
        )
    found = gradients(model, x.requires_grad_())
    torch.testing.assert_close(model(x).detach(), output, rtol=0, atol=0)
    assert found.keys() == expected.keys() == refold.trainable_parameters(model).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["autocast", "model in bfloat16"])
def test_in_bfloat16_it_computes_there_and_trains_in_float32(how):
    torch.manual_seed(0)
    model = build("vit_with_layer_scale", torch.bfloat16 if how != "autocast" else torch.float32)
    refold.attach(model, METHOD)
    perturb(refold.trainable_parameters(model), 0.3)
    x = images(model)
    hosts = {path: slot["default"] for path, slot in hosted(model).items()}
    kinds: set[torch.dtype] = set()
    for adapter in hosts.values():
        assert all(p.dtype == torch.float32 for p in adapter.parameters())
        adapter.up.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        low = model(x)
        low.float().square().sum().backward()
    assert kinds == {torch.bfloat16}
    trained = [p for adapter in hosts.values() for p in adapter.parameters()]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in trained)
    exact = model.double()(x.double()).detach()
    assert relative(low, exact) < 3e-2


def test_compiled_it_is_the_same_without_a_graph_break(fresh_compiler):
    model, x, *_ = adapted(METHOD, layer_scale=True)
    expected, trained = model(x).detach(), gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(compiled, x).items():
        torch.testing.assert_close(gradient, trained[name.removeprefix("_orig_mod.")], rtol=1e-10, atol=1e-10)


def test_exported_it_takes_any_batch():
    model, x, *_ = adapted(METHOD, layer_scale=True)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.cat((x, x, -x))
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-12, atol=1e-12)


def test_a_file_carries_it_bit_for_bit_and_it_does_not_merge(tmp_path):
    model, x, *_ = adapted(METHOD, layer_scale=True)
    other, _ = vit(layer_scale=True)
    refold.load(other, refold.save(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(other(x), model(x))
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)


@pytest.mark.parametrize(
    "wrong", [{"hidden": 0}, {"scale": 0.0}, {"dropout": -0.1}, {"activation": "swish"}, {"sites": ("",)}]
)
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(refold.SiteError, match=f"AdaptFormer: {next(iter(wrong))}="):
        refold.AdaptFormer(**wrong)
