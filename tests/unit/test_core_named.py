"""Several named adapters on one backbone: each with its head, its classes and its BatchNorm statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.inspection import description
from zoo import CLASSES, build, images, perturb

METHODS = {
    "a": refold.RepAdapter(rank=4),
    "b": refold.LoRA(rank=4),
    "c": refold.BitFit(),
    "d": refold.RepAdapter(rank=8, groups=4, scale=0.5, sites="mlp"),
}


def with_four(family: str = "vit") -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A model with four trained adapters, an input, and each adapter's output."""
    model = build(family)
    x = images(model)
    outputs = {}
    for name, method in METHODS.items():
        refold.attach(model, method, name=name)
        perturb(refold.trainable_parameters(model))
        outputs[name] = model(x).detach()
    return model, x, outputs


def test_each_has_its_own_output_and_head():
    model, x, outputs = with_four()
    found = list(outputs.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    for name in METHODS:
        refold.activate(model, name)
        assert torch.equal(model(x), outputs[name])
        owned = refold.trainable_parameters(model)
        assert {"head.weight", "head.bias"} <= owned.keys()
        adapters = {n.split(".refold.")[1].split(".")[0] for n in owned if ".refold." in n}
        assert adapters <= {name}


def test_a_new_one_starts_from_the_backbone_whatever_is_active():
    model, x, _ = with_four()
    refold.attach(model, refold.RepAdapter(rank=4), name="fresh")
    assert torch.equal(model(x), build("vit")(x))


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_fifty_switches_are_bit_identical(merged):
    model, x, outputs = with_four()
    if merged:
        for name in METHODS:
            refold.activate(model, name)
            refold.merge(model)
            outputs[name] = model(x).detach()
            refold.unmerge(model)
        refold.merge(model)
    state = {n: v.clone() for n, v in model.state_dict().items()} if not merged else None
    last = list(METHODS)[-1]
    for turn in range(50):
        name = list(METHODS)[turn % len(METHODS)]
        refold.switch(model, name)
        assert torch.equal(model(x), outputs[name])
    if merged:
        assert {n for n, _ in model.named_modules()} == {n for n, _ in build("vit").named_modules()}
        refold.unmerge(model)
    refold.activate(model, last)
    if state is not None:
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    refold.detach(model)
    plain = build("vit").state_dict()
    assert all(torch.equal(v, plain[n]) for n, v in model.state_dict().items())


def test_switching_a_merged_model_to_what_cannot_merge_leaves_it_merged():
    model, x, _ = with_four()
    refold.activate(model, "a")
    refold.merge(model)
    merged = model(x).detach()
    parked = model.__dict__["_refold"].records["d"].parked
    with torch.no_grad():
        next(iter(parked.values())).up.fill_(float("nan"))
    with pytest.raises(refold.MergeError, match="not finite"):
        refold.switch(model, "d")
    assert torch.equal(model(x), merged)
    refold.switch(model, "b")
    refold.switch(model, "a")
    assert torch.equal(model(x), merged)


def test_training_one_leaves_the_others_alone():
    model, x, outputs = with_four()
    refold.activate(model, "a")
    optimizer = torch.optim.AdamW(refold.param_groups(model, lr=1e-2))
    model.train()(x).pow(2).sum().backward()
    optimizer.step()
    model.eval()
    for name in ("b", "c", "d"):
        refold.activate(model, name)
        assert torch.equal(model(x), outputs[name])
    refold.activate(model, "a")
    assert not torch.equal(model(x), outputs["a"])


def test_an_optimizer_goes_on_after_merge_and_switch():
    """Adapter parameters stay the same objects, so their optimizer stays valid."""
    model, _, _ = with_four()
    refold.activate(model, "a")
    before = {n: id(p) for n, p in refold.trainable_parameters(model).items()}
    refold.merge(model)
    refold.switch(model, "b")
    refold.unmerge(model)
    refold.activate(model, "a")
    assert {n: id(p) for n, p in refold.trainable_parameters(model).items()} == before


def test_any_of_them_can_be_saved_in_any_state(tmp_path):
    model, x, outputs = with_four()

    def check(stage: str) -> None:
        for name in METHODS:
            path = refold.save(model, tmp_path / f"{stage}_{name}.safetensors", name=name)
            assert torch.equal(refold.load(build("vit"), path)(x), outputs[name])

    check("attached")
    refold.activate(model, "b")
    refold.merge(model)
    check("merged")
    refold.unmerge(model)
    with refold.disabled(model):
        check("disabled")


def saved_with_classes(count: int, folder: Path, family: str = "vit") -> tuple[Path, Tensor]:
    """A file whose head has ``count`` classes, and the output it must give."""
    model = build(family)
    weight, bias = torch.randn(count, model.head.in_features), torch.randn(count)
    model.head = nn.Linear(model.head.in_features, count)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    refold.attach(model, refold.RepAdapter(rank=4))
    perturb(refold.trainable_parameters(model))
    return refold.save(model, folder / f"{count}.safetensors"), model(images(model)).detach()


def test_heads_of_different_sizes_come_and_go(tmp_path):
    files = {count: saved_with_classes(count, tmp_path) for count in (2, 7, CLASSES)}
    model = build("vit")
    x = images(model)
    for count, (path, _) in files.items():
        refold.load(model, path, name=f"classes{count}")
    for _ in range(3):
        for count, (_, expected) in files.items():
            refold.switch(model, f"classes{count}")
            assert model(x).shape == (2, count)
            assert model.head.out_features == count
            assert torch.equal(model(x), expected)
    refold.merge(model)
    for count, (_, expected) in files.items():
        refold.switch(model, f"classes{count}")
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert set(refold.trainable_parameters(model)) <= {"head.weight", "head.bias"}
    with pytest.raises(refold.SiteError):
        refold.activate(model, "classes2")
    refold.detach(model)
    assert torch.equal(model(x), build("vit")(x))
    assert model.head.out_features == CLASSES


def test_a_loaded_head_trains(tmp_path):
    path, _ = saved_with_classes(5, tmp_path)
    model = refold.load(build("vit"), path)
    model(images(model)).sum().backward()
    assert model.head.weight.grad is not None


def test_an_optimizer_goes_on_training_a_head_of_another_size(tmp_path):
    model = build("vit")
    for count in (5, 7):
        refold.load(model, saved_with_classes(count, tmp_path)[0], name=f"classes{count}")
    refold.activate(model, "classes5")
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=0.1))
    refold.activate(model, "classes7")
    refold.merge(model)
    refold.switch(model, "classes5")
    refold.unmerge(model)
    with refold.disabled(model):
        assert model.head.weight.shape == (CLASSES, 32)
    before = model.head.weight.clone()
    model(images(model)).pow(2).sum().backward()
    optimizer.step()
    assert model.head.weight.shape == (5, 32)
    assert not torch.equal(model.head.weight, before)


def test_each_has_its_own_batchnorm_statistics():
    model = build("resnet")
    x = images(model)
    plain = model(x).detach()
    statistics = {n: v.clone() for n, v in model.named_buffers()}
    refold.attach(model, refold.FullFineTune(), name="full")
    model.train()
    for seed in range(3):
        model(images(model, count=8, seed=seed))
    model.eval()
    moved = {n: v.clone() for n, v in model.named_buffers()}
    full = model(x).detach()
    assert not any(torch.equal(moved[n], v) for n, v in statistics.items())

    refold.attach(model, refold.RepAdapter(), name="rep")
    assert all(torch.equal(v, statistics[n]) for n, v in model.named_buffers())
    assert torch.equal(model(x), plain)
    model.train()
    model(images(model, count=8))
    model.eval()
    assert all(torch.equal(v, statistics[n]) for n, v in model.named_buffers())
    refold.activate(model, "full")
    assert all(torch.equal(v, moved[n]) for n, v in model.named_buffers())
    assert torch.equal(model(x), full)
    refold.detach(model)
    assert torch.equal(model(x), plain)


def test_full_fine_tuning_beside_an_adapter_owns_no_adapter(tmp_path):
    model = refold.attach(build("vit"), refold.RepAdapter(rank=4), name="rep")
    refold.attach(model, refold.FullFineTune(), name="full")
    assert not [n for n in refold.trainable_parameters(model) if "refold" in n]
    perturb(refold.trainable_parameters(model))
    x = images(model)
    path = refold.save(model, tmp_path / "full.safetensors")
    assert torch.equal(refold.load(build("vit"), path)(x), model(x))


def test_the_shift_has_the_same_place_for_every_adapter():
    """The norm that feeds a layer is found whether or not that layer already hosts an adapter."""
    model = build("vit_without_qkv_bias")
    refold.attach(model, refold.RepAdapter(rank=4), name="first")
    first = [(row.path, row.shift) for row in refold.explain(model).rows]
    refold.attach(model, refold.RepAdapter(rank=4), name="second")
    assert [(row.path, row.shift) for row in refold.explain(model).rows] == first
    assert "norm blocks.0.norm1" in dict(first).values()


def test_what_was_described_belongs_to_each():
    model, _, _ = with_four()
    refold.activate(model, "a")
    refold.describe(model, classes=["x", "y", "z"], task="classify")
    refold.activate(model, "b")
    refold.describe(model, classes=["u", "v", "w"])
    refold.activate(model, "a")
    assert description(model) == {"classes": ["x", "y", "z"], "task": "classify"}


@pytest.mark.parametrize("name", ["train", "eval", "half", "active", "sites", "wires", "keys", "pop", "", "a b", "a.b"])
def test_names_that_a_module_cannot_carry_are_refused_before_anything_changes(name):
    model = build("vit")
    with pytest.raises(refold.SiteError, match="cannot be an adapter's name"):
        refold.attach(model, refold.RepAdapter(), name=name)
    assert "_refold" not in model.__dict__
    refold.attach(model, refold.RepAdapter(), name="task_1")
