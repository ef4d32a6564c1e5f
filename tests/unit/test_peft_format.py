"""PEFT checkpoints in both directions, against PEFT's own logits and an independent formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import refold
from peft_files import Odd, logits, peft, saved_by_peft
from reference import formulas
from refold.hosting import hosted
from refold.state import state_of
from zoo import build, perturb, relative

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config).eval()


class Clips(nn.Module):
    """One convolution of each dimension, with a stride, padding "same", and none."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 4, 3, padding=1, stride=2, bias=False)
        self.plane = nn.Conv2d(4, 6, 3, padding="same")
        self.line = nn.Conv1d(6, 8, 3)
        self.mix = nn.Linear(8, 5)
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.plane(self.volume(x).mean(2)).flatten(2)
        return self.head(self.mix(self.line(x).mean(2)))


def clips() -> nn.Module:
    torch.manual_seed(0)
    return Clips().eval()


#: Model, an input of it, layers to adapt, the head.
BACKBONES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str] | str, list[str]]] = {
    "timm_vit": (partial(build, "vit"), (2, 3, 32, 32), ["qkv", "fc1", "patch_embed.proj"], ["head"]),
    "transformers_vit": (transformers_vit, (2, 3, 32, 32), ["q_proj", "v_proj", "fc1"], ["classifier"]),
    "resnet": (partial(build, "resnet"), (2, 3, 32, 32), r"layer.*\.conv\d", ["fc"]),
    "convnext": (partial(build, "convnext"), (2, 3, 32, 32), ["mlp.fc1", "mlp.fc2", "downsample.1"], ["head"]),
    "clips": (clips, (2, 1, 5, 9, 9), ["volume", "plane", "line", "mix"], ["head"]),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "without_a_head": {"modules_to_save": None},
}


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> str:
    return request.param


def noise(backbone: str) -> torch.Tensor:
    return torch.randn(BACKBONES[backbone][1], generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_peft_gives_pefts_logits(backbone, variant, tmp_path):
    make, _, targets, head = BACKBONES[backbone]
    options = {"target_modules": targets, "modules_to_save": head, **VARIANTS[variant]}
    expected = logits(saved_by_peft(tmp_path, make(), **options), noise(backbone))
    plain = make()
    untouched = {n: v.clone() for n, v in plain.state_dict().items()}
    base = logits(plain, noise(backbone))
    model = refold.load_peft(plain, tmp_path, example=noise(backbone))
    assert relative(expected, base) > 1e-2  # the adapter does something
    assert relative(logits(model, noise(backbone)), expected) < 1e-5
    refold.merge(model)
    assert relative(logits(model, noise(backbone)), expected) < 1e-5
    refold.detach(model)
    assert all(torch.equal(v, untouched[n]) for n, v in model.state_dict().items())
    assert not hosted(model)


#: What may decide about a layer in PEFT's configuration; the last two say nothing that the tensors do not say.
CHOICES: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"blocks.0.attn.qkv": 2, "fc1": 6}},
    "alphas": {"alpha_pattern": {r"blocks\.1\..*": 3, "blocks.0.mlp.fc1": 11}},
    "ranks_and_alphas_with_rslora": {
        "rank_pattern": {"^blocks.0.attn.qkv": 2},
        "alpha_pattern": {"fc1": 3},
        "use_rslora": True,
    },
    "dora_ranks": {"rank_pattern": {"qkv": 2}, "use_dora": True},
    "some_blocks": {"layers_to_transform": [1], "layers_pattern": "blocks"},
    "all_linear_without_some": {"target_modules": "all-linear", "exclude_modules": ["proj", "head"]},
    "the_head_adapted": {"target_modules": "all-linear", "modules_to_save": None},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dropout": {"lora_dropout": 0.3},
    "biases": {"bias": "all"},
    "biases_of_adapted_layers": {"bias": "lora_only"},
    "bias_of_b": {"lora_bias": True},
    "both_biases": {"lora_bias": True, "bias": "all"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_peft_can_choose_is_honoured(choice, tmp_path):
    options = {"target_modules": ["qkv", "fc1"], "modules_to_save": ["head"], **CHOICES[choice]}
    expected = logits(saved_by_peft(tmp_path, build("vit"), **options), noise("timm_vit"))
    model = refold.load_peft(build("vit"), tmp_path)
    assert relative(logits(model, noise("timm_vit")), expected) < 1e-5
    assert refold.merge(model).rel_l2 < 1e-5
    assert relative(logits(model, noise("timm_vit")), expected) < 1e-5
    refold.unmerge(model)
    refold.detach(model)
    plain = build("vit").state_dict()
    assert all(torch.equal(v, plain[n]) for n, v in model.state_dict().items())


def test_ranks_and_scales_are_shown_and_counted(tmp_path):
    saved_by_peft(
        tmp_path, build("vit"), target_modules=["qkv", "fc1"], rank_pattern={"qkv": 2}, alpha_pattern={"fc1": 3}
    )
    model = refold.load_peft(build("vit"), tmp_path, name="theirs")
    told = refold.explain(model)
    assert told.name == "theirs"
    assert "sites=('blocks.*.attn.qkv', 'blocks.*.mlp.fc1')" in told.method
    assert {row.path: row.parameters for row in told.rows} == {
        f"blocks.{i}.{path}": count for i in (0, 1) for path, count in (("attn.qkv", 2 * 128), ("mlp.fc1", 4 * 160))
    }
    method = state_of(model).record().method
    assert [method.at(f"blocks.0.{path}") for path in ("attn.qkv", "mlp.fc1")] == [(2, 3.0), (4, 0.75)]


def test_it_trains_on_as_peft_would(tmp_path):
    """The same trainable values: the adapter and the head, and nothing else."""
    wrapped = saved_by_peft(tmp_path, build("vit"), target_modules=["qkv"], modules_to_save=["head"], use_dora=True)
    model = refold.load_peft(build("vit"), tmp_path)
    theirs = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == theirs
    assert state_of(model).record().head == ("head",)


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_weight_is_the_formula_of_the_files_tensors(dora, tmp_path):
    saved_by_peft(tmp_path, build("vit"), target_modules=["qkv"], use_dora=dora, use_rslora=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    model = build("vit", torch.float64)
    plain = {n: v.numpy().copy() for n, v in model.state_dict().items()}
    refold.merge(refold.load_peft(model, tmp_path))
    for block in (0, 1):
        path = f"blocks.{block}.attn.qkv"
        key = f"base_model.model.{path}"
        down, up = (stored[f"{key}.lora_{part}.weight"].double().numpy() for part in "AB")
        weight, scale = plain[f"{path}.weight"], 6 / 4**0.5
        if dora:
            magnitude = stored[f"{key}.lora_magnitude_vector"].double().numpy()
            expected = formulas.dora(weight, down, up, magnitude, scale)
        else:
            expected = formulas.lora(weight, down, up, scale)
        found = model.state_dict()[f"{path}.weight"].numpy()
        # float64 throughout for LoRA; refold keeps a magnitude as a float64 factor of the weight's own length.
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_in_half_precision_is_read(tmp_path):
    saved_by_peft(tmp_path, build("vit"), target_modules=["qkv"])
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    wrapped = peft.PeftModel.from_pretrained(build("vit"), str(tmp_path)).eval()
    model = refold.load_peft(build("vit"), tmp_path)
    assert relative(logits(model, noise("timm_vit")), logits(wrapped, noise("timm_vit"))) < 1e-5


# -- writing ----------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[..., refold.LoRA]] = {"lora": refold.LoRA, "dora": refold.DoRA}
SITES = {
    "timm_vit": ("*.qkv", "*.fc1", "patch_embed.proj"),
    "transformers_vit": ("*q_proj", "*v_proj", "*fc1"),
    "resnet": ("*.conv1", "*.conv2"),
    "convnext": ("*.mlp.fc1", "*.mlp.fc2", "*.downsample.1"),
    "clips": ("volume", "plane", "line", "mix"),
}


def attached(backbone: str, method: refold.Method, **options: Any) -> nn.Module:
    model = refold.attach(BACKBONES[backbone][0](), method, example=noise(backbone), **options)
    torch.manual_seed(4)
    perturb(refold.trainable_parameters(model), 0.1)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_peft_gives_the_logits_of_what_refold_wrote(backbone, method, tmp_path):
    kind, sites = METHODS[method], SITES[backbone]
    overrides = ((sites[0], 2, 0.25), (sites[-1], 3, 1.7))
    model = attached(backbone, kind(rank=4, scale=0.7, sites=sites, overrides=overrides))
    expected = logits(model, noise(backbone))
    assert refold.save_peft(model, tmp_path / "out") == tmp_path / "out"
    wrapped = peft.PeftModel.from_pretrained(BACKBONES[backbone][0](), str(tmp_path / "out")).eval()
    assert relative(expected, logits(BACKBONES[backbone][0](), noise(backbone))) > 1e-2
    assert relative(logits(wrapped, noise(backbone)), expected) < 1e-5
    merged = wrapped.merge_and_unload()
    assert relative(logits(merged, noise(backbone)), expected) < 1e-5
    back = refold.load_peft(BACKBONES[backbone][0](), tmp_path / "out", example=noise(backbone))
    assert relative(logits(back, noise(backbone)), expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_written_merged_or_inactive_it_is_the_same_file(method, tmp_path):
    model = attached("timm_vit", METHODS[method](rank=4))
    refold.save_peft(model, tmp_path / "active")
    refold.attach(model, refold.RepAdapter(rank=4), name="other")
    perturb(refold.trainable_parameters(model))
    refold.save_peft(model, tmp_path / "inactive", name="default")
    refold.activate(model, "default")
    refold.merge(model)
    refold.save_peft(model, tmp_path / "merged")
    first = (tmp_path / "active" / "adapter_config.json").read_bytes()
    tensors = load_file(tmp_path / "active" / "adapter_model.safetensors")
    assert len(tensors) == (6 if method == "lora" else 8)
    for other in ("inactive", "merged"):
        assert (tmp_path / other / "adapter_config.json").read_bytes() == first
        found = load_file(tmp_path / other / "adapter_model.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], value) for key, value in tensors.items())


def test_what_another_adapter_trained_in_place_does_not_count(tmp_path):
    """A magnitude refers to the backbone's own weight, not to what full fine-tuning made of it."""
    wrapped = saved_by_peft(tmp_path / "theirs", build("vit"), target_modules=["qkv"], use_dora=True)
    model = refold.attach(build("vit"), refold.FullFineTune(), name="full")
    perturb(refold.trainable_parameters(model), 0.3)
    refold.load_peft(model, tmp_path / "theirs")
    assert relative(logits(model, noise("timm_vit")), logits(wrapped, noise("timm_vit"))) < 1e-5
    refold.activate(model, "full")
    refold.save_peft(model, tmp_path / "ours", name="default")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=3e-7, atol=0.0)


def test_a_converted_pissa_is_a_lora_and_reads_as_one(tmp_path):
    """PiSSA changes the backbone's weights; PEFT can write the same function as a LoRA on the original ones."""
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(build("vit"), config).eval()
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(str(tmp_path / "start"))
    perturb({n: p for n, p in wrapped.named_parameters() if p.requires_grad}, 0.1)
    start = str(tmp_path / "start")
    wrapped.save_pretrained(str(tmp_path / "out"), path_initial_model_for_weight_conversion=start)
    model = refold.load_peft(build("vit"), tmp_path / "out")
    assert relative(logits(model, noise("timm_vit")), logits(wrapped, noise("timm_vit"))) < 1e-5


@pytest.mark.parametrize("use_dora", [False, True])
def test_through_refold_and_back_a_checkpoint_keeps_its_values(use_dora, tmp_path):
    options = {"target_modules": ["qkv", "fc1"], "modules_to_save": ["head"], "rank_pattern": {"fc1": 2}}
    saved_by_peft(tmp_path / "theirs", build("vit"), use_dora=use_dora, **options)
    model = refold.load_peft(build("vit"), tmp_path / "theirs")
    path = refold.save(model, tmp_path / "adapter.safetensors")
    refold.save_peft(refold.load(build("vit"), path), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        # A magnitude is kept as a factor of the weight's length: one rounding more.
        torch.testing.assert_close(ours[key], value, rtol=3e-7 if "magnitude" in key else 0.0, atol=0.0)


def test_names_that_end_alike_are_kept_apart(tmp_path):
    """PEFT matches a name with every path that ends in it, and a dot in it with any character."""
    torch.manual_seed(0)
    plain, x = Odd().eval(), torch.randn(3, 6)
    method = refold.LoRA(rank=2, sites=("fc", "inner.fc", "inner_fc"), overrides=(("fc", 3, 0.5), ("inner.fc", 2, 2.0)))
    model = refold.attach(copy.deepcopy(plain), method, example=x, trainable=())
    perturb(refold.trainable_parameters(model), 0.3)
    refold.save_peft(model, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    assert relative(logits(wrapped, x), logits(model, x)) < 1e-5
    assert sum("lora_A" in n for n, _ in wrapped.named_parameters()) == 3
