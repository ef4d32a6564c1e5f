"""Text towers as heads: against open_clip, adapters in either tower, training, files, and folding the tower away."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refold
from image_text import NAMES, TEMPLATES, by_open_clip, registered, saved
from refold import MergeError, SiteError, StoreError, backbones
from refold.backbones import Classifier, CosineHead, Prompts, TextClassifier, fixed_texts, fold_text
from refold.inspection import description
from refold.training.inference import compute_logits, start_accelerator

PROMPTS = Prompts(NAMES, TEMPLATES, tower=True)
TOWERS = {"both": None, "text": ("text.*.attn", "text.*.c_fc"), "image": ("backbone.*.attn", "backbone.*.c_fc")}


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Any:
    yield from registered()


@pytest.fixture(scope="module", params=["tiny", "tiny-sig"])
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    return saved(request.param, tmp_path_factory.mktemp("weights"))


def _pair(spec: str = "open_clip/tiny") -> TextClassifier:
    torch.manual_seed(0)
    model = backbones.load(spec, head=PROMPTS, pretrained=spec.count("/") > 1).model
    assert isinstance(model, TextClassifier)
    return model


def _moved(model: nn.Module) -> nn.Module:
    """With adapters that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in refold.trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_pair_is_open_clips_model(clip: tuple[str, Any]) -> None:
    images = torch.randn(4, 3, 32, 32)
    expected, words = by_open_clip(clip[1], images)
    model = _pair(clip[0]).double()
    with torch.no_grad():
        torch.testing.assert_close(model(images.double()), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.embeddings(), words, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("where", TOWERS)
def test_adapters_go_to_either_tower_and_learn_there(where: str) -> None:
    model = _pair()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    refold.attach(model, refold.RepAdapter(rank=2, groups=1, sites=TOWERS[where]))
    trained = refold.trainable_parameters(model)
    towers = {name.partition(".")[0] for name in trained}
    assert towers == {"both": {"backbone", "text"}, "text": {"text"}, "image": {"backbone"}}[where]
    assert all(".refold." in name for name in trained)
    words, images = model.embeddings().detach(), torch.randn(6, 3, 32, 32)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    features = model.backbone(images).detach()
    optimizer, losses = torch.optim.AdamW(refold.param_groups(model, lr=1e-2)), []
    for _ in range(15):
        loss = F.cross_entropy(model.train()(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    model.eval()
    assert torch.equal(model.embeddings(), words) == (where == "image")
    assert torch.equal(model.backbone(images), features) == (where == "text")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_an_evaluation_asks_the_text_tower_once_and_never_uses_what_is_old() -> None:
    model = _moved(refold.attach(_pair(), refold.RepAdapter(rank=2, groups=1)))
    asked: list[int] = []
    model.get_submodule("text").register_forward_hook(lambda *_: asked.append(1))
    batches = [(images, torch.zeros(3)) for images in torch.randn(4, 3, 3, 32, 32)]
    accelerator = start_accelerator()

    def by_hand() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([copy.deepcopy(model).eval()(images) for images, _ in batches])

    first = compute_logits(model.train(), batches, 12, accelerator)
    assert len(asked) == 1
    torch.testing.assert_close(first, by_hand())
    with torch.no_grad():  # in the text tower alone, and in a way that no counter of versions sees
        for name, parameter in refold.trainable_parameters(model).items():
            if name.startswith("text."):
                parameter.data.mul_(-2.0)
    asked.clear()
    second = compute_logits(model, batches, 12, accelerator)
    assert len(asked) == 1
    torch.testing.assert_close(second, by_hand())
    assert float((second - first).abs().max()) > 1e-2
    # In training the embeddings are of each step, also inside; with gradients too, which must reach the tower.
    asked.clear()
    with fixed_texts(model):
        model.train()(batches[0][0])
        model.eval()(batches[0][0]).sum().backward()
        with torch.no_grad():
            model(batches[0][0])
            model(batches[1][0])
    assert len(asked) == 3
    assert any(p.grad is not None for name, p in refold.trainable_parameters(model).items() if name.startswith("text."))
    with torch.no_grad():
        model(batches[0][0])
        model(batches[0][0])
    assert len(asked) == 5


@pytest.mark.parametrize("where", TOWERS)
@pytest.mark.parametrize("method", [refold.RepAdapter, refold.LoRA])
def test_the_text_tower_folds_away(clip: tuple[str, Any], where: str, method: Any) -> None:
    model = _pair(clip[0])
    keys = set(backbones.load(clip[0], head=replace(PROMPTS, tower=False)).model.state_dict())
    refold.attach(model, method(rank=2, sites=TOWERS[where]))
    refold.describe(model, classes=list(NAMES), task="classify")
    _moved(model)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        untouched = by_open_clip(clip[1], images)[0]
        assert float((expected - untouched).abs().max()) > 1e-2
    with pytest.raises(MergeError, match="not merged, and some may be in the text tower"):
        fold_text(model)
    refold.merge(model)
    plain = fold_text(model)
    assert type(plain) is Classifier
    assert isinstance(plain.head, CosineHead)
    assert set(plain.state_dict()) == keys
    with torch.no_grad():
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)
    assert description(plain)["classes"] == list(NAMES)
    assert {row.path.partition(".")[0] for row in refold.explain(plain).rows} <= {"backbone"}
    for back in (refold.unmerge, refold.detach):
        with pytest.raises(MergeError, match="base weights were not kept"):
            back(plain)
    with pytest.raises(StoreError, match="merged without its base weights"):
        refold.save(plain, "unused.safetensors")
    refold.unmerge(model)  # of the pair, whose image tower is not the folded one's
    with torch.no_grad():
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)


def test_a_pair_without_adapters_folds_into_the_zero_shot_model(clip: tuple[str, Any]) -> None:
    pair, zero = _pair(clip[0]), backbones.load(clip[0], head=replace(PROMPTS, tower=False)).model
    images = torch.randn(4, 3, 32, 32)
    folded = fold_text(pair)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), zero(images), rtol=1e-5, atol=2e-5)
    assert fold_text(zero) is zero


def test_files_hold_both_towers_adapters(clip: tuple[str, Any], tmp_path: Path) -> None:
    model = _pair(clip[0])
    refold.attach(model, refold.RepAdapter(rank=2, groups=1))
    _moved(model)
    refold.describe(model, backbone=clip[0], classes=list(NAMES), prompts=PROMPTS.to_json())
    path = refold.save(model, tmp_path / "a.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(refold.from_pretrained(path)(images), model(images))
    with pytest.raises(StoreError):
        refold.load(backbones.load(clip[0], num_classes=3).model, path)
    # What the text tower has learned is for any words.
    others = backbones.load(clip[0], head=Prompts(("cat", "lake"), TEMPLATES, tower=True)).model
    refold.load(others, path)
    with torch.no_grad():
        torch.testing.assert_close(others(images)[:, 0], model(images)[:, 0], rtol=1e-5, atol=1e-5)


def test_there_is_no_head_to_probe() -> None:
    with pytest.raises(SiteError, match="LinearProbe finds nothing to train"):
        refold.attach(_pair(), refold.LinearProbe())
