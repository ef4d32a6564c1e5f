"""A classifier made of an image tower that has none of its own, and a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Classifier", "CosineHead"]


class Classifier(nn.Module):
    """``head(backbone(images))``: an image tower that returns one feature vector per image, and a head.

    Args:
        backbone: maps images (B, C, H, W) to features (B, F).
        head: maps features (B, F) to scores (B, K); ``nn.Identity()`` leaves the features.

    State-dict keys are the tower's under ``backbone.`` and the head's under ``head.``.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class CosineHead(nn.Module):
    """``W x / |x| + b``: features (B, F) of any length but zero -> scores (B, K).

    With rows of W of length s these are cosines times s. The layer is a child, so that the keys ``head.linear.*`` tell
    this head from a plain one, whose scores of the same numbers would be others.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @classmethod
    @torch.no_grad()
    def of(cls, embeddings: Tensor, scale: Tensor, bias: Tensor | None) -> CosineHead:
        """The zero-shot head of text embeddings (K, F) of length 1: ``exp(scale)`` times the cosines, plus ``bias``."""
        head = cls(embeddings.shape[1], len(embeddings)).to(embeddings)
        head.linear.weight.copy_(scale.reshape(()).exp() * embeddings)
        head.linear.bias.fill_(0.0 if bias is None else float(bias))
        return head

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.normalize(x, dim=-1))
