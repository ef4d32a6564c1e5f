"""Adapter files: what they hold, and every way in which one can be wrong."""

from __future__ import annotations

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import refold
from refold import store
from refold.attachment import description
from refold.store import read_header
from zoo import CLASSES, build, images, perturb

METHOD = refold.RepAdapter(rank=4)


@pytest.fixture
def model() -> nn.Module:
    found = refold.attach(build("vit"), METHOD)
    perturb(refold.trainable_parameters(found))
    return found


@pytest.fixture
def file(model, tmp_path) -> Path:
    return refold.save(model, tmp_path / "adapter.safetensors")


def refused(path: Path, reason: str, target: nn.Module | None = None, kind: type = refold.StoreError) -> None:
    """Loading raises one clear error and leaves the model as it was."""
    target = build("vit") if target is None else target
    before = {n: v.clone() for n, v in target.state_dict().items()}
    names = target.__dict__.keys()
    with pytest.raises(kind, match=reason):
        refold.load(target, path)
    after = target.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert target.__dict__.keys() == names


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Rewrite a file with a changed header and with tensors replaced (None: left out)."""
    with store.safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["refold"])
    stored = load_file(path)
    for name, value in tensors.items():
        if value is None:
            del stored[name]
        else:
            stored[name] = value
    if change is not None:
        change(header)
    save_file(stored, path, metadata={"refold": json.dumps(header)})


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


@pytest.mark.parametrize("method", [refold.RepAdapter(rank=4, sites=("attention", "blocks.1.mlp.fc2")), refold.LoRA(3, 0.5, 0.2)])
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
    with pytest.raises(refold.StoreError, match="other sites|does not fit"):
        refold.load(target, file, force=True)
    assert "_refold" not in target.__dict__


# -- broken files --------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_is_cut(file, tmp_path):
    data = file.read_bytes()
    cuts = {0, 1, 7, 8, 9, 100, len(data) - 1} | {len(data) * i // 40 for i in range(40)}
    for cut in sorted(cuts):
        short = tmp_path / "short.safetensors"
        short.write_bytes(data[:cut])
        with pytest.raises(refold.StoreError, match="truncated|not a valid safetensors"):
            read_header(short)
        with pytest.raises(refold.StoreError):
            refold.load(build("vit"), short)


def test_bytes_too_many_are_refused(file):
    file.write_bytes(file.read_bytes() + b"\0" * 5)
    refused(file, "its header promises")


@pytest.mark.parametrize("length", [2**63, 2**40, 2**31, 17 * 2**20, 1, 0])
def test_a_header_of_impossible_length_is_refused_unread(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    refused(path, "not a safetensors file, or truncated")


def test_random_bytes_are_refused(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "a.safetensors"
    for _ in range(100):
        body = rng.randbytes(rng.randrange(200))
        path.write_bytes(rng.choice([b"", struct.pack("<Q", len(body))]) + body)
        with pytest.raises(refold.StoreError):
            read_header(path)


def test_flipped_bytes_never_raise_anything_but_our_errors(file, tmp_path):
    data = bytearray(file.read_bytes())
    rng = random.Random(0)
    header = struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "flipped.safetensors"
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(header + 8)] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            refold.load(build("vit"), path)
        except refold.RefoldError:
            continue


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        "[" * 100_000 + "]" * 100_000,
        "[]",
        "null",
        '"text"',
        "1" * 10_000,
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"data_offsets": []}}',
        '{"a": {"data_offsets": [0, "x"]}}',
        '{"a": {"data_offsets": [0, 1e400]}}',
        '{"a": {"data_offsets": [0, 0], "dtype": "F32", "shape": [-1]}}',
        '{"a": {"data_offsets": [0, 0], "dtype": "F99", "shape": [0]}}',
        '{"a": {"data_offsets": [0, 0], "dtype": "F32", "shape": [99999999999]}}',
        '{"__metadata__": 3}',
        '{"__metadata__": {"refold": 3}}',
        "\ud800",
    ],
    ids=range(18),
)
def test_json_that_is_no_header(tmp_path, text):
    data = text.encode("utf-8", "surrogatepass")
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    refused(path, "not a valid safetensors file|not a refold adapter|truncated")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "3", "null", '{"format": 1}', '{"format": "1"}', '{"format": null}'])
def test_refold_metadata_that_is_no_header(tmp_path, text):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"refold": text})
    refused(path, "the header is malformed|written in format")


def test_an_oversized_header_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"refold": " " * (5 * 2**20)})
    refused(path, "implausibly large")


def test_another_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    refused(path, "not a refold adapter.*Write it with refold.save")


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "none.safetensors", r"none.safetensors: cannot be read \(No such file")
    refused(tmp_path, "cannot be read")
    refused(Path("a\0b"), "not a valid safetensors file")


def test_a_newer_format_is_refused(file):
    rewrite(file, lambda h: h.update(format=2))
    refused(file, "written in format 2, this refold reads up to 1.*Upgrade refold")


def test_an_unknown_method_is_refused(file):
    rewrite(file, lambda h: h["method"].update(name="Telepathy"))
    refused(file, "unknown method 'Telepathy'.*newer refold")


def test_an_unknown_hyper_parameter_is_refused(file):
    rewrite(file, lambda h: h["method"].update(alpha=3))
    refused(file, r"unknown hyper-parameter\(s\) \['alpha'\]")


def test_a_missing_site_is_refused(file):
    rewrite(file, lambda h: h["sites"].pop())
    refused(file, "other sites in this backbone .first difference: blocks.1.mlp.fc1")


def test_a_site_that_does_not_exist_is_refused(file):
    rewrite(file, lambda h: h["sites"][0].__setitem__(0, "blocks.7.attn.qkv"))
    refused(file, "other sites")


def test_missing_and_unexpected_tensors_are_refused(file):
    rewrite(file, **{"adapter/blocks.0.attn.qkv/up": None})
    refused(file, r"missing tensors \['adapter/blocks.0.attn.qkv/up'\]")
    rewrite(file, **{"adapter/blocks.0.attn.qkv/up": torch.zeros(32, 2), "model/norm.weight": torch.zeros(32)})
    refused(file, r"unexpected tensors \['model/norm.weight'\]")


@pytest.mark.parametrize(
    "tensors",
    [
        {"adapter/blocks.0.attn.qkv/up": torch.zeros(32, 4)},
        {"adapter/blocks.0.attn.qkv/up": torch.zeros(64)},
        {"adapter/blocks.0.attn.qkv/down": torch.zeros(0, 32)},
        {"model/head.weight": torch.zeros(5, 32)},  # weight and bias disagree
        {"model/head.bias": torch.zeros(5)},
        {"model/head.weight": torch.zeros(5, 31), "model/head.bias": torch.zeros(5)},
        {"model/head.weight": torch.zeros(5, 32, 1), "model/head.bias": torch.zeros(5)},
        {"model/head.weight": torch.zeros(0, 32), "model/head.bias": torch.zeros(0)},
        {"model/head.bias": torch.zeros(())},
    ],
    ids=range(9),
)
def test_wrong_shapes_are_refused(file, tensors):
    rewrite(file, **tensors)
    refused(file, "has shape .*, this model needs")


def test_only_the_classifier_may_have_another_size(tmp_path):
    """A part of the backbone that was trained in place keeps its shape, whatever the file says."""
    model = refold.attach(build("vit"), METHOD, trainable=("head", "norm", "blocks.1.mlp.fc2"))
    path = refold.save(model, tmp_path / "a.safetensors")
    for name, shape in {"norm.weight": (33,), "blocks.1.mlp.fc2.weight": (33, 128)}.items():
        good = load_file(path)[f"model/{name}"]
        rewrite(path, **{f"model/{name}": torch.zeros(shape)})
        refused(path, f"model/{name} has shape")
        rewrite(path, **{f"model/{name}": good})
    refold.load(build("vit"), path)


def test_gigantic_ranks_allocate_nothing(tmp_path):
    """An honest attach of this rank would take a gigabyte."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 1)
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.fill_(0.01)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    model, x = Wide(), torch.ones(1, 4096)
    path = refold.save(refold.attach(model, refold.LoRA(rank=1), example=x), tmp_path / "a.safetensors")
    refold.detach(model)
    rewrite(path, lambda h: h["method"].update(rank=65536))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(refold.StoreError, match="has shape"):
        refold.load(model, path, example=x)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200  # MiB
    rewrite(path, lambda h: h["method"].update(rank=2**62))
    with pytest.raises(refold.StoreError, match="rank=.* is not valid"):
        refold.load(model, path, example=x)


WEIRD = [None, True, -1, 0, 3, 10**30, 1e300, float("inf"), float("nan"), "", "x" * 1000, [], {}, [[]], [None], {"a": []}]


def test_no_value_of_any_field_raises_anything_but_our_errors(file, tmp_path):
    with store.safe_open(file, framework="pt") as opened:
        text = opened.metadata()["refold"]
    tensors = load_file(file)
    path = tmp_path / "weird.safetensors"
    fields = [(None, key) for key in json.loads(text)]
    fields += [("method", key) for key in ("name", "rank", "groups", "scale", "dropout", "sites")]
    fields += [("fingerprint", key) for key in ("tensors", "names", "samples")]
    sizes = {"size": [32, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic", "crop": "squash"}
    fields += [("preprocessing", key) for key in (*sizes, "crop_fraction")] + [("extra", "outputs")]
    survived, target = [], build("vit")
    for part, key in fields:
        for value in WEIRD:
            header = json.loads(text)
            header["preprocessing"] = {**sizes, "crop_fraction": 1.0}
            (header if part is None else header[part])[key] = value
            save_file(tensors, path, metadata={"refold": json.dumps(header)})
            try:
                refold.load(target, path)
            except refold.RefoldError:
                continue
            survived.append((part, key))
            refold.detach(target)
    # Only what loading does not depend on may be anything.
    free = {"backbone", "architecture", "refold", "task", "allow_new_bias", "classes", "extra", "name", "preprocessing"}
    free |= {"mean", "std", "size", "crop_fraction", "outputs", "scale", "dropout", "sites", "tensors"}
    assert {key for _, key in survived} <= free


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h["extra"].update(outputs=10**12), "asks for 1000000000000 outputs"),
        (lambda h: h["extra"].update(outputs="many"), "asks for 'many' outputs"),
        (lambda h: h.update(preprocessing=refold.Preprocessing(size=(10**6, 10**6)).to_json()), "asks for images"),
        (lambda h: h.update(backbone=""), "does not name its backbone"),
    ],
    ids=["outputs", "outputs of no number", "size", "no backbone"],
)
def test_from_pretrained_builds_nothing_implausible(file, change, reason):
    rewrite(file, change)
    with pytest.raises(refold.StoreError, match=reason):
        refold.from_pretrained(file)


def test_a_hub_that_cannot_be_reached_says_what_to_do():
    with pytest.raises(refold.StoreError, match=r"hf-hub:nobody/nothing: cannot be downloaded.*pass its path"):
        refold.load(build("vit"), "hf-hub:nobody/nothing")


# -- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pt", "a", "a.safetensors.txt"])
def test_a_name_without_the_suffix_is_refused(model, tmp_path, name):
    with pytest.raises(refold.StoreError, match="does not end in .safetensors"):
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
    with pytest.raises(refold.StoreError, match="adapter.safetensors: cannot be written .No space left"):
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
    with pytest.raises(refold.SiteError, match="no adapter named 'other'.*Attached: default"):
        refold.save(model, tmp_path / "a.safetensors", name="other")
