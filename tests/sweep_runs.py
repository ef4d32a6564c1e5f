"""Small trainings that sweeps compare: noise on dark and bright ground."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

import refold
from refold.training import TrainConfig

__all__ = ["dark_and_bright", "settings"]


def dark_and_bright(root: Path, count: int) -> Path:
    """So many pictures of each of the two classes, which are not easily told apart."""
    generator = torch.Generator().manual_seed(0)
    for name, level in (("dark", 110), ("bright", 140)):
        (root / name).mkdir(parents=True)
        for index in range(count):
            noise = 40 * torch.randn(16, 16, 3, generator=generator)
            Image.fromarray((level + noise).clamp(0, 255).to(torch.uint8).numpy()).save(root / name / f"{index}.png")
    return root


def settings(photos: Path, output: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "data": photos, "output": output, "model": "timm/test_vit", "pretrained": False, "image_size": 32,
        "method": refold.RepAdapter(rank=2), "epochs": 2, "batch_size": 8, "lr": 1e-3, "precision": "fp32",
        "attention": "default", "fractions": (16, 8, 8), "select": "loss",
    }  # fmt: skip
    return TrainConfig.of(**base | changes)
