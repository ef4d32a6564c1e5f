"""switch on a merged model: exact after any number of switches, from kept folds or from new ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import refold
from refold.state import state_of
from zoo import build, images, perturb

METHODS = {
    "a": refold.RepAdapter(rank=4),
    "b": refold.LoRA(rank=4),
    "c": refold.RepAdapter(rank=8, groups=4, sites="mlp"),
    "d": refold.BitFit(),
}


def merged_one_by_one(family: str, methods: dict[str, refold.Method]) -> dict[str, dict[str, torch.Tensor]]:
    """What ``merge`` itself writes for each adapter of :func:`merged`."""
    values = {}
    for name in methods:
        model = attached(family, methods)
        refold.activate(model, name)
        refold.merge(model, check=False)
        values[name] = {n: v.clone() for n, v in model.state_dict().items()}
    return values


def attached(family: str, methods: dict[str, refold.Method]) -> nn.Module:
    torch.manual_seed(0)
    model = build(family)
    for name, method in methods.items():
        refold.attach(model, method, name=name)
        perturb(refold.trainable_parameters(model))
    return model


def same(model: nn.Module, values: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == values.keys() and all(torch.equal(now[n], v) for n, v in values.items())


@pytest.mark.parametrize("keep", [0, 2, 4])
@pytest.mark.parametrize("family", ["vit", "vit_without_qkv_bias", "efficientnet", "open_clip_tower"])
def test_every_switch_leaves_exactly_what_merge_writes(family, keep):
    methods = METHODS if family != "efficientnet" else {k: METHODS[k] for k in "ab"}
    expected = merged_one_by_one(family, methods)
    model = attached(family, methods)
    refold.merge(model, check=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        name = list(methods)[int(torch.randint(len(methods), (), generator=generator))]
        refold.switch(model, name, keep=keep)
        assert same(model, expected[name])
        assert len(state_of(model).kept) <= keep
    refold.detach(model)
    assert same(model, build(family).state_dict())


def test_a_thousand_switches_are_bit_identical_to_the_first():
    model = attached("vit", METHODS)
    refold.merge(model, check=False)
    first: dict[str, dict[str, torch.Tensor]] = {}
    for turn in range(1000):
        name = list(METHODS)[turn % len(METHODS)]
        refold.switch(model, name)
        if name not in first:
            first[name] = {n: v.clone() for n, v in model.state_dict().items()}
        elif turn % 50 < len(METHODS) or turn > 990:
            assert same(model, first[name])
    refold.detach(model)
    assert same(model, build("vit").state_dict())


def visited(*names: str) -> nn.Module:
    """Merged with the last of ``names`` after visiting all of them."""
    model = attached("vit", METHODS)
    refold.merge(model, check=False)
    for name in names:
        refold.switch(model, name)
    return model


def test_an_adapter_changed_while_merged_is_folded_anew():
    """An optimizer may hold its parameters, which stay the same objects."""
    model = visited("a", "b")
    assert "a" in state_of(model).kept
    with torch.no_grad():
        next(iter(state_of(model).records["a"].parked.values())).up.mul_(2.0)
    refold.switch(model, "a")
    found = model.state_dict()
    refold.unmerge(model)
    refold.merge(model, check=False)
    assert same(model, found)
    assert not torch.equal(found["blocks.0.attn.qkv.weight"], visited("a").state_dict()["blocks.0.attn.qkv.weight"])


def test_the_adapter_in_use_is_folded_anew_if_it_was_changed():
    model = visited("a")
    before = model.blocks[0].attn.qkv.weight.clone()
    refold.switch(model, "a")
    assert torch.equal(model.blocks[0].attn.qkv.weight, before)
    with torch.no_grad():
        state_of(model).records["a"].parked["blocks.0.attn.qkv"].up.mul_(2.0)
    refold.switch(model, "a")
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before)


@pytest.mark.parametrize("way", [("b",), ("b", "a"), ("c", "b")])
def test_a_layer_changed_while_it_held_no_fold_keeps_its_change(way):
    """c folds into the MLPs only: while c is merged, qkv is the user's to change."""
    model = visited("a", "b", "c")
    assert {"a", "b"} <= state_of(model).kept.keys()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1.0)
    for name in way:
        refold.switch(model, name)
    expected = build("vit").blocks[0].attn.qkv.weight + 1.0
    refold.detach(model)
    assert torch.equal(model.blocks[0].attn.qkv.weight, expected)


def test_a_layer_changed_then_folded_reaches_every_kept_adapter():
    model = visited("a", "b", "c")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1.0)
    refold.switch(model, "b")  # folds anew from the changed weight
    refold.switch(model, "a")  # was kept from before the change
    found = model.state_dict()
    refold.unmerge(model)
    refold.merge(model, check=False)
    assert same(model, found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_after_a_cast_nothing_old_comes_back(dtype):
    model = visited("a", "b")
    model.to(dtype)
    refold.switch(model, "a")
    assert not state_of(model).kept
    cast = visited("b").to(dtype)
    refold.switch(cast, "a", keep=0)
    assert same(model, cast.state_dict())
    for name in "bab":
        refold.switch(model, name)
        refold.switch(cast, name, keep=0)
        assert same(model, cast.state_dict())
    assert {v.dtype for v in state_of(model).kept["a"].values.values()} == {dtype}


def test_copies_and_pickles_leave_the_kept_weights_out():
    model = visited("a", "b", "a")
    assert state_of(model).kept
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        assert not state_of(other).kept
        refold.switch(other, "b")
        assert same(other, visited("b").state_dict())


@pytest.mark.parametrize("call", [refold.unmerge, refold.detach])
def test_nothing_is_kept_after_the_merge(call):
    model = visited("a", "b")
    call(model)
    assert state_of(model) is None or not state_of(model).kept


def test_an_adapter_that_also_trains_what_it_folds_into_is_never_kept():
    """Its values under the fold are its own."""
    model = attached("vit", {"a": METHODS["a"], "b": METHODS["b"]})
    refold.attach(model, refold.RepAdapter(rank=2), name="own", trainable=("head", "blocks.0.attn.qkv.bias"))
    perturb(refold.trainable_parameters(model))
    x = images(model)
    unmerged = model(x).detach()
    refold.merge(model, check=False)
    merged = model(x).detach()
    for name in ("a", "own", "b", "own", "a", "own"):
        refold.switch(model, name)
        assert "own" not in state_of(model).kept
    assert torch.equal(model(x), merged)
    refold.unmerge(model)
    assert torch.equal(model(x), unmerged)


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_a_quantized_weight_under_the_other_adapter_is_refused():
    """A fold copied into it would be rounded without a word."""
    ao = pytest.importorskip("torchao.quantization")
    model = build("vit")
    for block in model.blocks:
        ao.quantize_(block.mlp, ao.Int8WeightOnlyConfig())
    refold.attach(model, refold.LoRA(rank=2, sites="attention"), name="attention")
    perturb(refold.trainable_parameters(model))
    refold.attach(model, refold.LoRA(rank=2, sites="mlp"), name="mlp")
    perturb(refold.trainable_parameters(model))
    refold.activate(model, "attention")
    refold.merge(model)
    x = images(model)
    merged = model(x).detach()
    with pytest.raises(refold.MergeError, match=r"fc1.weight: its weight is quantized.*activate 'mlp'"):
        refold.switch(model, "mlp")
    assert torch.equal(model(x), merged)
    refold.unmerge(model)
    refold.activate(model, "mlp")
    refold.merge(model, dequantize=True)
    refold.switch(model, "attention")
    refold.switch(model, "mlp")


def test_a_negative_number_to_keep_is_refused():
    model = visited("a")
    with pytest.raises(refold.MergeError, match="keep=-1"):
        refold.switch(model, "b", keep=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (4, 6, 3)])
def test_the_checksum_sees_every_single_value(dtype, shape):
    from refold.kept import tensor_checksums

    tensor = torch.randint(1, 100, shape).to(dtype)
    (before,) = tensor_checksums([tensor])
    for index in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[index] += 1
        assert tensor_checksums([other]) != [before]
    strided = tensor.repeat(*(1,) * (tensor.dim() or 1), 2)[..., : tensor.shape[-1] if shape else 1]
    assert tensor_checksums(
        [strided.reshape(shape).clone(), torch.cat([tensor.view(-1), tensor.view(-1)])[tensor.numel() :]]
    ) == [before, before]
