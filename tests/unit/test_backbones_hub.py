"""The hub: cached models load without a network, everything else fails within seconds and says what to do."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from refold import BackboneError, backbones

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(tmp_path, monkeypatch):
    """An empty cache, and an endpoint at a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def put_in_cache(cache: Path, repository: str, model: torch.nn.Module, **config: object) -> None:
    """Lay a repository out as huggingface_hub does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    (snapshot / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("spec", ["timm/test_vit", "hf-hub:someone/something", "open_clip/ViT-B-32/laion2b_s34b_b79k"])
def test_an_unreachable_hub_is_reported_at_once_with_the_ways_out(spec):
    started = time.monotonic()
    with pytest.raises(BackboneError) as caught:
        backbones.load(spec)
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert text.startswith(spec)
    assert f"{constants.ENDPOINT} cannot be reached" in text
    for way in ("--weights FILE", "HF_HUB_OFFLINE=1", "packaged/vit_small_focus", "another machine"):
        assert way in text
    assert not constants.HF_HUB_OFFLINE


def test_offline_mode_is_named_as_the_reason(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"not in the local cache.*HF_HUB_OFFLINE is set"):
        backbones.load("timm/test_vit")
    assert constants.HF_HUB_OFFLINE


def test_a_cached_timm_model_loads_and_its_spec_names_the_tag(no_network):
    model = backbones.load("test_vit", pretrained=False).model
    put_in_cache(no_network, "timm/test_vit.r160_in1k", model)
    loaded = backbones.load("timm/test_vit")
    assert loaded.spec == "timm/test_vit.r160_in1k"
    assert torch.equal(loaded.model.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert torch.equal(loaded.model.head.weight, model.head.weight)
    again = backbones.load(loaded.spec, num_classes=1000)
    assert again.spec == loaded.spec
    assert not torch.equal(again.model.head.weight, model.head.weight)


def test_a_cached_user_repository_brings_architecture_classes_and_statistics(no_network):
    model = backbones.load("test_vit", pretrained=False, num_classes=4).model
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "input_size": [3, 160, 160], "fixed_input_size": True}
    put_in_cache(
        no_network,
        "user/birds",
        model,
        architecture="test_vit",
        num_classes=4,
        pretrained_cfg={"num_classes": 4, "classifier": "head", "first_conv": "patch_embed.proj", **facts},
    )
    loaded = backbones.load("hf-hub:user/birds", image_size=96)
    assert loaded.spec == "hf-hub:user/birds"
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.preprocessing.size == (96, 96)
    assert torch.equal(loaded.model.head.weight, model.head.weight)
    with torch.no_grad():
        assert loaded.model(torch.zeros(1, 3, 96, 96)).shape == (1, 4)


def test_a_local_file_replaces_the_download_of_a_user_repository(no_network, tmp_path):
    cached = backbones.load("test_vit", pretrained=False, num_classes=4).model
    put_in_cache(no_network, "user/birds", cached, architecture="test_vit", num_classes=4)
    local = backbones.load("test_vit", pretrained=False, num_classes=2).model
    save_file(local.state_dict(), tmp_path / "local.safetensors")
    loaded = backbones.load("hf-hub:user/birds", weights=tmp_path / "local.safetensors")
    assert torch.equal(loaded.model.head.weight, local.head.weight)
