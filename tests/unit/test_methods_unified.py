"""The unified view: published methods are points of it, every point is its formula and folds where it is linear."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import refold
from by_hand import adapted, counted, large, numbers, vit
from reference import side
from refold.hosting import adapters_of
from refold.state import state_of
from zoo import build, images, perturb, relative

GRID = [
    {"position": position, "representation": representation, "composition": composition, "activation": activation}
    for position, representation, composition, activation in itertools.product(
        ("parallel", "sequential"), ("branch", "projection"), ("add", "gated"), ("relu", "identity")
    )
]


# -- the published points -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published", "point"),
    [
        (
            refold.AdaptFormer(hidden=5, scale=0.7, dropout=0.0),
            refold.Unified(hidden=5, scale=0.7, reads="stream"),
        ),
        (
            refold.AdaptFormer(hidden=5, scale=0.7, dropout=0.0, sites=("attention", "mlp"), activation="gelu"),
            refold.Unified(hidden=5, scale=0.7, reads="stream", sites=("attention", "mlp"), activation="gelu"),
        ),
        (refold.Adapter(hidden=5), refold.Unified(hidden=5, scale=1.0, position="sequential")),
        (
            refold.Adapter(hidden=5, variant="houlsby"),
            refold.Unified(hidden=5, scale=1.0, position="sequential", activation="gelu", sites=("attention", "mlp")),
        ),
        (
            refold.Adapter(hidden=5, activation="identity"),
            refold.Unified(hidden=5, scale=1.0, position="sequential", activation="identity"),
        ),
        (
            refold.LoRA(rank=5, scale=0.7),
            refold.Unified(hidden=5, scale=0.7, representation="projection", activation="identity"),
        ),
    ],
    ids=lambda method: method.describe(),
)
def test_a_published_method_is_a_point_of_it(published, point):
    """Tensor for tensor the same, in the same places, and with the same values in them the same model."""
    model, x = vit(layer_scale=True)
    refold.attach(model, published)
    trained = refold.trainable_parameters(model)
    perturb(trained, 0.3)
    expected, values = model(x).detach(), {n: p.detach().clone() for n, p in trained.items()}
    mergeable = published.mergeable
    refold.detach(model)
    refold.attach(model, point)
    trained = refold.trainable_parameters(model)
    assert {n: v.shape for n, v in values.items()} == {n: p.shape for n, p in trained.items()}
    with torch.no_grad():
        for name, value in values.items():
            trained[name].copy_(value)
    assert torch.equal(model(x), expected)
    assert point.mergeable == mergeable


def test_the_scaled_parallel_adapter_of_mam_is_the_formula():
    model, x, tensors, by_hand = adapted(refold.Unified(hidden=5), layer_scale=True)
    assert set(tensors) == {(0, "mlp"), (1, "mlp")}
    expected = by_hand(
        beside=lambda block, role, stream, n: (
            side.bottleneck(n, tensors[block, role], "relu", 4.0) if role == "mlp" else np.zeros_like(n)
        )
    )
    assert relative(torch.from_numpy(by_hand()), torch.from_numpy(expected)) > 1e-2
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


# -- what no published method of the shelf has --------------------------------------------------------------------


def gate(t: dict[str, np.ndarray]) -> float:
    assert t["gate"].shape == (1,)
    return float(t["gate"][0])


def test_gated_beside_a_branch_is_the_formula():
    """h is what the branch adds, layer scale included: (1 - g) h + g s (...)."""
    method = refold.Unified(hidden=5, scale=0.7, composition="gated", sites=("attention", "mlp"), activation="tanh")
    model, x, tensors, by_hand = adapted(method, layer_scale=True)
    expected = by_hand(
        behind=lambda block, role, z: (1 - gate(tensors[block, role])) * z,
        beside=lambda block, role, stream, n: side.bottleneck(
            n, tensors[block, role], "tanh", 0.7 * gate(tensors[block, role])
        ),
    )
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


def test_gated_behind_a_projection_is_the_formula():
    method = refold.Unified(hidden=5, scale=0.7, composition="gated", position="sequential")
    model, x, tensors, by_hand = adapted(method, layer_scale=True)

    def behind(block: int, role: str, z: np.ndarray) -> np.ndarray:
        if role == "attention":
            return z
        g = gate(tensors[block, role])
        return (1 - g) * z + side.bottleneck(z, tensors[block, role], "relu", 0.7 * g)

    np.testing.assert_allclose(model(x).detach().numpy(), by_hand(behind=behind), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("composition", ["add", "gated"])
@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(6, 10), (2, 4, 6)), (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 4, 5))], ids=str
)
def test_beside_a_projection_is_the_formula(layer, shape, composition):
    """From the channels it reads to those it gives."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    model, x = nn.Sequential(layer).double(), torch.randn(shape, dtype=torch.float64)
    method = refold.Unified(hidden=3, scale=0.7, representation="projection", composition=composition, sites="0")
    h = model(x).detach()
    refold.attach(model, method, example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.5)
    t = numbers(layer.get_submodule("refold.default"))
    first = 1 if isinstance(layer, nn.Conv2d) else -1
    added = np.moveaxis(side.bottleneck(np.moveaxis(x.numpy(), first, -1), t, "relu", 0.7), -1, first)
    g = gate(t) if composition == "gated" else None
    expected = h.numpy() + added if g is None else (1 - g) * h.numpy() + g * added
    np.testing.assert_allclose(model(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_reading_the_stream_is_not_reading_its_norm():
    outputs = []
    for reads in ("normed", "stream"):
        torch.manual_seed(0)
        model, x, *_ = adapted(refold.Unified(hidden=5, reads=reads), layer_scale=False)
        outputs.append(model(x))
    assert relative(*outputs) > 1e-3


# -- every point --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", GRID, ids=lambda choices: "-".join(choices.values()))
def test_every_point_starts_as_the_backbone_trains_and_folds_where_it_is_linear(choices, tmp_path):
    method = refold.Unified(hidden=16, scale=0.7, **choices)
    model, x = vit(layer_scale=True)
    before = model(x)
    refold.attach(model, method)
    assert torch.equal(model(x), before)
    trained, reached = refold.trainable_parameters(model), set()
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        reached |= {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    assert reached == set(trained)

    perturb(trained, 0.2)
    unmerged = model(x).detach()
    assert relative(unmerged, before) > 1e-3
    other, _ = vit(layer_scale=True)
    refold.load(other, refold.save(model, tmp_path / "adapter.safetensors"))
    assert torch.equal(other(x), unmerged)
    linear = choices["activation"] == "identity" and choices["composition"] == "add"
    assert method.mergeable == (
        linear and (choices["position"] == "sequential" or choices["representation"] == "projection")
    )
    if method.mergeable:
        refold.merge(model)
        assert relative(model(x), unmerged) <= 1e-12
    else:
        with pytest.raises(refold.MergeError, match="does not fold"):
            refold.merge(model)


@pytest.mark.parametrize("family", ["swin", "convnext", "resnet", "open_clip_tower", "torchvision_vit"])
@pytest.mark.parametrize("representation", ["branch", "projection"])
def test_behind_it_folds_on_other_backbones_too(representation, family):
    """Joint projections inside torch's attention among them: the weight itself is replaced there."""
    method = refold.Unified(position="sequential", representation=representation, activation="identity", scale=0.7)
    model = refold.attach(build(family, torch.float64), method)
    perturb(refold.trainable_parameters(model), 0.05)
    x = images(model)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) <= 1e-12


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (refold.Unified(), 156_768),
        (refold.Unified(hidden=512), 12 * (2 * 768 * 512 + 512 + 768)),
        (refold.Unified(sites=("attention", "mlp")), 313_536),
        (refold.Unified(composition="gated"), 156_768 + 12),
        (refold.Unified(representation="projection", activation="identity"), 294_912),
        (refold.Unified(representation="projection"), 12 * (8 * (768 + 2304) + 8 + 2304)),
    ],
    ids=lambda value: value.describe() if isinstance(value, refold.Method) else "",
)
def test_parameters_on_vit_b16(method, expected):
    assert counted(large("vit_base_patch16_224", img_size=32), method) == expected


def test_the_start_is_loras_and_a_gate_hides_two_random_projections():
    model = refold.attach(large("vit_base_patch16_224", img_size=32, depth=1), refold.Unified(hidden=64))
    (plain,) = adapters_of(model, state_of(model).record().sites, "default").values()
    bound = (6 / ((1 + 5) * 768)) ** 0.5
    assert 0.99 * bound < float(plain.down.weight.detach().abs().max()) <= bound
    assert not any(bool(p.any()) for p in (plain.up.weight, plain.up.bias, plain.down.bias))
    refold.attach(model, refold.Unified(hidden=64, composition="gated"), name="gated")
    (gated,) = adapters_of(model, state_of(model).record("gated").sites, "gated").values()
    assert not bool(gated.gate.any())
    assert float(gated.up.weight.detach().abs().max()) == pytest.approx((6 / ((1 + 5) * 64)) ** 0.5, rel=0.01)


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_projection_whose_input_is_out_of_reach_is_refused_with_an_activation():
    with pytest.raises(refold.SiteError, match=r"attn: its input and output cannot be reached.*identity"):
        refold.attach(build("open_clip_tower"), refold.Unified(representation="projection"))
    with pytest.raises(refold.SiteError, match=r"attn: .*attn multiplies with its weight inside.*identity"):
        refold.attach(build("open_clip_tower"), refold.Unified(representation="projection", position="sequential"))
    model = build("open_clip_tower", torch.float64)
    refold.attach(model, refold.Unified(representation="projection", activation="identity", dropout=0.1))
    perturb(refold.trainable_parameters(model), 0.1)
    unmerged = model(images(model)).detach()
    refold.merge(model)
    assert relative(model(images(model)), unmerged) <= 1e-12


def test_a_strided_convolution_has_no_bottleneck_beside_it():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2)), torch.randn(1, 3, 9, 9)
    with pytest.raises(refold.SiteError, match="0: its output has other positions than its input"):
        refold.attach(model, refold.Unified(representation="projection", sites="0"), example=x, trainable=())
    refold.attach(
        model, refold.Unified(representation="projection", sites="0", activation="identity"), example=x, trainable=()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"position": "before"},
        {"representation": "head"},
        {"reads": "output"},
        {"composition": "mul"},
        {"activation": "none"},
        {"hidden": -1},
        {"scale": 0},
        {"dropout": 1},
        {"sites": ""},
    ],
)
def test_wrong_hyper_parameters_are_refused(wrong):
    with pytest.raises(refold.SiteError, match=f"Unified: {next(iter(wrong))}="):
        refold.Unified(**wrong)
