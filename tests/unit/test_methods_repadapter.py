"""RepAdapter's other places, and an activation in it: the formula, the counts, and what folds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import refold
from by_hand import adapted, counted, large
from reference import formulas, side
from zoo import FAMILIES, build, images, perturb, relative

POSITIONS = ("before", "after", "parallel")
SCALE = 0.7
PLACES = {"before": ("attn.qkv", "mlp.fc1"), "after": ("attn.proj", "mlp.fc2"), "parallel": ("attn.qkv", "mlp.fc1")}


def written_out(t: dict[str, np.ndarray], groups: int) -> dict[str, np.ndarray]:
    """An adapter's tensors with the grouped projection as a matrix, by the names of linear layers."""
    if "down" in t:  # what folds is kept as matrices
        names = {"down": "down.weight", "down_bias": "down.bias", "up": "up.weight", "up_bias": "up.bias"}
        t = {names[name]: value for name, value in t.items()}
    return t | {"up.weight": formulas.block_diagonal(t["up.weight"], groups)}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("position", "activation"), [*itertools.product(POSITIONS, ("identity", "gelu", "relu"))])
def test_a_whole_vit_is_the_formula(position, activation, groups):
    method = refold.RepAdapter(
        rank=4, groups=groups, scale=SCALE, dropout=0.0, position=position, activation=activation
    )
    model, x, tensors, by_hand = adapted(method, layer_scale=True)
    assert set(tensors) == {(block, role) for block in (0, 1) for role in ("attention", "mlp")}
    full = {place: written_out(t, groups) for place, t in tensors.items()}

    def delta(block: int, role: str, features: np.ndarray) -> np.ndarray:
        return side.bottleneck(features, full[block, role], activation, SCALE)

    def mapped(block: int, role: str, features: np.ndarray) -> np.ndarray:
        return features + delta(block, role, features)

    hook = {"before": {"before": mapped}, "after": {"behind": mapped}, "parallel": {"along": delta}}[position]
    expected = by_hand(**hook)
    assert relative(torch.from_numpy(by_hand()), torch.from_numpy(expected)) > 1e-2
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)
    if activation != "identity":
        with pytest.raises(refold.MergeError, match="does not fold"):
            refold.merge(model)
        return
    refold.merge(model)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "block"),
    [
        (refold.RepAdapter(position="after"), 2 * (768 * 8 + 8 + 768 * 4 + 768)),
        (refold.RepAdapter(position="parallel"), 2 * (768 * 8 + 8) + (2304 + 3072) * (4 + 1)),
        (refold.RepAdapter(activation="gelu"), 2 * (768 * 8 + 8 + 768 * 4 + 768)),
        (refold.RepAdapter(groups=4, position="after", sites="mlp"), 768 * 8 + 8 + 768 * 2 + 768),
    ],
    ids=lambda value: value.describe() if isinstance(value, refold.Method) else "",
)
def test_parameters_on_vit_b16(method, block):
    assert counted(large("vit_base_patch16_224", img_size=32), method) == 12 * block


#: Where a place is missing: what the refusal says.
NOT_THERE = {
    **{(position, activation, family): "the forward has no residual branches"
       for position, activation in (("after", "identity"), ("after", "gelu"), ("before", "gelu"))
       for family in ("efficientnet", "byobnet")},
    **{("before", "gelu", family): "does not start with a norm"
       for family in ("convnext", "convnext_conv_mlp", "resnet", "swinv2")},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("position", "activation"), [*itertools.product(POSITIONS, ("identity", "gelu"))][1:])
def test_every_family_starts_as_it_is_trains_and_folds_or_refuses(position, activation, family, tmp_path):
    method = refold.RepAdapter(rank=4, scale=SCALE, dropout=0.0, position=position, activation=activation)
    model = build(family, torch.float64)
    x, missing = images(model), NOT_THERE.get((position, activation, family))
    before = model(x).detach()
    if missing is not None:
        with pytest.raises(refold.SiteError, match=missing):
            refold.attach(model, method)
        assert torch.equal(model(x), before)
        return
    refold.attach(model, method)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-13)
    perturb(refold.trainable_parameters(model), 0.05)
    adapted_output = model(x).detach()
    assert relative(adapted_output, before) > 1e-9
    other = build(family, torch.float64)
    refold.load(other, refold.save(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(other(x), adapted_output)
    if method.mergeable:
        refold.merge(model)
        assert relative(model(x), adapted_output) <= 1e-10


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 9, 3, padding=1), nn.Conv2d(6, 9, 3, stride=2, bias=False)], ids=str)
def test_beside_a_convolution_is_the_formula_and_folds(layer):
    """Down has the layer's kernel and geometry; without a bias of the layer there is no constant part."""
    torch.manual_seed(0)
    model, x = nn.Sequential(layer).double(), np.random.default_rng(0).normal(size=(2, 6, 7, 7))
    weight = layer.weight.detach().double().numpy().copy()
    bias = None if layer.bias is None else layer.bias.detach().double().numpy().copy()
    method = refold.RepAdapter(rank=6, groups=3, scale=SCALE, dropout=0.0, position="parallel")
    refold.attach(model, method, example=torch.from_numpy(x), trainable=())
    perturb(refold.trainable_parameters(model), 0.5)
    t = {
        name: value.detach().numpy().copy() for name, value in layer.get_submodule("refold.default").named_parameters()
    }
    up = formulas.block_diagonal(t["up"], 3)
    folded = formulas.lora(weight, t["down"], up, SCALE)
    if bias is not None:
        bias = bias + SCALE * (up @ t["down_bias"] + t["up_bias"])
    else:
        assert set(t) == {"down", "up"}
    expected = formulas.conv2d(x, folded, bias, padding=layer.padding[0], stride=layer.stride[0])
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-11, atol=1e-12)
    refold.merge(model)
    np.testing.assert_allclose(layer.weight.detach().numpy(), folded, rtol=1e-12, atol=1e-12)


def test_groups_follow_the_width_that_up_has():
    model, x = nn.Sequential(nn.Linear(6, 9)), torch.randn(2, 6)
    refold.attach(model, refold.RepAdapter(rank=4, position="parallel"), example=x, trainable=())
    assert "1 instead of 2 groups, which do not divide 9 channels" in refold.explain(model).rows[0].reason


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"position": "behind"}, "position='behind' is not valid.*before, after, parallel"),
        ({"activation": "softplus"}, "activation='softplus' is not valid"),
        ({"rank": 6, "groups": 4}, "groups=4 is not valid"),
        ({"scale": 0}, "scale=0 is not valid"),
    ],
)
def test_wrong_settings_are_refused(wrong, told):
    with pytest.raises(refold.SiteError, match=told):
        refold.RepAdapter(**wrong)


@pytest.mark.parametrize("options", [{"position": "parallel"}, {"activation": "gelu"}], ids=str)
def test_what_has_no_weighted_sum_is_not_combined(options):
    model = build("vit")
    for name in ("a", "b"):
        refold.attach(model, refold.RepAdapter(rank=4, **options), name=name)
    with pytest.raises(refold.SiteError, match="have no weighted sum here"):
        refold.combine(model, {"a": 0.5, "b": 0.5})


def test_adapters_after_a_projection_have_a_weighted_sum():
    """The sum of the changes of the weights, as elsewhere."""
    model = build("vit", torch.float64)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    changes = []
    for name in ("a", "b"):
        refold.attach(model, refold.RepAdapter(rank=4, dropout=0.0, position="after"), name=name)
        perturb({n: p for n, p in refold.trainable_parameters(model).items() if "refold" in n}, 0.1)
        refold.merge(model)
        changes.append({n: value - plain[n] for n, value in model.state_dict().items() if n in plain})
        refold.unmerge(model)
    refold.combine(model, {"a": 0.3, "b": -0.5}, head="a")
    refold.merge(model)
    for name, value in model.state_dict().items():
        if name in plain and not name.startswith("head"):
            expected = plain[name] + 0.3 * changes[0][name] - 0.5 * changes[1][name]
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


class Parallel(nn.Module):
    """Two residual branches behind one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.b = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return self.out((x + self.a(normed) + self.b(normed)).mean(1))


@pytest.mark.parametrize("sites", ["a.0", ("a.0", "b.0")])
def test_a_norm_that_two_branches_share_takes_no_adapter_with_an_activation(sites):
    """It would change the branch that nobody named, or two adapters would be one."""
    model, x = Parallel(), torch.randn(2, 5, 8)
    before = model(x)
    with pytest.raises(refold.SiteError, match="norm: another residual branch starts with this norm too"):
        refold.attach(model, refold.RepAdapter(rank=4, activation="gelu", sites=sites), example=x, trainable=())
    assert torch.equal(model(x), before)
    refold.attach(model, refold.RepAdapter(rank=4, sites=sites), example=x, trainable=())
