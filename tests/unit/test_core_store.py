"""Adapter files: what they hold, whose backbone they fit, and how they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import refold
from adapter_files import METHOD, refused
from refold import store
from refold.inspection import description
from refold.store import read_header
from zoo import CLASSES, build, images, perturb


@pytest.fixture
def model() -> nn.Module:
    found = refold.attach(build("vit"), METHOD)
    perturb(refold.trainable_parameters(found))
    return found


@pytest.fixture
def file(model, tmp_path) -> Path:
    return refold.save(model, tmp_path / "adapter.safetensors")


# -- what a file holds ---------------------------------------------------------------------------------------------


def test_the_header_says_what_the_file_is(model, tmp_path):
    preprocessing = refold.Preprocessing(size=(32, 32), mean=(0.5,), std=(0.25,), interpolation="bilinear")
    refold.describe(
        model,
        backbone="timm/test_vit",
        classes=["cat", "dog", "Größe"],
        preprocessing=preprocessing,
        task="classify",
        note={"epochs": 3},
    )
    header = read_header(refold.save(model, tmp_path / "a.safetensors"))
    assert header.name == "default"
    assert header.method == METHOD
    assert header.backbone == "timm/test_vit"
    assert header.architecture.endswith("VisionTransformer")
    assert header.classes == ("cat", "dog", "Größe")
    assert header.preprocessing == preprocessing
    assert header.task == "classify"
    assert header.extra == {"note": {"epochs": 3}}
    assert header.head == ("head",)
    assert header.refold == refold.__version__
    assert [site[0] for site in header.sites] == [r.path for r in refold.explain(model).rows if r.slot == "input"]
    other = refold.load(build("vit"), tmp_path / "a.safetensors")
    assert description(other) == description(model) | {"backbone": "timm/test_vit"}


def test_the_file_holds_adapter_and_head_and_nothing_of_the_backbone(file):
    names = set(load_file(file))
    assert {n for n in names if n.startswith("model/")} == {"model/head.weight", "model/head.bias"}
    rest = {n for n in names if not n.startswith("model/")}
    assert all(n.startswith("adapter/blocks.") for n in rest)
    assert len(rest) == 4 * 4


@pytest.mark.parametrize(
    "method", [refold.RepAdapter(rank=4, sites=("attention", "blocks.1.mlp.fc2")), refold.LoRA(3, 0.5, 0.2)]
)
def test_hyper_parameters_survive(method, tmp_path):
    model = refold.attach(build("vit"), method)
    path = refold.save(model, tmp_path / "a.safetensors")
    assert read_header(path).method == method
    other = refold.load(build("vit"), path)
    assert [r.path for r in refold.explain(other).rows] == [r.path for r in refold.explain(model).rows]


def test_what_trains_in_place_beside_the_adapter_survives_a_merge(tmp_path):
    """A bias that is trained and then takes up the shift is stored as trained, not as folded."""
    model = refold.attach(build("vit"), METHOD, trainable=("head", "blocks.0.attn.qkv.bias", "norm"))
    perturb(refold.trainable_parameters(model))
    x = images(model)
    output = model(x).detach()
    before = load_file(refold.save(model, tmp_path / "before.safetensors"))
    refold.merge(model)
    path = refold.save(model, tmp_path / "after.safetensors")
    after = load_file(path)
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert torch.equal(refold.load(build("vit"), path)(x), output)


def test_a_name_of_ones_own(file):
    model = refold.load(build("vit"), file, name="mine")
    assert any(".refold.mine." in n for n in model.state_dict())
    refold.load(model, file)
    assert any(".refold.default." in n for n in model.state_dict())


def test_a_model_that_takes_no_images_needs_an_example_again(tmp_path):
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embed, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
            self.project, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.project(self.norm(self.embed(tokens))).mean(1))

    tokens = torch.randint(0, 10, (2, 5))
    model = refold.attach(Text().eval(), METHOD, example=tokens)
    assert refold.explain(model).rows[0].shift == "norm norm"
    perturb(refold.trainable_parameters(model))
    path = refold.save(model, tmp_path / "a.safetensors")
    refused(path, "probing forward failed", Text())
    other = refold.load(Text().requires_grad_(False).eval(), path, example=tokens)
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("built_inside", [False, True])
def test_loading_in_inference_mode(file, model, built_inside):
    with torch.inference_mode(built_inside):
        other = build("vit")
    with torch.inference_mode():
        refold.load(other, file)
        x = images(other)
        assert torch.equal(other(x), model(x))
        refold.merge(other)
        torch.testing.assert_close(other(x), model(x))
        refold.unmerge(other)
        assert torch.equal(other(x), model(x))


# -- the backbone's fingerprint ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_backbone_in_another_dtype_fits(file, model, dtype):
    other = refold.load(build("vit", dtype), file)
    x = images(other)
    torch.testing.assert_close(other(x).float(), model(x.float()), rtol=0.1, atol=0.1)


def test_the_same_backbone_with_another_head_fits(file):
    model = build("vit")
    model.reset_classifier(11)
    refold.load(model, file)
    assert model(images(model)).shape == (2, CLASSES)


def test_the_same_backbone_at_another_resolution_fits(file):
    model = build("vit")
    model.set_input_size((48, 48))
    refold.load(model, file)
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, CLASSES)


def test_a_backbone_that_already_has_an_adapter_still_is_the_same(file):
    model = build("vit")
    refold.attach(model, refold.FullFineTune(), name="full")
    perturb(refold.trainable_parameters(model))
    refold.load(model, file)


def test_another_backbone_is_refused_unless_forced(file):
    refused(file, "other values", _moved(build("vit"), "blocks.1.mlp.fc2.weight"))
    refused(file, "norm.bias has other values", _moved(build("vit"), "norm.bias"))
    for family in ("vit_with_registers", "vit_without_qkv_bias", "swin", "resnet"):
        refused(file, "made for another backbone .*: its tensors have other names", build(family))
    model = _moved(build("vit"), "norm.bias")
    refold.load(model, file, force=True)


def _moved(model: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name).add_(0.5)
    return model


def test_a_forced_load_onto_another_architecture_is_still_checked(file):
    target = build("resnet")
    with pytest.raises(refold.StoreError, match=r"other sites|does not fit"):
        refold.load(target, file, force=True)
    assert "_refold" not in target.__dict__


# -- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pt", "a", "a.safetensors.txt"])
def test_a_name_without_the_suffix_is_refused(model, tmp_path, name):
    with pytest.raises(refold.StoreError, match=r"does not end in .safetensors"):
        refold.save(model, tmp_path / name)


def test_a_folder_that_does_not_exist_is_named(model, tmp_path):
    with pytest.raises(refold.StoreError, match="nowhere: the folder does not exist"):
        refold.save(model, tmp_path / "nowhere" / "a.safetensors")


def test_a_folder_in_the_place_of_the_file_is_refused(model, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(refold.StoreError, match="cannot be written"):
        refold.save(model, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("stage", ["save_file", "fsync"])
def test_a_failed_write_leaves_the_old_file(model, file, monkeypatch, error, stage):
    old = file.read_bytes()
    perturb(refold.trainable_parameters(model))

    def fail(*args: object, **kwargs: object) -> None:
        if stage == "save_file":
            Path(str(args[1])).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(*((store, "save_file") if stage == "save_file" else (store.os, "fsync")), fail)
    with pytest.raises(refold.StoreError, match=r"adapter.safetensors: cannot be written .No space left"):
        refold.save(model, file)
    assert file.read_bytes() == old
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_an_interrupt_while_writing_leaves_the_old_file(model, file, monkeypatch):
    old = file.read_bytes()

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        refold.save(model, file)
    assert file.read_bytes() == old
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_description_that_is_no_json_is_refused(model, tmp_path):
    refold.describe(model, note=object())
    with pytest.raises(refold.StoreError, match="does not fit in JSON"):
        refold.save(model, tmp_path / "a.safetensors")
    refold.describe(model, note=float("nan"))
    with pytest.raises(refold.StoreError, match="does not fit in JSON"):
        refold.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_get_the_permissions_of_any_new_file(file, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


def test_saving_an_unknown_adapter_is_refused(model, tmp_path):
    with pytest.raises(refold.SiteError, match=r"no adapter named 'other'.*Attached: default"):
        refold.save(model, tmp_path / "a.safetensors", name="other")
