"""Local weight files: formats, wrappers, resizing, and strictness."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from refold import BackboneError, backbones

CLASSES = 7


@pytest.fixture(scope="module")
def vit():
    """A model with random weights, everywhere different from what a fresh one holds."""
    torch.manual_seed(0)
    model = backbones.load("test_vit", pretrained=False, num_classes=CLASSES).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def same(left: torch.nn.Module, right: torch.nn.Module, *, ignore: tuple[str, ...] = ()) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[key], theirs[key]) for key in mine if not key.startswith(ignore)
    )


def google_arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The arrays of Google's ``.npz`` layout, written from its description rather than from timm's reader."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    width, heads = model.embed_dim, model.blocks[0].attn.num_heads
    arrays = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for index in range(len(model.blocks)):
        here, there = f"blocks.{index}", f"Transformer/encoderblock_{index}"
        attention = f"{there}/MultiHeadDotProductAttention_1"
        projections = zip(
            ("query", "key", "value"),
            state[f"{here}.attn.qkv.weight"].reshape(3, width, width),
            state[f"{here}.attn.qkv.bias"].reshape(3, heads, -1),
            strict=True,
        )
        for name, weight, bias in projections:
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias
        arrays[f"{attention}/out/kernel"] = state[f"{here}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{here}.attn.proj.bias"]
        for number, layer in ((0, "norm1"), (2, "norm2")):
            arrays[f"{there}/LayerNorm_{number}/scale"] = state[f"{here}.{layer}.weight"]
            arrays[f"{there}/LayerNorm_{number}/bias"] = state[f"{here}.{layer}.bias"]
        for number, layer in ((0, "fc1"), (1, "fc2")):
            arrays[f"{there}/MlpBlock_3/Dense_{number}/kernel"] = state[f"{here}.mlp.{layer}.weight"].T
            arrays[f"{there}/MlpBlock_3/Dense_{number}/bias"] = state[f"{here}.mlp.{layer}.bias"]
    return arrays


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"model_ema": state, "model": {key: torch.zeros_like(value) for key, value in state.items()}},
    ],
    ids=["plain", "state_dict", "model-module", "model_ema"],
)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_pytorch_files_load_out_of_their_usual_wrappers(vit, tmp_path, wrap, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(vit.state_dict()), path)
    assert same(backbones.load("test_vit", weights=path).model, vit)


def test_safetensors_load_and_the_model_keeps_no_second_copy(vit, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(vit.state_dict(), path)
    model = backbones.load("test_vit", weights=str(path)).model
    assert same(model, vit)
    assert "state_dict" not in model.pretrained_cfg


def test_the_head_is_kept_or_fresh_as_asked(vit, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(vit.state_dict(), path)
    kept = backbones.load("test_vit", weights=path).model
    assert torch.equal(kept.head.weight, vit.head.weight)
    for classes in (3, CLASSES):
        fresh = backbones.load("test_vit", weights=path, num_classes=classes).model
        assert fresh.head.weight.shape == (classes, 64)
        if classes == CLASSES:
            assert not torch.equal(fresh.head.weight, vit.head.weight)
            assert same(fresh, vit, ignore=("head.",))


def test_a_file_without_a_head_gives_features(vit, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({key: value for key, value in vit.state_dict().items() if not key.startswith("head.")}, path)
    model = backbones.load("test_vit", weights=path).model
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 64)


def test_positions_are_resized_and_the_stem_is_adapted(vit, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(vit.state_dict(), path)
    model = backbones.load("test_vit", weights=path, image_size=96, in_chans=1).model
    assert model.pos_embed.shape[1] == 6 * 6 + 1
    stem = vit.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, stem)
    assert same(model, vit, ignore=("pos_embed", "patch_embed."))


def test_a_file_saved_with_one_channel_loads_into_one_channel(tmp_path, caplog):
    grey = backbones.load("test_convnext", pretrained=False, in_chans=1).model
    path = tmp_path / "weights.safetensors"
    save_file(grey.state_dict(), path)
    assert same(backbones.load("test_convnext", weights=path, in_chans=1).model, grey)
    assert not caplog.records


def test_google_npz_loads_with_its_head(vit, tmp_path):
    path = tmp_path / "ViT.npz"
    np.savez(path, **google_arrays(vit))
    assert same(backbones.load("test_vit", weights=path).model, vit)


def test_google_npz_adapts_size_channels_and_classes(vit, tmp_path):
    path = tmp_path / "ViT.npz"
    np.savez(path, **google_arrays(vit))
    model = backbones.load("test_vit", weights=path, image_size=96, in_chans=1, num_classes=2).model
    assert same(model.blocks, vit.blocks)
    assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 96, 96)).shape == (1, 2)


def test_a_head_behind_pre_logits_is_left_out(vit, tmp_path):
    path = tmp_path / "ViT.npz"
    extra = {"pre_logits/kernel": np.zeros((64, 64), np.float32), "pre_logits/bias": np.zeros(64, np.float32)}
    np.savez(path, **google_arrays(vit), **extra)
    model = backbones.load("test_vit", weights=path).model
    assert isinstance(model.head, torch.nn.Identity)


def test_npz_of_another_architecture_is_refused(vit, tmp_path):
    path = tmp_path / "ViT.npz"
    arrays = google_arrays(vit)
    np.savez(path, **arrays)
    with pytest.raises(BackboneError, match=r"does not fit test_vit3"):
        backbones.load("test_vit3", weights=path)
    np.savez(path, **arrays, **{"Transformer/encoderblock_6/LayerNorm_0/scale": np.zeros(64, np.float32)})
    with pytest.raises(BackboneError, match="it has 7 blocks, not 6"):
        backbones.load("test_vit", weights=path)
    with pytest.raises(BackboneError, match=r"cannot read \.npz checkpoints"):
        backbones.load("test_convnext", weights=path)


def test_layer_scale_missing_from_npz_is_noticed(tmp_path):
    """timm's loader would leave LayerScale at its tiny initial value without a word."""
    name, path = "deit3_small_patch16_224", tmp_path / "ViT.npz"
    np.savez(path, **google_arrays(backbones.load(name, pretrained=False).model))
    with pytest.raises(BackboneError, match=r"missing blocks\.0\.ls1\.gamma, .* and 20 more"):
        backbones.load(name, weights=path)


def test_another_architecture_is_refused_with_the_first_keys(vit, tmp_path):
    path = tmp_path / "weights.safetensors"
    state = vit.state_dict()
    save_file({key: value for key, value in state.items() if ".attn." not in key} | {"odd": torch.zeros(1)}, path)
    with pytest.raises(BackboneError) as caught:
        backbones.load("test_vit", weights=path)
    text = str(caught.value)
    assert str(path) in text
    assert "missing blocks.0.attn.qkv.weight, blocks.0.attn.qkv.bias" in text
    assert "and 20 more" in text
    assert "unexpected odd" in text
    save_file(state | {"norm.weight": torch.zeros(5)}, path)
    with pytest.raises(BackboneError, match=r"of another shape: norm.weight is \[5\], not \[64\]"):
        backbones.load("test_vit", weights=path)


class _Harmful:
    def __reduce__(self):
        return (os.system, ("true",))


def test_unreadable_files_are_one_clear_error(vit, tmp_path):
    def refused(name: str, message: str) -> None:
        with pytest.raises(BackboneError, match=message):
            backbones.load("test_vit", weights=tmp_path / name)

    refused("absent.pth", "no such weight file")
    (tmp_path / "weights.h5").write_bytes(b"")
    refused("weights.h5", "unknown kind of weight file '.h5'")
    save_file(vit.state_dict(), tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-100])
    refused("cut.safetensors", "cannot be read as weights")
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps({"state_dict": _Harmful()}))
    refused("harmful.pth", "cannot be read as weights")
    torch.save({"teacher": {"a": torch.zeros(1)}, "student": {}}, tmp_path / "nested.pth")
    refused("nested.pth", r"no tensors at its top level \(keys: teacher, student\)")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 not a zip file")
    refused("cut.npz", "cannot be read as an .npz checkpoint")
