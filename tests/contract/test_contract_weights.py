"""Every map of a weight, on every kind of layer and in every kind of owner: the formula, merged and unmerged."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import StdConv2d
from timm.models.beit import Beit
from torch import Tensor, nn

import refold
from reference.weight_maps import folded
from refold.adapters import WeightAdapter
from refold.hosting import hosted
from refold.state import state_of
from zoo import build, images, perturb, relative

METHODS = {
    "FacT": refold.FacT(rank=3, scale=-1.5, dropout=0.2),
    "FacT-TT": refold.FacT(rank=3, scale=-1.5, dropout=0.2, form="tt"),
    "Hydra": refold.Hydra(rank=3, scale=-1.5, dropout=0.2),
    "KronA": refold.KronA(scale=-1.5),
    "KAdaptation": refold.KAdaptation(rank=4, scale=-20.0),
    "RLRR": refold.RLRR(ssf=False),
    "GLoRA": refold.GLoRA(rank=2),
    "GLoRA-vectors": refold.GLoRA(a="vector", b="vector", c="vector", d="scalar", e="vector"),
    "GLoRA-scalars": refold.GLoRA(a="scalar", b="scalar", c="none", d="vector", e="scalar"),
    "PACE": refold.PACE(rank=3),
}
#: What cannot hold in the weight of a grouped convolution.
UNGROUPED = {"FacT", "FacT-TT", "Hydra"}

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(12, 36), (2, 5, 12)),
    (nn.Linear(48, 12, bias=False), (2, 48)),
    (nn.Linear(20, 12), (12, 20)),
    (nn.Conv2d(12, 30, 1), (2, 12, 4, 4)),
    (nn.Conv2d(20, 12, 3, dilation=2, padding=2, stride=2, padding_mode="reflect"), (2, 20, 6, 6)),
    (nn.Conv2d(12, 30, 3, padding=1), (2, 12, 5, 6)),
    (nn.Conv2d(12, 18, 3, padding=1, bias=False), (2, 12, 5, 6)),
    (nn.Conv1d(24, 12, 3, padding="same"), (24, 7)),
    (nn.Conv3d(12, 10, (1, 3, 3)), (1, 12, 2, 5, 5)),
    (nn.ConvTranspose2d(12, 20, 3, stride=2), (2, 12, 4, 4)),
]
GROUPED: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(12, 24, 3, groups=3), (2, 12, 6, 6)),
    (nn.Conv2d(12, 12, 3, groups=12, padding=1), (2, 12, 6, 6)),
    (nn.ConvTranspose1d(12, 24, 3, groups=2), (2, 12, 7)),
]


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def numbers(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().double().numpy().copy()


def canonical(layer: nn.Module, weight: np.ndarray) -> np.ndarray:
    """(out, in / groups, *kernel), and back: exchanging two axes within each group is its own inverse."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return weight
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return grouped.swapaxes(1, 2).reshape(-1, grouped.shape[1], *weight.shape[2:])


def expected_of(model: nn.Module) -> dict[str, np.ndarray]:
    """Every folded tensor by the formulas, from the attached model."""
    slots, found = hosted(model), {}
    for site in state_of(model).record().sites:
        layer, adapter = model.get_submodule(site.path), slots[site.path]["default"]
        leaves = ("in_proj_weight", "in_proj_bias") if isinstance(layer, nn.MultiheadAttention) else ("weight", "bias")
        weight, bias = (numbers(layer._parameters.get(leaf)) for leaf in leaves)
        moved, shift = folded(adapter, canonical(layer, weight), bias)
        found[f"{site.path}.{leaves[0]}"] = canonical(layer, moved)
        if shift is not None:
            found[f"{site.path}.{leaves[1]}"] = shift
    return found


def assert_formula(model: nn.Module, plain: nn.Module, inputs: Any, rounding: float = 1e-12) -> None:
    """Merged tensors and unmerged outputs are those of the plain model with the formulas' tensors; and back again."""
    expected = expected_of(model)
    call = (lambda m: m(**inputs)) if isinstance(inputs, dict) else (lambda m: m(inputs))
    unmerged = call(model.eval())
    unmerged = unmerged if isinstance(unmerged, Tensor) else unmerged[0]
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with torch.no_grad():
        untouched = call(plain.eval())
        untouched = untouched if isinstance(untouched, Tensor) else untouched[0]
        assert relative(unmerged, untouched) > 1e-3
        for key, value in expected.items():
            path, _, leaf = key.rpartition(".")
            module = plain.get_submodule(path)
            if module._parameters[leaf] is None:
                module.register_parameter(leaf, nn.Parameter(torch.zeros(value.shape, dtype=torch.float64)))
            module._parameters[leaf].copy_(torch.from_numpy(value))
        wanted = call(plain)
        wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
    assert relative(unmerged, wanted) < rounding
    refold.merge(model)
    state = model.state_dict()
    assert set(state) == set(plain.state_dict())
    for key, value in expected.items():
        np.testing.assert_allclose(state[key].numpy(), value, rtol=1e-11, atol=1e-12)
    refold.unmerge(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def attached(model: nn.Module, method: refold.Method, size: float = 0.2, **options: Any) -> nn.Module:
    refold.attach(model, method, **options)
    perturb(refold.trainable_parameters(model), size)
    return model


def with_sites(name: str, sites: str | tuple[str, ...]) -> refold.Method:
    return type(METHODS[name]).from_json({**METHODS[name].to_json(), "sites": sites})


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_on_every_kind_of_layer(name, layer, shape):
    plain, x = nn.Sequential(copy.deepcopy(layer)).double(), torch.randn(shape).double()
    model = attached(copy.deepcopy(plain), with_sites(name, "0"), example=x, trainable=())
    assert_formula(model, plain, x)


@pytest.mark.parametrize(("layer", "shape"), GROUPED, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_grouped_convolutions_stay_grouped_or_are_refused(name, layer, shape):
    plain, x = nn.Sequential(copy.deepcopy(layer)).double(), torch.randn(shape).double()
    model = copy.deepcopy(plain)
    if name in UNGROUPED:
        with pytest.raises(refold.SiteError, match=f"0: .*which a convolution of {layer.groups} groups cannot hold"):
            refold.attach(model, with_sites(name, "0"), example=x, trainable=())
        assert not hosted(model)
        return
    attached(model, with_sites(name, "0"), example=x, trainable=())
    assert_formula(model, plain, x)


@pytest.mark.parametrize("layer", [nn.Linear(12, 36, bias=False), nn.Conv2d(12, 20, 3, padding=1, bias=False)])
def test_a_constant_part_gets_a_bias_by_permission_alone(name, layer):
    x = torch.randn(2, *((12,) if isinstance(layer, nn.Linear) else (12, 5, 5))).double()
    plain = nn.Sequential(copy.deepcopy(layer)).double()
    model = attached(copy.deepcopy(plain), with_sites(name, "0"), example=x, trainable=(), allow_new_bias=True)
    keys = expected_of(model).keys()
    assert ("0.bias" in keys) == (refold.explain(model).rows[0].shift == "new bias")
    if "0.bias" in keys:
        expected = expected_of(model)
        unmerged = model.eval()(x).detach()
        refold.merge(model)
        np.testing.assert_allclose(model.state_dict()["0.bias"].numpy(), expected["0.bias"], rtol=1e-11, atol=1e-12)
        assert relative(model(x), unmerged) < 1e-12
        refold.detach(model)
        assert model[0].bias is None


def beit() -> tuple[nn.Module, Any]:
    """qkv's weight is read by its parent, with biases that are held apart."""
    model = Beit(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=3, init_values=0.5)
    return model, torch.randn(2, 3, 32, 32).double()


def packed_attention() -> tuple[nn.Module, Any]:
    model = build("open_clip_tower")
    return model, images(model).double()


def transformers_clip() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=16
    )
    return transformers.CLIPVisionModel(config), {"pixel_values": torch.randn(2, 3, 32, 32).double()}


def standardised() -> tuple[nn.Module, Any]:
    """Convolutions that compute their weight from the stored one."""
    model = nn.Sequential(StdConv2d(12, 18, 3, bias=True), nn.GELU(), StdConv2d(18, 12, 1), nn.Flatten())
    return model, torch.randn(2, 12, 6, 6).double()


@pytest.mark.parametrize("make", [beit, packed_attention, transformers_clip, standardised])
def test_inside_whatever_reads_the_weight(name, make):
    model, inputs = make()
    model = model.double().eval()
    perturb(dict(model.named_parameters()), 0.1)
    plain = copy.deepcopy(model)
    attached(model, METHODS[name], example=inputs, trainable=())
    model.train()
    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    (result if isinstance(result, Tensor) else result[0]).square().sum().backward()
    trained = refold.trainable_parameters(model).items()
    # One number added to all channels (a scalar e of GLoRA) does nothing before a LayerNorm.
    dead = [n for n, p in trained if p.grad is None or (p.numel() > 1 and not p.grad.any())]
    assert not dead
    assert_formula(model, plain, inputs)


def test_beside_quantized_weights(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
    model = build("vit")
    inside = {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and not p.startswith("head")}
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, path: path in inside)
    x = images(model)
    with torch.no_grad():
        plain = model(x)
    attached(model, METHODS[name])
    unmerged = model.eval()(x).detach()
    assert relative(unmerged, plain) > 1e-3
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in refold.trainable_parameters(model).values())
    model.eval()
    with pytest.raises(refold.MergeError, match="quantized"):
        refold.merge(model)
    refold.merge(model, dequantize=True)
    assert relative(model(x), unmerged) < 1e-5
    refold.detach(model)
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", [n for n in METHODS if not n.startswith(("GLoRA", "PACE"))])
def test_training_forms_no_dense_change_where_a_factored_one_is_cheaper(name, monkeypatch):
    """Of GLoRA and PACE, products entry by entry, there is no cheaper form."""
    model = attached(build("vit"), METHODS[name]).train()

    def dense(*args: object) -> None:
        raise AssertionError("formed the whole weight")

    kinds = {type(m) for slot in hosted(model).values() for m in slot.modules() if isinstance(m, WeightAdapter)}
    for kind in kinds:
        monkeypatch.setattr(kind, "reparameterize", dense)
    model(images(model)).square().sum().backward()


def test_bfloat16_backbones_keep_a_single_precision_adapter(name):
    """The branch, and the weight that stands in, as close to the exact one as bfloat16 can tell."""
    exact = build("vit", torch.float64)
    attached(exact, METHODS[name], 0.05)
    model = refold.attach(build("vit", torch.bfloat16), METHODS[name])
    assert all(p.dtype == torch.float32 for n, p in refold.trainable_parameters(model).items() if "refold" in n)
    state = exact.state_dict()
    model.load_state_dict({n: state[n] for n in model.state_dict()})
    x = images(exact)
    assert relative(model.eval()(x.bfloat16()), exact(x)) < 4e-2


def test_autocast_computes_the_same_to_its_precision(name):
    model = attached(build("vit"), METHODS[name], 0.05)
    x = images(model)
    exact = model.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(model(x), exact) < 4e-2


@pytest.mark.parametrize("name", ["RLRR", "GLoRA"])
def test_reading_the_frozen_weight_breaks_no_graph(name):
    model = attached(build("vit"), METHODS[name]).eval()
    x = images(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative(compiled(x), model(x)) < 1e-6
    torch.compiler.reset()
