"""DenseCLIP's scores against their formula, where they go, what they teach, class names as text, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from reference import pixel_text as reference
from refold.dense import Encoder, load_encoder
from refold.errors import DataError
from refold.segmentation import segmentation_loss
from refold.segmentation.pixel_text import PixelText, PixelTextScores, embed_classes


def _encoder(name: str = "test_convnext") -> Encoder:
    torch.manual_seed(0)
    return load_encoder(f"timm/{name}", pretrained=False, image_size=64).encoder


def _text(classes: int = 3, width: int = 12) -> Tensor:
    return torch.randn(classes, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("context", [0, 2])
def test_scores_are_those_of_the_formula(context: int) -> None:
    torch.manual_seed(0)
    scores = PixelTextScores(10, 7 * _text(), context=context).double().eval()
    with torch.no_grad():
        for name, parameter in scores.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) if name != "logit_scale" else 0.0)
    maps = torch.randn(2, 10, 3, 5, dtype=torch.float64)
    found = scores(maps).detach()
    numbers = {name: value.numpy() for name, value in scores.state_dict().items()}
    torch.testing.assert_close(found, torch.from_numpy(reference.scores(maps.numpy(), numbers)), rtol=1e-10, atol=1e-12)
    assert float(found.abs().max()) <= 1
    torch.testing.assert_close(scores.logits(found), found / 0.07)
    torch.testing.assert_close(scores.text.norm(dim=1), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    scores.logit_scale.data.fill_(50.0)
    torch.testing.assert_close(scores.logits(found), found * 100)


def test_context_starts_as_a_small_change_of_the_words() -> None:
    torch.manual_seed(0)
    with_context = PixelTextScores(10, _text()).eval()
    without = PixelTextScores(10, _text(), context=0).eval()
    without.load_state_dict({k: v for k, v in with_context.state_dict().items() if k in without.state_dict()})
    maps = torch.randn(1, 10, 4, 4)
    difference = float((with_context(maps) - without(maps)).detach().abs().max())
    assert 0 < difference < 1e-2


@pytest.mark.parametrize(
    ("name", "decoder"),
    [("test_convnext", "fpn"), ("test_convnext", "linear"), ("test_vit", "setr_pup"), ("test_vit", "upernet")],
)
def test_the_decoder_reads_the_scores_and_every_part_learns(name: str, decoder: str) -> None:
    model = PixelText(_encoder(name), decoder, _text(), width=64, context=1)
    refold.attach(model.encoder.body, refold.RepAdapter(rank=2, groups=1), trainable=())
    images = torch.randn(2, 3, 50, 64)
    with torch.no_grad():
        plain = model.eval()(images)
        assert plain.shape == (2, 3, 50, 64)
        model.decoder.scores.project.weight.neg_()  # type: ignore[union-attr, operator]
        assert not torch.allclose(model(images), plain)
    outputs = model.train()(images)
    assert isinstance(outputs, list)
    assert all(one.shape == (2, 3, 50, 64) for one in outputs)
    segmentation_loss(outputs, torch.randint(0, 3, (2, 50, 64))).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for n, p in model.encoder.body.named_parameters() if ".refold." not in n)


def test_the_last_output_in_training_is_the_scores_own_prediction() -> None:
    model = PixelText(_encoder(), "linear", _text(), context=0).train()
    images = torch.randn(2, 3, 64, 64)
    outputs = model(images)
    assert len(outputs) == 2
    scores: Any = model.decoder.scores
    maps = model.encoder(images)[-1]
    pixels = F.conv2d(maps, scores.project.weight, scores.project.bias)
    cosines = torch.stack([F.cosine_similarity(pixels, word[None, :, None, None]) for word in _text()], dim=1)
    expected = F.interpolate(cosines / 0.07, size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-4)
    masks = torch.randint(0, 3, (2, 64, 64))
    both = F.cross_entropy(outputs[0], masks) + 0.4 * F.cross_entropy(expected, masks)
    torch.testing.assert_close(segmentation_loss(outputs, masks), both)
    assert model.encoder.channels[-1] == maps.shape[1]


def test_score_maps_alone_learn_which_words_are_where() -> None:
    """Two colours, two random words: after training, a pixel's nearest word is its class'."""
    torch.manual_seed(0)
    scores = PixelTextScores(3, _text(2), context=1)
    masks = torch.randint(0, 2, (4, 8, 8))
    maps = torch.stack((masks.float(), 1 - masks.float(), torch.ones(4, 8, 8)), dim=1) + 0.1 * torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.Adam(scores.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(scores.logits(scores(maps)), masks).backward()
        optimizer.step()
    assert float((scores.eval()(maps).argmax(1) == masks).float().mean()) > 0.95
    assert float(scores.logit_scale.detach()) != pytest.approx(-math.log(0.07), abs=1e-6)


def test_a_file_brings_the_words_back(tmp_path: Path) -> None:
    model = PixelText(_encoder(), "linear", _text(), context=1)
    refold.attach(model.encoder.body, refold.LoRA(rank=2), trainable=())
    images = torch.randn(1, 3, 64, 64)
    path = refold.save(model.eval(), tmp_path / "a.safetensors")
    other = PixelText(_encoder(), "linear", torch.ones(3, 12), context=1).eval()
    refold.load(other, path)
    assert torch.equal(other(images), model(images))
    with pytest.raises(refold.StoreError, match="has shape"):
        refold.load(PixelText(_encoder(), "linear", _text(width=8), context=1), path)


class Tower(nn.Module):
    """A text tower that adds up the letters' embeddings; dropout tells whether it was put into evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, 6)
        self.dropout = nn.Dropout(0.5)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.letters(tokens)).sum(1)


def test_class_names_become_text_averaged_over_templates() -> None:
    torch.manual_seed(0)
    tower = Tower().train()

    def tokenizer(texts: list[str]) -> Tensor:
        return torch.tensor([[ord(c) for c in text.ljust(30)] for text in texts])

    found = embed_classes(["cat", "car"], tower, tokenizer, ("a {}", "one {}."))
    assert tower.training
    table, expected = tower.letters.weight.detach(), []
    for name in ("cat", "car"):
        parts = [table[[ord(c) for c in text.ljust(30)]].sum(0) for text in (f"a {name}", f"one {name}.")]
        mean = sum(part / part.norm() for part in parts) / 2
        expected.append(mean / mean.norm())
    torch.testing.assert_close(found, torch.stack(expected))
    for classes, templates in (([], ("a {}",)), (["cat"], ()), (["cat"], ("a photo",))):
        with pytest.raises(DataError, match="templates with"):
            embed_classes(classes, tower, tokenizer, templates)


def test_open_clips_text_tower_and_tokenizer_fit() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    tower = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=16, image_size=32),
        text_cfg=open_clip.CLIPTextCfg(width=32, heads=2, layers=1),
    )
    text = embed_classes(["tree", "road", "tree"], tower, open_clip.SimpleTokenizer())
    assert text.shape == (3, 16)
    assert torch.equal(text[0], text[2])
    assert not torch.allclose(text[0], text[1], atol=1e-3)
    assert PixelText(_encoder(), "linear", text).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (torch.ones(3), "must be"),
        (torch.ones(1, 4), "must be"),
        (torch.ones(3, 4, dtype=torch.int64), "must be"),
        (torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "zero or not finite"),
        (torch.tensor([[1.0, 2.0], [0.0, math.nan]]), "zero or not finite"),
    ],
)
def test_text_that_is_none_is_refused(text: Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=f"text: .*{reason}"):
        PixelText(_encoder(), "linear", text)
    with pytest.raises(DataError, match="context: must be 0 or more"):
        PixelText(_encoder(), "linear", _text(), context=-1)
