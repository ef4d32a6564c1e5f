"""Image towers of open_clip: whole-model checkpoints, Classifier checkpoints, options."""

from __future__ import annotations

import logging
import sys

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from refold import BackboneError, MissingExtraError, backbones

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A tiny architecture registered with open_clip, so that tests are fast and need no hub."""
    from open_clip import factory

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(factory._MODEL_CONFIGS, "tiny", CONFIG)
        yield


@pytest.fixture(scope="module")
def clip(tiny):
    return open_clip.create_model("tiny", pretrained=None).eval()


def test_random_weights_need_to_be_asked_for():
    with pytest.raises(BackboneError, match=r"open_clip/tiny: no pretrained weights are named.*pretrained=False"):
        backbones.load("open_clip/tiny/")
    loaded = backbones.load("open_clip/tiny", pretrained=False, num_classes=3, in_chans=1, image_size=48)
    assert isinstance(loaded.model, backbones.Classifier)
    assert loaded.preprocessing.size == (48, 48)
    assert loaded.preprocessing.mean == pytest.approx((sum(open_clip.OPENAI_DATASET_MEAN) / 3,))
    with torch.no_grad():
        assert loaded.model(torch.zeros(2, 1, 48, 48)).shape == (2, 3)


def test_loading_leaves_the_root_logger_alone():
    before = list(logging.getLogger().handlers)
    backbones.load("open_clip/tiny", pretrained=False, drop_path=0.1)
    assert logging.getLogger().handlers == before


@pytest.mark.parametrize("given", ["spec", "weights"])
def test_a_checkpoint_of_the_whole_model_gives_its_image_features(clip, tmp_path, given):
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": clip.state_dict()}, path)
    if given == "spec":
        loaded = backbones.load(f"open_clip/tiny/{path}")
    else:
        loaded = backbones.load("open_clip/tiny", weights=path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), clip.encode_image(images))


def test_the_stem_of_a_checkpoint_is_adapted_like_timm(clip, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file(clip.state_dict(), path)
    model = backbones.load("open_clip/tiny", weights=path, in_chans=1, num_classes=2).model
    torch.testing.assert_close(model.backbone.conv1.weight, clip.visual.conv1.weight.sum(1, keepdim=True))


@pytest.mark.parametrize("in_chans", [None, 1])
def test_a_saved_classifier_comes_back_with_its_head(tmp_path, in_chans):
    path = tmp_path / "classifier.safetensors"
    model = backbones.load("open_clip/tiny", pretrained=False, num_classes=3, in_chans=in_chans).model
    save_file(model.state_dict(), path)
    loaded = backbones.load("open_clip/tiny", weights=path)
    assert loaded.preprocessing.channels == (in_chans or 3)
    images = torch.randn(2, in_chans or 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model(images))


def test_a_tag_decides_the_activation():
    """OpenAI's weights were trained with QuickGELU; another activation would be wrong in silence."""
    plain = backbones.load("open_clip/ViT-B-32/laion2b_s34b_b79k", pretrained=False).model
    quick = backbones.load("open_clip/ViT-B-32/openai", pretrained=False).model
    names = {type(m).__name__ for m in plain.modules()}, {type(m).__name__ for m in quick.modules()}
    assert "QuickGELU" not in names[0]
    assert "QuickGELU" in names[1]


def test_wrong_files_names_and_options_are_clear_errors(clip, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_file({key: value for key, value in clip.state_dict().items() if "conv1" not in key}, path)
    cases = [
        ("open_clip/tiny", {"weights": path}, r"does not fit open_clip/tiny: missing visual\.conv1\.weight"),
        ("open_clip/tiny/absent.pt", {}, "has no weights called 'absent.pt'"),
        ("open_clip/ViT-B-32/nonsense", {}, "has no weights called 'nonsense'. Known: openai"),
        ("open_clip/ViT-B-33/openai", {}, "Did you mean open_clip/ViT-B-32"),
        ("open_clip/tiny", {"pretrained": False, "image_size": 30}, "8x8 patches. The nearest .* 32x32"),
    ]
    for spec, options, message in cases:
        with pytest.raises(BackboneError, match=message):
            backbones.load(spec, **options)
    model = backbones.load("open_clip/tiny", pretrained=False, num_classes=3).model
    save_file({key: value for key, value in model.state_dict().items() if "ln_post" not in key}, path)
    with pytest.raises(BackboneError, match=r"missing backbone\.ln_post\.weight"):
        backbones.load("open_clip/tiny", weights=path)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"refold\[open_clip\]"):
        backbones.load("open_clip/ViT-B-32/openai")
