"""What a PEFT checkpoint may not ask for, and what cannot be written as one: refused, with reasons."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refold
from peft_files import Odd, logits, rewrite, saved_by_peft, timm_model
from zoo import build, images

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own

KEY = "base_model.model.blocks.0.attn.qkv"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved_by_peft(tmp_path, build("vit"), target_modules=["qkv"], modules_to_save=["head"])
    return tmp_path


def refused(folder: Path, reason: str, model: nn.Module | None = None, kind: type = refold.StoreError, **options: Any):
    """Reading raises one clear error and leaves the model as it was."""
    model = build("vit") if model is None else model
    before, names = {n: v.clone() for n, v in model.state_dict().items()}, model.__dict__.keys() | set()
    with pytest.raises(kind, match=reason):
        refold.load_peft(model, folder, **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert model.__dict__.keys() == names


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["blocks.0.attn.qkv.weight"]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 1}),
        ("something_of_next_year", "on"),
        ("r", 0),
        ("r", 10**9),
        ("lora_alpha", 0),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.5),
        ("use_rslora", "yes"),
        ("rank_pattern", {"qkv": -1}),
        ("alpha_pattern", ["qkv"]),
        ("alpha_pattern", {"(a+)+b": 3}),
        ("alpha_pattern", {"(qkv": 3}),
        ("alpha_pattern", {".*.*.*.*x": 3}),
        ("modules_to_save", "head"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_named(folder, key, value):
    rewrite(folder, **{key: value})
    refused(folder, rf"adapter_config.json: {key}")


def test_a_key_that_contradicts_the_tensors_is_refused(folder):
    rewrite(folder, r=8)
    refused(folder, r"blocks\.0\.attn\.qkv: lora_A has shape \(4, 32\), but the configuration says rank 8")
    rewrite(folder, r=4, use_dora=True)
    refused(folder, r"qkv: holds \['down', 'up'\], needs \['down', 'magnitude', 'up'\]")
    rewrite(folder, use_dora=False, modules_to_save=["head", "norm_pre"])
    refused(folder, "modules_to_save has 'norm_pre', of which the file holds nothing")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({f"{KEY}.lora_B.weight": None}, r"qkv: holds \['down'\], needs \['down', 'up'\]"),
        ({f"{KEY}.lora_A.weight": None}, r"qkv: holds \['up'\], needs"),
        ({f"{KEY}.lora_A.weight": torch.zeros(4, 31)}, r"shape \(4, 31\), this model needs \(4, 32\)"),
        ({f"{KEY}.lora_A.weight": torch.zeros(4, 32, 1, 1)}, "shape"),
        ({f"{KEY}.lora_A.weight": torch.zeros(())}, "shape"),
        ({f"{KEY}.lora_B.weight": torch.zeros(95, 4)}, r"shape \(95, 4\), this model needs \(96, 4\)"),
        ({f"{KEY}.lora_B.weight": torch.zeros(96, 4, dtype=torch.int32)}, "holds torch.int32"),
        ({f"{KEY}.lora_B.bias": torch.zeros(95)}, r"lora_B.bias has shape \(95,\)"),
        ({f"{KEY}.lora_magnitude_vector": torch.ones(96)}, "holds .*magnitude"),
        ({f"{KEY}.weight": torch.zeros(96, 32)}, "both the weight and an adapter of it"),
        ({f"{KEY}.base_layer.weight": torch.zeros(96, 32)}, "both the weight and an adapter of it"),
        ({f"{KEY}.lora_embedding_A": torch.zeros(4, 32)}, "no place for .*lora_embedding_A"),
        ({f"{KEY}.lora_E": torch.zeros(4, 32)}, "no place for .*lora_E"),
        ({"blocks.0.attn.qkv.lora_A.weight": torch.zeros(4, 32)}, "does not begin with base_model.model."),
        ({"base_model.model.blocks.7.attn.qkv.lora_A.weight": torch.zeros(4, 32)}, "no module blocks.7.attn.qkv"),
        ({"base_model.model.head.weight": torch.zeros(5, 32)}, r"head.weight has shape \(5, 32\), this model needs"),
        ({"base_model.model.extra.weight": torch.zeros(5)}, "no place for base_model.model.extra.weight"),
        ({"base_model.model.blocks.0.norm1.lora_A.weight": torch.zeros(4, 32)}, "LayerNorm is neither"),
        (
            dict.fromkeys(f"{KEY[:23]}.{b}.attn.qkv.lora_{x}.weight" for b in (0, 1) for x in "AB"),
            "holds no LoRA tensors",
        ),
    ],
    ids=range(19),
)
def test_a_tensor_that_does_not_fit_is_named(folder, tensors, reason):
    rewrite(folder, tensors)
    refused(folder, reason)


def test_broken_files_are_refused(folder):
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    text, raw = config.read_text(), weights.read_bytes()
    for broken in ("", "[1]", "{", "[" * 100_000, "\x00"):
        config.write_text(broken)
        refused(folder, "adapter_config.json: ")
    config.write_text(text + " " * 2**22)
    refused(folder, "implausibly large")
    config.write_text(text)
    for broken in (b"", raw[:-4], raw[:100], b"\xff" * 8 + raw[8:]):
        weights.write_bytes(broken)
        refused(folder, "adapter_model.safetensors: ")
    weights.rename(folder / "adapter_model.bin")
    refused(folder, r"safetensors: does not exist.*pickles \(adapter_model.bin\) are not opened")
    config.unlink()
    refused(folder, "adapter_config.json: cannot be read")


def test_the_rules_of_attaching_hold(folder):
    model = refold.attach(build("vit"), refold.RepAdapter())
    refused(folder, "'default' is attached already", model, refold.SiteError)
    refold.load_peft(model, folder, name="theirs")
    expected = logits(refold.load_peft(build("vit"), folder), torch.ones(2, 3, 32, 32))
    assert torch.equal(logits(model, torch.ones(2, 3, 32, 32)), expected)
    refold.merge(model)
    refused(folder, "'theirs' is merged", model, refold.SiteError, name="third")


@pytest.mark.parametrize(
    ("make", "target", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4)), "0", "on grouped convolutions PEFT's adapter mixes"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", dilation=2)), "0", "leaves out .* dilation"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")), "0", "padding mode"),
        (partial(build, "torchvision_vit"), r".*self_attention", "adds the change of out_proj twice"),
        (
            partial(timm_model, "beit_base_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2),
            r".*qkv",
            "past PEFT's adapter",
        ),
        (partial(timm_model, "test_nfnet"), r"stages.*conv1", "a forward of its own"),
    ],
    ids=["grouped", "dilated", "circular", "packed_attention", "bypassed", "standardised"],
)
def test_layers_on_which_peft_is_wrong_are_refused(make, target, reason, tmp_path):
    """PEFT's merged weights are another function than its adapted model on each of these."""
    saved_by_peft(tmp_path, make(), target_modules=target)
    model = make()
    example = images(model) if len(list(model.modules())) > 2 else torch.randn(1, 4, 9, 9)
    refused(tmp_path, reason, model, example=example)


def test_a_layer_whose_name_is_a_role_is_taken_for_itself_or_refused(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(6, 6)
            self.block = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(6, 6)})})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block["mlp"]["fc1"](self.mlp(x))

    saved_by_peft(tmp_path, Named(), target_modules=r"mlp")
    refused(tmp_path, "not those that their names stand for", Named(), example=torch.randn(2, 6))


# -- writing ----------------------------------------------------------------------------------------------------


def bare(layer: nn.Module) -> nn.Module:
    method = refold.LoRA(rank=4, sites="0")
    return refold.attach(nn.Sequential(layer), method, example=torch.randn(1, 4, 7, 7), trainable=())


def bypassed() -> nn.Module:
    beit = timm_model("beit_base_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    return refold.attach(beit, refold.LoRA(sites="*.qkv"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: refold.attach(build("vit"), refold.RepAdapter()), "RepAdapter has no counterpart in PEFT"),
        (lambda: refold.attach(build("vit"), refold.LoRA(), trainable="cls_token"), "cls_token: trained in place"),
        (lambda: bare(nn.Conv2d(4, 8, 3, groups=2)), "on grouped convolutions PEFT's adapter mixes all channels"),
        (lambda: bare(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")), "leaves out .* padding mode"),
        (lambda: bare(nn.Conv2d(4, 8, 3, dilation=2)), "leaves out .* dilation"),
        (lambda: bare(nn.ConvTranspose2d(4, 8, 3)), "neither a Linear nor a convolution"),
        (lambda: refold.attach(build("torchvision_vit"), refold.LoRA()), "adds the change of out_proj twice"),
        (bypassed, "past PEFT's adapter"),
    ],
    ids=range(8),
)
def test_what_peft_cannot_hold_is_not_written(make, reason, tmp_path):
    with pytest.raises(refold.StoreError, match=reason):
        refold.save_peft(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_peft_would_take_for_another_is_not_written(tmp_path):
    model = refold.attach(Odd(), refold.LoRA(sites="inner_fc"), example=torch.randn(3, 6), trainable="fc")
    with pytest.raises(refold.StoreError, match=r"PEFT would take inner\.fc for the head 'fc' too"):
        refold.save_peft(model, tmp_path / "out")


def test_writing_needs_an_adapter_its_base_weights_and_a_place(tmp_path):
    with pytest.raises(refold.SiteError, match="no adapter is attached"):
        refold.save_peft(build("vit"), tmp_path / "out")
    model = refold.attach(build("vit"), refold.DoRA())
    with pytest.raises(refold.StoreError, match="cannot be written"):
        refold.save_peft(model, tmp_path / "no" / "such" / "folder")
    refold.merge(model, keep_base=False)
    with pytest.raises(refold.StoreError, match="merged without its base weights"):
        refold.save_peft(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
