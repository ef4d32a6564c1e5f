"""Zero-shot heads: against open_clip's own functions, from names to prompts, in files, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import refold
from image_text import NAMES, TEMPLATES, by_open_clip, registered, saved, write_photos
from refold import BackboneError, DataError, StoreError, backbones
from refold.backbones import CosineHead, Prompts
from refold.training import zeroshot

PROMPTS = Prompts(NAMES, TEMPLATES)


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    yield from registered()


@pytest.fixture(scope="module", params=["tiny", "tiny-sig"])
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return saved(request.param, tmp_path_factory.mktemp("weights"))


def test_the_head_is_open_clips_own_zero_shot_classifier(clip: tuple[str, Any]) -> None:
    spec, model = clip
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected, words = by_open_clip(model, images)
    loaded = backbones.load(spec, head=PROMPTS).model
    assert isinstance(loaded, backbones.Classifier)
    assert isinstance(loaded.head, CosineHead)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).double(), expected, rtol=1e-5, atol=2e-5)
    rows = loaded.head.linear.weight.detach().double()
    torch.testing.assert_close(rows, words / 0.07, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.head.linear.bias.detach(), torch.full((3,), -10.0 if "sig" in spec else 0.0))
    theirs = open_clip.build_zero_shot_classifier(
        model.float(), open_clip.SimpleTokenizer(context_length=12), NAMES, TEMPLATES
    )
    torch.testing.assert_close(rows.float(), theirs.T / 0.07, rtol=1e-5, atol=1e-5)


def test_the_length_of_a_feature_does_not_matter() -> None:
    torch.manual_seed(0)
    head = CosineHead(6, 3)
    features = torch.randn(4, 6)
    torch.testing.assert_close(head(features), head(1000 * features))
    expected = torch.stack([features[0] @ row / features[0].norm() for row in head.linear.weight]) + head.linear.bias
    torch.testing.assert_close(head(features)[0], expected)


def test_names_of_folders_become_words() -> None:
    assert Prompts.of(["red_bus", "cat"]) == Prompts(("red bus", "cat"), ("a photo of a {}.",))
    better = Prompts.of(["n01", "n02"], ["the {}"], {"n02": "golden_retriever"}, tower=True)
    assert better == Prompts(("n01", "golden_retriever"), ("the {}",), True)
    assert Prompts.from_json(better.to_json()) == better


def test_clips_own_templates_have_names() -> None:
    openai = replace(PROMPTS, templates=("openai",)).sentences
    assert [t.replace("{}", "crane") for t in openai] == [t("crane") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(openai) == 80
    assert len(replace(PROMPTS, templates=("simple",)).sentences) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prompts(("cat",)), "two classes at least"),
        (lambda: Prompts(("cat", "cat")), "two classes are called 'cat'"),
        (lambda: Prompts.of(["a_b", "a b"]), "two classes are called 'a b'"),
        (lambda: Prompts(("cat", " ")), "names: must be texts"),
        (lambda: Prompts(("cat", "dog"), ()), "templates with {}"),
        (lambda: Prompts(("cat", "dog"), ("a photo",)), "templates with {} for the name, not 'a photo'"),
        (lambda: Prompts(("cat", "dog"), "a {}"), "templates: must be texts"),  # type: ignore[arg-type]
        (lambda: Prompts(tuple(map(str, range(2**15))), tuple(f"{k} {{}}" for k in range(33))), "Use fewer templates"),
        (lambda: Prompts.of(["cat", "dog"], None, {"bird": "crane"}), "'bird' is no class of the data.*cat, dog"),
        (lambda: Prompts.from_json({"names": ["cat", "dog"]}), "are no prompts"),
    ],
)
def test_prompts_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_names_that_the_tokenizer_takes_for_one_are_refused() -> None:
    """Its context ends before they differ; without a word both classes would get the same weights."""
    long = "very " * 20
    with pytest.raises(DataError, match="one and the same to the tokenizer"):
        backbones.load("open_clip/tiny", pretrained=False, head=Prompts((f"{long} cat", f"{long} dog")))


def test_what_has_no_text_tower_refuses_prompts(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="timm/test_vit: has no text tower"):
        backbones.load("timm/test_vit", pretrained=False, head=PROMPTS)
    with pytest.raises(BackboneError, match="head: must be linear, cosine or prompts"):
        backbones.load("open_clip/tiny", pretrained=False, head="cosin")
    with pytest.raises(BackboneError, match="3 names for 2 classes"):
        backbones.load("open_clip/tiny", pretrained=False, head=PROMPTS, num_classes=2)
    path = tmp_path / "classifier.safetensors"
    model = backbones.load("open_clip/tiny", pretrained=False, head=PROMPTS).model
    save_file(model.state_dict(), path)
    with pytest.raises(BackboneError, match="without the text tower"):
        backbones.load("open_clip/tiny", weights=path, head=PROMPTS)
    images = torch.randn(2, 3, 32, 32)
    again = backbones.load("open_clip/tiny", weights=path).model
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_a_file_brings_the_head_back_and_fits_no_other_kind(clip: tuple[str, Any], tmp_path: Path) -> None:
    """A plain linear layer with the same numbers would give other scores without a word."""
    model = backbones.load(clip[0], head=PROMPTS).model
    refold.attach(model, refold.LoRA(rank=2))
    with torch.no_grad():
        for parameter in refold.trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    refold.describe(model, backbone=clip[0], classes=list(NAMES), prompts=PROMPTS.to_json())
    path = refold.save(model, tmp_path / "a.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(refold.from_pretrained(path)(images), model(images))
    with pytest.raises(StoreError, match=r"missing tensors \['model/head.bias'"):
        refold.load(backbones.load(clip[0], num_classes=3).model, path)


def test_zero_shot_evaluation_is_what_open_clip_says(clip: tuple[str, Any], tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", count=8)
    found = zeroshot(clip[0], tmp_path / "photos", templates=TEMPLATES, class_names={"dog": "red bus"})
    mean, std = (np.array(v, np.float32) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    files = sorted((tmp_path / "photos").glob("*/*.png"))
    pixels = [(np.asarray(Image.open(f), np.float32) / 255 - mean) / std for f in files]
    logits, _ = by_open_clip(clip[1], torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), ("cat", "red bus"))
    targets = torch.tensor([0] * 8 + [1] * 8)
    assert found.metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == targets).double().mean()))
    assert found.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-4)


def test_numbers_and_labels_have_no_zero_shot_head(tmp_path: Path) -> None:
    write_photos(tmp_path, count=2)
    rows = "".join(f"{f.relative_to(tmp_path)},{k}.5\n" for k, f in enumerate(sorted(tmp_path.glob("*/*.png"))))
    (tmp_path / "numbers.csv").write_text("path,target\n" + rows)
    with pytest.raises(DataError, match="made for 'regress', and class names are for classes"):
        zeroshot("open_clip/tiny", tmp_path / "numbers.csv", pretrained=False)
