"""Tiny image-text models registered with open_clip, and their answers by its own functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["NAMES", "TEMPLATES", "by_open_clip", "registered", "saved", "write_photos"]

NAMES = ("cat", "dog", "red bus")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SIGLIP = {**CLIP, "custom_text": True, "init_logit_bias": -10.0}


def registered() -> Iterator[None]:
    """Inside, open_clip knows ``tiny`` and ``tiny-sig``, which has a bias and a text tower of its own."""
    from open_clip import factory

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(factory._MODEL_CONFIGS, "tiny", CLIP)
        patch.setitem(factory._MODEL_CONFIGS, "tiny-sig", SIGLIP)
        yield


def saved(name: str, folder: Path) -> tuple[str, Any]:
    """A registered model with random weights: its spec, with these in ``folder``, and open_clip's own."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None)
    path = folder / "clip.safetensors"
    save_file(model.state_dict(), path)
    return f"open_clip/{name}/{path}", model


def by_open_clip(
    clip: Any, images: Tensor, names: Sequence[str] = NAMES, templates: Sequence[str] = TEMPLATES
) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and class embeddings (K, C) in float64, sentence by sentence with open_clip's own functions."""
    clip = clip.double().eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    rows = []
    with torch.no_grad():
        for name in names:
            parts = [clip.encode_text(tokenizer([t.format(name)]))[0] for t in templates]
            mean = torch.stack([part / part.norm() for part in parts]).mean(0)
            rows.append(mean / mean.norm())
        words = torch.stack(rows)
        features = clip.encode_image(images.double())
        logits = clip.logit_scale.exp() * (features / features.norm(dim=1, keepdim=True)) @ words.T
    return logits + (0 if clip.logit_bias is None else clip.logit_bias.detach()), words


def write_photos(root: Path, count: int = 12) -> None:
    """Folders ``cat`` and ``dog`` of noisy 32 x 32 images, dark and bright."""
    noise = np.random.default_rng(0)
    for name, level in (("cat", 90), ("dog", 160)):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = noise.normal(level, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02}.png")
