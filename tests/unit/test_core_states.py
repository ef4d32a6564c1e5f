"""The table of states: what every public call does in every state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import refold
from refold.state import state_of
from zoo import build, images, perturb

METHOD = refold.RepAdapter(rank=4)


def state(model: nn.Module) -> str:
    found = state_of(model)
    if found is None:
        return "plain"
    if found.merged is None:
        return "attached"
    return "merged" if found.kept_base else "merged without base"


def make(where: str) -> nn.Module:
    model = build("vit")
    if where != "plain":
        refold.attach(model, METHOD)
        perturb(refold.trainable_parameters(model))
    if where.startswith("merged"):
        refold.merge(model, keep_base=where == "merged")
    assert state(model) == where
    return model


def use_disabled(model: nn.Module, file: Path) -> None:
    with refold.disabled(model):
        pass


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "attach": lambda model, file: refold.attach(model, METHOD),
    "attach another": lambda model, file: refold.attach(model, METHOD, name="other"),
    "detach": lambda model, file: refold.detach(model),
    "merge": lambda model, file: refold.merge(model),
    "unmerge": lambda model, file: refold.unmerge(model),
    "switch": lambda model, file: refold.switch(model, "default"),
    "switch to unknown": lambda model, file: refold.switch(model, "unknown"),
    "combine": lambda model, file: refold.combine(model, {"default": 0.5}, name="sum"),
    "activate": lambda model, file: refold.activate(model, "default"),
    "activate unknown": lambda model, file: refold.activate(model, "unknown"),
    "disabled": use_disabled,
    "save": lambda model, file: refold.save(model, file.with_name("out.safetensors")),
    "load": lambda model, file: refold.load(model, file),
    "load another": lambda model, file: refold.load(model, file, name="other"),
    "explain": lambda model, file: refold.explain(model),
    "describe": lambda model, file: refold.describe(model, task="classify"),
    "param_groups": lambda model, file: refold.param_groups(model),
    "trainable_parameters": lambda model, file: refold.trainable_parameters(model),
}

NOTHING = (refold.SiteError, "no adapter is attached")
IS_MERGED = (refold.SiteError, "adapter 'default' is merged")
NO_BASE = (refold.MergeError, "the base weights were not kept")
UNKNOWN = (refold.SiteError, "no adapter named 'unknown'")

#: Call -> for plain, attached, merged, merged without base: the state afterwards, or the error.
TABLE = {
    "attach": ("attached", (refold.SiteError, "attached already"), IS_MERGED, IS_MERGED),
    "attach another": ("attached", "attached", IS_MERGED, IS_MERGED),
    "detach": (NOTHING, "plain", "plain", NO_BASE),
    "merge": (
        NOTHING,
        "merged",
        (refold.MergeError, "is merged already"),
        (refold.MergeError, "is merged already"),
    ),
    "unmerge": (NOTHING, (refold.MergeError, "the model is not merged"), "attached", NO_BASE),
    "switch": (NOTHING, "attached", "merged", NO_BASE),
    "switch to unknown": (NOTHING, UNKNOWN, UNKNOWN, UNKNOWN),
    "combine": (NOTHING, "attached", IS_MERGED, IS_MERGED),
    "activate": (NOTHING, "attached", IS_MERGED, IS_MERGED),
    "activate unknown": (NOTHING, UNKNOWN, IS_MERGED, IS_MERGED),
    "disabled": (NOTHING, "attached", IS_MERGED, IS_MERGED),
    "save": (NOTHING, "attached", "merged", (refold.StoreError, "merged without its base weights")),
    "load": ("attached", (refold.SiteError, "attached already"), IS_MERGED, IS_MERGED),
    "load another": ("attached", "attached", IS_MERGED, IS_MERGED),
    "explain": (NOTHING, "attached", "merged", "merged without base"),
    "describe": (NOTHING, "attached", "merged", "merged without base"),
    "param_groups": (NOTHING, "attached", "merged", "merged without base"),
    "trainable_parameters": ("plain", "attached", "merged", "merged without base"),
}
STATES = ("plain", "attached", "merged", "merged without base")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return refold.save(make("attached"), tmp_path_factory.mktemp("states") / "adapter.safetensors")


def test_the_table_is_whole():
    assert TABLE.keys() == CALLS.keys()
    assert all(len(row) == len(STATES) for row in TABLE.values())


@pytest.mark.parametrize("where", STATES)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_in_every_state(call, where, file):
    model = make(where)
    x = images(model)
    output = model(x).detach()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    expected = TABLE[call][STATES.index(where)]
    if isinstance(expected, str):
        CALLS[call](model, file)
        assert state(model) == expected
        return
    kind, reason = expected
    with pytest.raises(kind, match=reason):
        CALLS[call](model, file)
    assert state(model) == where
    assert torch.equal(model(x), output)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], v) for n, v in before.items())


def test_merging_and_coming_back_many_times_never_drifts():
    model = make("attached")
    x = images(model)
    unmerged = model(x).detach()
    refold.merge(model)
    merged = model(x).detach()
    for _ in range(10):
        refold.unmerge(model)
        assert torch.equal(model(x), unmerged)
        refold.merge(model, check=False)
        assert torch.equal(model(x), merged)


def test_explain_tells_the_state_and_the_place():
    model = make("attached")
    assert "attached" in str(refold.explain(model)).splitlines()[0]
    refold.merge(model)
    told = refold.explain(model)
    assert told.state == "merged"
    assert "merged" in str(told).splitlines()[0]
    assert {row.shift for row in told.rows if row.slot == "input"} == {"own bias"}


def test_a_merged_model_trains_its_head_only_and_no_folded_weight():
    model = make("merged")
    assert set(refold.trainable_parameters(model)) == {"head.weight", "head.bias"}
    groups = refold.param_groups(model, lr=1.0, head_lr=2.0)
    assert {group["lr"] for group in groups} == {2.0}


def test_the_disabled_model_is_the_backbone_and_comes_back_after_an_error():
    plain, model = build("vit"), make("attached")
    x = images(model)
    adapted, expected = model(x).detach(), plain(x)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with refold.disabled(model) as same:
        assert same is model
        assert torch.equal(model(x), expected)
        assert not refold.trainable_parameters(model)
    assert torch.equal(model(x), adapted)

    with pytest.raises(ZeroDivisionError), refold.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), adapted)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_inside_disabled_no_adapter_is_in_use():
    model = make("attached")
    with refold.disabled(model), refold.disabled(model):
        for call in (refold.merge, refold.explain, refold.param_groups):
            with pytest.raises(refold.SiteError, match="no adapter is in use here"):
                call(model)
    assert refold.explain(model).name == "default"


def test_gradients_gathered_before_a_disabled_pass_stay():
    model = make("attached")
    model(images(model)).sum().backward()
    before = {n: p.grad.clone() for n, p in refold.trainable_parameters(model).items()}
    with refold.disabled(model), torch.no_grad():
        model(images(model))
    assert all(torch.equal(p.grad, before[n]) for n, p in refold.trainable_parameters(model).items())
