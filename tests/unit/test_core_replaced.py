"""A model that is changed under its adapters: what would lose a part of them in silence is refused, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import refold
from zoo import build, images, perturb

METHOD = refold.RepAdapter(rank=2)


def attached(method: refold.Method = METHOD) -> nn.Module:
    model = refold.attach(build("vit"), method)
    perturb(refold.trainable_parameters(model))
    return model


def replace_block(model: nn.Module) -> str:
    model.blocks[1] = copy.deepcopy(build("vit").blocks[1])
    return r"blocks\.1\..*replaced or removed"


def replace_layer(model: nn.Module) -> str:
    old = model.blocks[1].attn.qkv
    model.blocks[1].attn.qkv = nn.Linear(old.in_features, old.out_features)
    return r"blocks\.1\.attn\.qkv: .*replaced or removed"


def remove_block(model: nn.Module) -> str:
    del model.blocks[-1]
    return rf"blocks\.{len(model.blocks)}\..*replaced or removed"


def copy_block(model: nn.Module) -> str:
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    return rf"blocks\.{len(model.blocks) - 1}\..*added with a copy of its adapter"


def use_disabled(model: nn.Module, folder: Path) -> None:
    with refold.disabled(model):
        pass


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "merge": lambda model, folder: refold.merge(model),
    "merge unchecked": lambda model, folder: refold.merge(model, check=False),
    "save": lambda model, folder: refold.save(model, folder / "new.safetensors"),
    "save_peft": lambda model, folder: refold.save_peft(model, folder / "peft"),
    "attach": lambda model, folder: refold.attach(model, METHOD, name="second"),
    "activate": lambda model, folder: refold.activate(model, "default"),
    "param_groups": lambda model, folder: refold.param_groups(model),
    "disabled": use_disabled,
    "explain": lambda model, folder: refold.explain(model),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", [replace_block, replace_layer, remove_block, copy_block])
def test_a_layer_that_went_with_its_adapter_is_missed(change, call, tmp_path: Path):
    model = attached(refold.LoRA(rank=2) if call == "save_peft" else METHOD)  # what PEFT has
    reason = change(model)
    keys = list(model.state_dict())
    with pytest.raises(refold.SiteError, match=reason):
        CALLS[call](model, tmp_path)
    assert list(model.state_dict()) == keys
    refold.detach(model)
    assert not any(".refold." in key for key in model.state_dict())


def test_another_adapter_does_not_hide_the_loss(tmp_path: Path):
    model = attached()
    file = refold.save(model, tmp_path / "old.safetensors")
    reason = replace_layer(model)
    with pytest.raises(refold.SiteError, match=reason):
        refold.load(model, file, name="second", force=True)
    assert not any("second" in key for key in model.state_dict())


def test_a_layer_that_comes_back_is_welcome(tmp_path: Path):
    model = attached()
    before = model(images(model))
    kept = model.blocks[1]
    replace_block(model)
    with pytest.raises(refold.SiteError):
        refold.merge(model)
    model.blocks[1] = kept
    refold.merge(model)
    assert torch.allclose(model(images(model)), before, atol=1e-5)


@pytest.mark.parametrize("method", [METHOD, refold.LoRA(rank=2), refold.BitFit()], ids=str)
def test_a_head_of_another_kind_is_not_taken_for_the_old_one(method, tmp_path: Path):
    model = attached(method)
    model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.head.in_features, 3))
    with pytest.raises(refold.StoreError, match=r"head\.1\.weight: trains, but is no part of the adapter"):
        refold.save(model, tmp_path / "a.safetensors")
    model.head.requires_grad_(False)
    with pytest.raises(refold.StoreError, match=r"head\.weight: its layer was replaced"):
        refold.save(model, tmp_path / "a.safetensors")
    with pytest.raises(refold.SiteError, match=r"head\.weight: its layer was replaced"), refold.disabled(model):
        pass
    head = model.head
    refold.detach(model)
    assert model.head is head
    assert list(head.state_dict()) == ["1.weight", "1.bias"]


def test_a_head_with_other_classes_is_the_adapters_own(tmp_path: Path):
    model = attached()
    model.reset_classifier(3)
    file = refold.save(model, tmp_path / "a.safetensors")
    again = build("vit")
    again.reset_classifier(3)
    refold.load(again, file)
    assert torch.allclose(again(images(again)), model(images(model)), atol=1e-6)


def test_what_trains_and_is_not_saved_is_named(tmp_path: Path):
    model = attached()
    model.blocks[0].mlp.fc1.requires_grad_(True)
    with pytest.raises(refold.StoreError, match=r"blocks\.0\.mlp\.fc1\.weight: trains, but is no part of the adapter"):
        refold.save(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    model.blocks[0].mlp.fc1.weight.requires_grad_(False)
    model.blocks[0].mlp.fc1.bias.requires_grad_(False)
    refold.save(model, tmp_path / "a.safetensors")
    refold.attach(model, refold.LoRA(rank=2), name="second")
    refold.save(model, tmp_path / "b.safetensors", name="default")


@pytest.mark.parametrize("method", [METHOD, refold.LoRA(rank=2)], ids=str)
def test_pruned_after_the_attach(method):
    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(images(model))

    model = attached(method)
    layer = model.blocks[0].attn.qkv
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(refold.MergeError if method is METHOD else refold.SiteError, match="it was pruned or param"):
        refold.merge(model)
    prune.remove(layer, "weight")
    before = run(model)
    refold.merge(model)
    assert torch.allclose(run(model), before, atol=1e-5)
