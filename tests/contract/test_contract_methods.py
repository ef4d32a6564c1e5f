"""What every method must do on every backbone family in every precision, and nothing about how."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import refold
from reference import formulas
from reference.weight_maps import CHANNEL_MAPS, folded, tensors
from refold.adapters import ScaleShift, WeightAdapter
from refold.attachment import head_paths
from refold.hosting import hooks_left, hosted
from refold.state import state_of
from zoo import FAMILIES, build, images, perturb, relative

METHODS = {
    "RepAdapter": refold.RepAdapter(rank=4, groups=2, scale=0.7),
    "LoRA": refold.LoRA(rank=4, scale=0.5),
    "DoRA": refold.DoRA(rank=4, scale=0.5),
    "OFT": refold.OFT(block=8),
    "FacT": refold.FacT(rank=4, scale=0.7),
    "Hydra": refold.Hydra(scale=0.7),
    "KronA": refold.KronA(scale=0.7),
    "ARC": refold.ARC(rank=4),
    "RLRR": refold.RLRR(),
    "GLoRA": refold.GLoRA(rank=2),
    "PACE": refold.PACE(rank=3),
    "KAdaptation": refold.KAdaptation(rank=8, scale=40.0),
    "SSF": refold.SSF(),
    "Adapter": refold.Adapter(hidden=4, activation="identity"),
    "AdaptFormer": refold.AdaptFormer(hidden=16),
    "Unified": refold.Unified(hidden=16),
    "LoRand": refold.LoRand(rank=4),
    "Mona": refold.Mona(hidden=4),
    "Convpass": refold.Convpass(hidden=4),
    "STAdapter": refold.STAdapter(hidden=4, frames=2),
    "VPT": refold.VPT(tokens=3),
    "ConvAdapter": refold.ConvAdapter(position="residual_parallel"),
    "DTL": refold.DTL(start=1, plus=True),
    "LST": refold.LST(reduction=2),
    "E3VA": refold.E3VA(rank=4),
    "ProTuning": refold.ProTuning(hidden=4),
    "SPM": refold.SPM(hidden=4, classes=5),
    "LVAdapter": refold.LVAdapter(hidden=4, prompts=3, text_width=6),
    "BitFit": refold.BitFit(),
    "LayerNormTune": refold.LayerNormTune(),
    "Partial": refold.Partial(),
    "LinearProbe": refold.LinearProbe(),
    "FullFineTune": refold.FullFineTune(),
}
_NO_BRANCH = "the forward has no residual branches"
#: The families in which a method has no place: what the refusal says.
REFUSED: dict[str, dict[str, str]] = {
    "Convpass": {"efficientnet": _NO_BRANCH, "byobnet": _NO_BRANCH},
    "STAdapter": {"efficientnet": _NO_BRANCH, "byobnet": _NO_BRANCH},
    "Adapter": {"efficientnet": _NO_BRANCH, "byobnet": _NO_BRANCH},
    "AdaptFormer": {"efficientnet": _NO_BRANCH, "byobnet": _NO_BRANCH},
    "Unified": {"efficientnet": _NO_BRANCH, "byobnet": _NO_BRANCH},
    "LoRand": {"efficientnet": _NO_BRANCH, "byobnet": _NO_BRANCH},
    "Mona": {"efficientnet": _NO_BRANCH, "byobnet": _NO_BRANCH},
    "VPT": dict.fromkeys(("convnext", "convnext_conv_mlp", "resnet"), "its features are maps")
    | dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
    "ConvAdapter": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
    "DTL": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
    "LST": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
    "E3VA": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks")
    | {"resnet": "no module alone turns the features"},
    "ProTuning": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
    "SPM": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
    "LVAdapter": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
    "Partial": dict.fromkeys(("efficientnet", "byobnet"), "the forward has no residual blocks"),
}
#: The methods whose published start is noise around the backbone.
NOISY = {"SSF", "RLRR", "Adapter", "LoRand", "Mona", "ConvAdapter"}
#: Relative L2 distance allowed between merged and unmerged outputs.
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


def test_every_method_is_under_contract():
    assert set(METHODS) == set(refold.METHODS)
    assert all(type(method) is refold.METHODS[name] for name, method in METHODS.items())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``family`` and ``method``: every pair that is not refused; ``folding`` instead: the methods that merge."""
    wanted = {"method", "folding"} & set(metafunc.fixturenames)
    if not wanted:
        if "family" in metafunc.fixturenames:
            metafunc.parametrize("family", FAMILIES)
        return
    (argument,) = wanted
    pairs = [
        pytest.param(family, method, id=f"{family}-{name}")
        for name, method in METHODS.items()
        for family in FAMILIES
        if family not in REFUSED.get(name, {}) and (argument == "method" or method.mergeable)
    ]
    metafunc.parametrize(f"family, {argument}", pairs)


@pytest.mark.parametrize(("name", "unfit"), [(name, unfit) for name, found in REFUSED.items() for unfit in found])
def test_a_backbone_without_a_place_for_it_is_refused_and_left_alone(name, unfit):
    plain, model = build(unfit), build(unfit)
    with pytest.raises(refold.SiteError, match=REFUSED[name][unfit]):
        refold.attach(model, METHODS[name])
    assert_untouched_structure(model, plain)


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def attached(family: str, method: refold.Method, dtype: torch.dtype) -> nn.Module:
    """A model with a trained adapter (moved away from its start), at evaluation."""
    model = refold.attach(build(family, dtype), method)
    perturb(refold.trainable_parameters(model))
    return model


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def assert_untouched_structure(model: nn.Module, plain: nn.Module) -> None:
    assert type(model) is type(plain)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    assert hooks_left(model) == 0
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert len(ours._forward_hooks) == len(theirs._forward_hooks)
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks)
        assert ours.__dict__.keys() - {"_refold"} == theirs.__dict__.keys()


def test_starts_as_the_backbone(family, method, dtype):
    model = build(family, dtype)
    x = images(model)
    before = model(x)
    refold.attach(model, method)
    if isinstance(method, (refold.VPT, refold.E3VA)):  # whose start is tokens that matter, or a norm
        assert (0 if dtype == torch.bfloat16 else 1e-9) <= relative(model(x), before) < 2
        return
    if type(method).__name__ in NOISY:
        assert dtype != torch.float64 or 0 < relative(model(x), before) < 2
        return_to_identity(model)
    # Bit for bit, but for torch's own attention module, which takes another path once nothing in it trains, and for
    # a product with the identity matrix, which may lay out its result in memory in another way.
    rounding = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 3e-2}[dtype]
    other_path = isinstance(method, refold.OFT) or any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    limit = rounding if other_path else 0.0
    assert relative(model(x), before) <= limit


def return_to_identity(model: nn.Module) -> None:
    for adapter in (slot["default"] for slot in hosted(model).values()):
        if isinstance(adapter, ScaleShift):
            values = [adapter.gamma - 1] + ([] if adapter.beta is None else [adapter.beta])
            assert all(0 < float(v.detach().float().std()) < 0.1 for v in values)
            nn.init.ones_(adapter.gamma)
        for name, parameter in adapter.named_parameters():
            if name.rpartition(".")[2].startswith(("beta", "rows")) or name.startswith("up"):
                nn.init.zeros_(parameter)


def test_trains_its_own_and_nothing_else(family, method, dtype):
    model = build(family, dtype)
    plain = snapshot(model)
    refold.attach(model, method)
    model.train()
    trainable = refold.trainable_parameters(model)
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=1e-2))
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in trainable.values()}
    reached = set()
    for seed in range(2):
        optimizer.zero_grad()
        model(images(model, count=4, seed=seed)).float().pow(2).sum().backward()
        reached |= {n for n, p in trainable.items() if p.grad is not None and bool(p.grad.any())}
        optimizer.step()
    missed = set(trainable) - reached
    if isinstance(method, refold.STAdapter):  # what the last adds to patches is late for a head on the class token
        late = state_of(model).record().sites[-1].path
        missed = {name for name in missed if not name.startswith(f"{late}.refold.")}
    assert not missed
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trainable)
    after = model.state_dict()
    moving = set(state_of(model).record().owned)
    assert_same({n: after[n] for n in plain if n not in moving}, {n: v for n, v in plain.items() if n not in moving})
    if not isinstance(method, refold.FullFineTune):
        assert all(n in trainable for n in moving)  # no statistics among them: frozen BatchNorm keeps its own


def test_merges_exactly_and_comes_back(family, folding, dtype):
    plain = build(family, dtype)
    model = attached(family, folding, dtype)
    twin = copy.deepcopy(model)
    x = images(model)
    unmerged, adapted = model(x).detach(), snapshot(model)

    report = refold.merge(model)
    assert report.checked
    assert_untouched_structure(model, plain)
    if dtype in EXACT:
        assert relative(model(x), unmerged) <= EXACT[dtype]
    merged = model.state_dict()
    for name, value in expected_after_merge(twin, plain).items():
        # One rounding to the tensor's own dtype, of which a unit in the last place is 2 eps at most.
        limit = torch.finfo(dtype).eps * np.abs(value) + 1e-12 * np.abs(value).max()
        assert np.all(np.abs(merged[name].double().numpy() - value) <= limit), name

    refold.unmerge(model)
    assert_same(model.state_dict(), adapted)
    assert torch.equal(model(x), unmerged)

    refold.detach(model)
    assert_untouched_structure(model, plain)
    assert_same(model.state_dict(), plain.state_dict())
    assert "_refold" not in model.__dict__


def expected_after_merge(twin: nn.Module, plain: nn.Module) -> dict[str, np.ndarray]:
    """Every tensor of the merged model by the papers' formulas, from the unmerged twin's adapters."""
    record = state_of(twin).record()
    slots = hosted(twin)
    names = plain.state_dict().keys()
    values = {n: v for n, v in twin.state_dict().items() if n in names and v.is_floating_point()}
    expected = {name: value.double().numpy() for name, value in values.items()}
    for site in record.sites:
        adapter = slots[site.path]["default"]
        leaf = "in_proj_weight" if isinstance(twin.get_submodule(site.path), nn.MultiheadAttention) else "weight"
        weight, bias = f"{site.path}.{leaf}", f"{site.path}.{leaf.replace('weight', 'bias')}"
        fold = formulas.fold_linear if expected[weight].ndim == 2 else formulas.fold_conv
        if isinstance(adapter, WeightAdapter):
            expected[weight], moved = folded(adapter, expected[weight], expected.get(bias))
            expected |= {} if moved is None else {bias: moved}
            continue
        numbers = tensors(adapter)
        if isinstance(adapter, ScaleShift):
            beta, nothing = numbers.get("beta"), np.zeros(len(numbers["gamma"]))
            at_bias = site.shift.target == "bias"
            expected[weight], moved = formulas.scale_and_shift(
                expected[weight], expected.get(bias), numbers["gamma"], beta if at_bias else nothing
            )
            if bias in expected:
                expected[bias] = moved
            if site.shift.target == "batchnorm":
                name = f"{site.shift.path}.running_mean"
                expected[name] = formulas.batchnorm_absorbs(expected[name], beta)
            continue
        matrix, shift = CHANNEL_MAPS[type(adapter)](adapter, numbers)
        if site.slot == "output":
            expected[weight], moved = formulas.fold_behind(expected[weight], expected.get(bias), matrix, shift)
            if bias in expected:
                expected[bias], moved = moved, 0
        else:
            expected[weight], moved = fold(expected[weight], matrix, shift)
        if site.shift.target == "bias":
            expected[bias] = expected[bias] + moved
        elif site.shift.target == "batchnorm":
            name = f"{site.shift.path}.running_mean"
            expected[name] = formulas.batchnorm_absorbs(expected[name], moved)
        elif site.shift.target == "norm":
            name = f"{site.shift.path}.bias"
            expected[name] = formulas.layer_norm_absorbs(expected[name], matrix, shift)
        else:
            assert not shift.any()
    return expected


def test_low_precision_merge_is_the_cast_of_the_float32_merge(family, folding):
    """Folding bfloat16 weights costs nothing beyond storing the result in bfloat16."""
    low = attached(family, folding, torch.bfloat16)
    single = copy.deepcopy(low).float()
    refold.merge(low)
    refold.merge(single)
    exact, cast = single.state_dict(), low.state_dict()
    for name, value in exact.items():
        if value.is_floating_point():
            ours = (cast[name].float() - value).abs()
            assert bool((ours <= (value.bfloat16().float() - value).abs() + 1e-7).all()), name


def test_detach_restores_flags_and_modes(family, method):
    model = build(family).train()
    for module in list(model.modules())[::3]:
        module.training = False
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    refold.attach(model, method)
    model(images(model, count=4))
    if method.mergeable:
        refold.merge(model)
    refold.detach(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_a_file_carries_it_bit_for_bit(family, method, dtype, tmp_path):
    model = attached(family, method, dtype)
    path = refold.save(model, tmp_path / "adapter.safetensors")
    other = refold.load(build(family, dtype), path)
    assert_same(other.state_dict(), model.state_dict())
    x = images(model)
    assert torch.equal(other(x), model(x))
    assert refold.trainable_parameters(other).keys() == refold.trainable_parameters(model).keys()
    refold.detach(other)
    assert_same(other.state_dict(), build(family, dtype).state_dict())


def test_copies_and_pickles_are_independent_and_whole(family, method):
    model = attached(family, method, torch.float32)
    assert_copies_come_apart(model, family, merged=False)
    if method.mergeable:
        refold.merge(model)
        assert_copies_come_apart(model, family, merged=True)


def assert_copies_come_apart(model: nn.Module, family: str, *, merged: bool) -> None:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    x = images(model)
    before = model(x).detach()
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(x), before)
        if merged:
            refold.unmerge(other)
        refold.detach(other)
        assert_same(other.state_dict(), build(family).state_dict())
    assert torch.equal(model(x), before)


def test_a_plain_checkpoint_loads_strictly_while_attached(family, method):
    model = attached(family, method, torch.float32)
    before = snapshot(model)
    checkpoint = build(family).state_dict()
    model.load_state_dict(checkpoint, strict=True)
    after = model.state_dict()
    assert_same({n: after[n] for n in checkpoint}, checkpoint)
    adapters = [n for n in before if n not in checkpoint]
    assert_same({n: after[n] for n in adapters}, {n: before[n] for n in adapters})


def test_explain_counts_what_trains(family, method):
    model = refold.attach(build(family), method)
    told = refold.explain(model)
    assert told.trainable == sum(p.numel() for p in refold.trainable_parameters(model).values())
    assert told.total == sum(p.numel() for p in build(family).parameters())
    heads = [row.path for row in told.rows if row.slot == "head"]
    assert len(heads) == 1
    assert heads[0].startswith(head_paths(model))
    assert all(row.path in str(told) for row in told.rows)


def test_papers_placements_resolve(family):
    """RepAdapter finds the attention's and the MLP's inputs, or the pointwise projections that stand in for them."""
    model = refold.attach(build(family), METHODS["RepAdapter"])
    roles = [row.role for row in refold.explain(model).rows if row.slot == "input"]
    if family in ("resnet", "byobnet"):  # neither attention nor MLP: every channel-mixing layer instead
        assert set(roles) == {""}
        assert len(roles) > 10
    else:
        assert set(roles) == {"attention", "mlp"}
        # Every block has both, but for EfficientNet's first two, which do not expand, and the pooling of test_vit3.
        odd = {"efficientnet": 2, "timm_test_vit3": -1}.get(family, 0)
        assert roles.count("attention") == roles.count("mlp") + odd


def test_attention_only_is_half_of_it(family):
    if family in ("resnet", "byobnet"):
        with pytest.raises(refold.SiteError, match="no usable layer plays the role 'attention'"):
            refold.attach(build(family), refold.RepAdapter(sites="attention"))
        return
    both = refold.explain(refold.attach(build(family), METHODS["RepAdapter"]))
    model = refold.attach(build(family), refold.RepAdapter(rank=4, scale=0.7, sites="attention"))
    alone = refold.explain(model)
    wanted = [row.path for row in both.rows if row.role == "attention"]
    assert [row.path for row in alone.rows if row.slot == "input"] == wanted
    perturb(refold.trainable_parameters(model))
    assert refold.merge(model).rel_l2 <= 1e-5
