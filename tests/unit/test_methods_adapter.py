"""Adapter: every variant against its formula, its start, its counts, and exact merging without an activation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refold
from by_hand import adapted, counted, large, numbers
from reference import side
from refold.adapters import LinearBottleneck
from refold.adapters.nonlinear import Bottleneck
from refold.adapters.side import Layout
from refold.hosting import hosted
from refold.methods import method_from_json
from refold.survey import Survey
from zoo import build, images, perturb, relative

ACTIVATION = {"pfeiffer": "relu", "houlsby": "gelu", "noah": "quick_gelu", "adapter+": "gelu"}
PLACES = {
    "pfeiffer": {(0, "mlp"), (1, "mlp")},
    "houlsby": {(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")},
    "noah": {(0, "mlp"), (1, "mlp")},
    "adapter+": {(0, "mlp"), (1, "mlp")},
}


def only(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(f"{path}.refold.default")


def test_the_method_and_the_base_of_adapters_are_two_things():
    assert issubclass(refold.Adapter, refold.Method)
    assert issubclass(refold.adapters.Adapter, nn.Module)
    assert refold.METHODS["Adapter"] is refold.Adapter


@pytest.mark.parametrize("layer_scale", [False, True], ids=["plain", "layer scale"])
@pytest.mark.parametrize("activation", [None, "tanh", "identity"])
@pytest.mark.parametrize("variant", ACTIVATION)
def test_a_whole_vit_is_the_formula(variant, activation, layer_scale):
    method = refold.Adapter(variant=variant, hidden=5, activation=activation)
    model, x, tensors, by_hand = adapted(method, layer_scale=layer_scale)
    assert set(tensors) == PLACES[variant]
    act = activation or ACTIVATION[variant]

    def behind(block: int, role: str, z: np.ndarray) -> np.ndarray:
        t = tensors.get((block, role))
        if t is None or variant == "adapter+":
            return z
        if "down_bias" in t:  # what merges is kept as matrices
            t = {"down.weight": t["down"], "down.bias": t["down_bias"], "up.weight": t["up"], "up.bias": t["up_bias"]}
        return z + side.bottleneck(z, t, act)

    def after(block: int, role: str, stream: np.ndarray) -> np.ndarray:
        t = tensors.get((block, role))
        if t is None or variant != "adapter+":
            return np.zeros_like(stream)
        return side.bottleneck(stream, t, act, scale=t["gamma"])

    expected = by_hand(behind=behind, after=after)
    assert relative(torch.from_numpy(by_hand()), torch.from_numpy(expected)) > 1e-2
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)
    if method.mergeable:
        refold.merge(model)
        np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (refold.Adapter(), 156_768),
        (refold.Adapter(variant="noah"), 156_768),
        (refold.Adapter(activation="identity"), 156_768),
        (refold.Adapter(variant="houlsby"), 313_536),
        (refold.Adapter(variant="adapter+"), 165_984),
        (refold.Adapter(variant="adapter+", hidden=16), 313_536),
        (refold.Adapter(hidden=96), 12 * (2 * 768 * 96 + 96 + 768)),
    ],
    ids=lambda value: value.describe() if isinstance(value, refold.Method) else "",
)
def test_parameters_on_vit_b16(method, expected):
    assert counted(large("vit_base_patch16_224", img_size=32), method) == expected


def test_parameters_on_swin_b_are_those_of_the_dense_benchmark():
    """Printed as 3.11M for width 64 behind attention and MLP."""
    model = large("swin_base_patch4_window7_224", img_size=64, window_size=2)
    blocks = {128: 2, 256: 2, 512: 18, 1024: 2}
    expected = sum(2 * count * (2 * width * 64 + 64 + width) for width, count in blocks.items())
    assert expected == 3_107_328
    assert counted(model, refold.Adapter(variant="houlsby", hidden=64)) == expected


# -- the start ----------------------------------------------------------------------------------------------------


def weights(adapter: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if isinstance(adapter, LinearBottleneck):
        return adapter.down, adapter.up, adapter.down_bias, adapter.up_bias
    return adapter.down.weight, adapter.up.weight, adapter.down.bias, adapter.up.bias


@pytest.mark.parametrize("activation", [None, "identity"])
@pytest.mark.parametrize("variant", ACTIVATION)
def test_the_start_is_the_published_one(variant, activation):
    model = large("vit_base_patch16_224", img_size=32, depth=1)
    refold.attach(model, refold.Adapter(variant=variant, hidden=64, activation=activation))
    adapter = next(iter(hosted(model).values()))["default"]
    down, up, *biases = (w.detach() for w in weights(adapter))
    for weight in (down, up):
        if variant == "noah":
            bound = math.sqrt(6 / (768 + 64))
            assert 0.99 * bound < float(weight.abs().max()) <= bound
            assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        else:  # a normal cut off at two standard deviations, of which 0.88 is left
            assert 0.0195 < float(weight.abs().max()) <= 0.02
            assert float(weight.std()) == pytest.approx(0.0088, rel=0.03)
    for bias in biases:
        assert float(bias.std()) == (pytest.approx(1e-6, rel=0.3) if variant == "noah" else 0.0)
    if variant == "adapter+":
        assert torch.equal(adapter.gamma, torch.ones(768))


@pytest.mark.parametrize("variant", ACTIVATION)
def test_every_tensor_has_a_gradient_at_once(variant):
    """VPT's start, with both projections at zero, would leave all but the last bias without one."""
    model, x, *_ = adapted(refold.Adapter(variant=variant), layer_scale=True, size=0.0)
    model(x).square().sum().backward()
    trained = refold.trainable_parameters(model)
    assert len(trained) == 2 + len(PLACES[variant]) * (5 if variant == "adapter+" else 4)
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained.values())


# -- training and evaluation --------------------------------------------------------------------------------------


def test_adapter_plus_drops_whole_samples_in_training_alone():
    adapter = Bottleneck(8, 4, drop_path=0.4, init=0.5).double()
    x = torch.randn(4000, 3, 8, dtype=torch.float64)
    kept = adapter.eval()(x, Layout(-1))
    dropped = adapter.train()(x, Layout(-1))
    gone = (dropped == 0).all(dim=(1, 2))
    assert float(gone.double().mean()) == pytest.approx(0.4, abs=0.03)
    torch.testing.assert_close(dropped[~gone], kept[~gone] / 0.6)
    assert refold.Adapter(variant="adapter+").build(_site(), None, None).drop_path == 0.1
    assert refold.Adapter(variant="adapter+", dropout=0.3).build(_site(), None, None).drop_path == 0.3
    assert refold.Adapter(variant="noah", dropout=0.3).build(_site(), None, None).drop_path == 0.0


def _site() -> object:
    model = build("vit")
    return refold.Adapter(variant="adapter+").plan(Survey(model, images(model), head=("head",))).sites[0]


@pytest.mark.parametrize("activation", [None, "identity"])
def test_dropout_is_off_in_evaluation(activation):
    model, x, *_ = adapted(refold.Adapter(dropout=0.5, activation=activation), layer_scale=False)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_stochastic_depth_of_the_backbone_does_not_drop_adapter_plus():
    """The paper trains with both. Here the second block's branches are always dropped."""
    method = refold.Adapter(variant="adapter+", dropout=0.0)
    model, x, tensors, by_hand = adapted(method, layer_scale=True, drop_path_rate=1.0)

    def after(block: int, role: str, stream: np.ndarray) -> np.ndarray:
        t = tensors.get((block, role))
        return np.zeros_like(stream) if t is None else side.bottleneck(stream, t, "gelu", t["gamma"])

    expected = by_hand(behind=lambda block, role, z: z * (block == 0), after=after)
    np.testing.assert_allclose(model.train()(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


# -- merging ------------------------------------------------------------------------------------------------------

WITH_BRANCHES = [
    "vit_with_layer_scale",
    "vit_without_qkv_bias",
    "swin",
    "open_clip_tower",
    "torchvision_vit",
    "timm_test_vit3",
    "convnext",
    "convnext_conv_mlp",
    "resnet",
]


@pytest.mark.parametrize("family", WITH_BRANCHES)
def test_without_activation_it_merges_behind_attention_and_mlp(family):
    model = refold.attach(build(family, torch.float64), refold.Adapter(variant="houlsby", activation="identity"))
    perturb(refold.trainable_parameters(model), 0.1)
    rows = [row for row in refold.explain(model).rows if row.slot == "output"]
    assert rows
    assert all(row.mergeable for row in rows)
    x = images(model)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) <= 1e-12


@pytest.mark.parametrize("family", ["efficientnet", "byobnet", "resnet", "convnext_conv_mlp", "swin"])
def test_without_activation_it_merges_behind_any_ungrouped_layer(family):
    """Convolutions with a BatchNorm behind them among them: it takes the constant."""
    model = build(family, torch.float64)
    survey = Survey(model, images(model), head=refold.attachment.head_paths(model))
    paths = tuple(p for p, la in survey.layers.items() if la.operator.folds_input and la.operator.groups == 1)
    refold.attach(model, refold.Adapter(sites=paths, activation="identity", hidden=3))
    perturb(refold.trainable_parameters(model), 0.05)
    rows = [row for row in refold.explain(model).rows if row.slot == "output"]
    assert {row.path for row in rows} == set(paths)
    if family in ("efficientnet", "byobnet", "resnet"):
        assert any(row.shift.startswith("BatchNorm ") for row in rows)
    x = images(model)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) <= 1e-12


@pytest.mark.parametrize("variant", [*ACTIVATION, "adapter+ without activation"])
def test_what_does_not_fold_is_not_merged(variant):
    name, _, without = variant.partition(" without ")
    method = refold.Adapter(variant=name, activation="identity" if without else None)
    model, x, *_ = adapted(method, layer_scale=False)
    before = model(x)
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)
    assert torch.equal(model(x), before)
    assert not any(row.mergeable for row in refold.explain(model).rows if row.role)


# -- places that are hard to reach ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["open_clip_tower", "torchvision_vit"])
def test_behind_torch_attention_with_an_activation(family):
    """Its output projection is no call of its own; the module's first result is what that gives."""
    model = build(family, torch.float64)
    attention = next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    seen: list[Tensor] = []
    refold.attach(model, refold.Adapter(variant="houlsby"))
    perturb(refold.trainable_parameters(model), 0.3)
    attention.register_forward_hook(lambda module, args, output: seen.append(output[0].detach()))
    x = images(model)
    with torch.no_grad():
        model(x)
        with refold.disabled(model):
            model(x)
    adapted_output, z = seen
    added = side.bottleneck(z.numpy(), numbers(attention.get_submodule("refold.default")), "gelu")
    np.testing.assert_allclose(adapted_output.numpy(), z.numpy() + added, rtol=1e-12, atol=1e-12)


def test_behind_the_first_projection_of_torch_attention_it_needs_no_activation():
    """Behind that module is behind its output projection, another place."""
    with pytest.raises(refold.SiteError, match=r"resblocks.0.attn: .* multiplies with its weight inside"):
        refold.attach(build("open_clip_tower"), refold.Adapter(sites="*.attn"))
    model = build("open_clip_tower", torch.float64)
    refold.attach(model, refold.Adapter(sites="*.attn", activation="identity"))
    perturb(refold.trainable_parameters(model), 0.1)
    x = images(model)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) <= 1e-12


class Reads(nn.Module):
    """A block whose branch multiplies with a weight of a child that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.Module()
        self.inner.proj = nn.Linear(8, 8)
        self.branch = Multiplies(self.inner)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.branch(self.norm(x)))


class Multiplies(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.inner.proj.weight, self.inner.proj.bias))


def test_a_weight_that_another_module_reads_takes_the_fold_and_no_activation():
    torch.manual_seed(0)
    model, x = Reads().double(), torch.randn(2, 4, 8, dtype=torch.float64)
    del model.inner  # one path to the layer
    with pytest.raises(
        refold.SiteError, match=r"branch.inner.proj: branch multiplies with its weight inside, .*identity"
    ):
        refold.attach(model, refold.Adapter(), example=x)
    refold.attach(model, refold.Adapter(activation="identity", dropout=0.2), example=x)
    assert "no dropout" in refold.explain(model).rows[0].reason
    perturb(refold.trainable_parameters(model), 0.3)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) <= 1e-12


def test_behind_a_grouped_convolution():
    model = build("efficientnet", torch.float64)
    path = next(p for p, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    with pytest.raises(refold.SiteError, match=rf"{path}: a map of all channels behind a convolution of \d+ groups"):
        refold.attach(model, refold.Adapter(sites=path, activation="identity"))
    refold.attach(model, refold.Adapter(sites=path))
    perturb(refold.trainable_parameters(model), 0.3)
    seen: list[Tensor] = []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    with torch.no_grad():
        model(images(model))
        with refold.disabled(model):
            model(images(model))
    z = seen[1].permute(0, 2, 3, 1).numpy()
    expected = z + side.bottleneck(z, numbers(only(model, path)), "relu")
    np.testing.assert_allclose(seen[0].permute(0, 2, 3, 1).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_roles_paths_and_sizes_of_single_places():
    method = refold.Adapter(sites=("attention", "blocks.1.mlp.fc1"), hidden=3, overrides=(("blocks.1.*", 7),))
    model = refold.attach(build("vit"), method)
    found = {row.path: row.parameters for row in refold.explain(model).rows if row.slot == "output"}
    assert found == {
        "blocks.0.attn.proj": 2 * 32 * 3 + 3 + 32,
        "blocks.1.attn.proj": 2 * 32 * 7 + 7 + 32,
        "blocks.1.mlp.fc1": 2 * 128 * 7 + 7 + 128,
    }
    assert method_from_json({**method.to_json(), "overrides": [["blocks.1.*", 7]]}) == method
    with pytest.raises(refold.SiteError, match=r"blocks\.9: none of the adapted layers"):
        refold.attach(build("vit"), refold.Adapter(overrides=(("blocks.9", 3),)))
    with pytest.raises(refold.SiteError, match=r"mlp\.fc9: no layer has this path"):
        refold.attach(build("vit"), refold.Adapter(sites="mlp.fc9"))


@pytest.mark.parametrize("variant", ACTIVATION)
def test_a_file_carries_it_bit_for_bit(variant, tmp_path):
    model = refold.attach(build("vit_with_layer_scale"), refold.Adapter(variant=variant, hidden=3))
    perturb(refold.trainable_parameters(model), 0.3)
    path = refold.save(model, tmp_path / "adapter.safetensors")
    other = refold.load(build("vit_with_layer_scale"), path)
    x = images(model)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "pre"},
        {"hidden": 0},
        {"activation": "softmax"},
        {"dropout": 1.0},
        {"dropout": True},
        {"sites": ()},
        {"overrides": (("a", 0),)},
    ],
)
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(refold.SiteError, match=f"Adapter: {next(iter(wrong))}="):
        refold.Adapter(**wrong)
