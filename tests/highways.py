"""Encoders that a highway goes beside, and images for them."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

SWIN = {"img_size": 32, "window_size": 4, "depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4)}


def swin(**options: object) -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **SWIN, **options)


def encoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = swin() if name == "swin" else timm.create_model(name, features_only=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def pictures(size: int = 32, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
