"""Adapter files from strangers: every way in which one can be wrong is one clear error, and costs nothing."""

from __future__ import annotations

import json
import random
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import refold
from adapter_files import METHOD, refused, rewrite
from refold import store
from refold.store import read_header
from zoo import build, perturb


@pytest.fixture
def file(tmp_path) -> Path:
    model = refold.attach(build("vit"), METHOD)
    perturb(refold.trainable_parameters(model))
    return refold.save(model, tmp_path / "adapter.safetensors")


def test_a_truncated_file_is_refused_wherever_it_is_cut(file, tmp_path):
    data = file.read_bytes()
    cuts = {0, 1, 7, 8, 9, 100, len(data) - 1} | {len(data) * i // 40 for i in range(40)}
    for cut in sorted(cuts):
        short = tmp_path / "short.safetensors"
        short.write_bytes(data[:cut])
        with pytest.raises(refold.StoreError, match=r"truncated|not a valid safetensors"):
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


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", "[]", "3", "null", '{"format": 1}', '{"format": "1"}', '{"format": null}']
)
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
    with pytest.raises(refold.StoreError, match=r"rank=.* is not valid"):
        refold.load(model, path, example=x)


WEIRD = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    1e300,
    float("inf"),
    float("nan"),
    "",
    "x" * 1000,
    [],
    {},
    [[]],
    [None],
    {"a": []},
]


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
    free.add("part")  # a backbone alone takes the adapter of a dense model's file
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
