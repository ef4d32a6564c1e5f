"""A classifier made of an image tower that has none of its own, and a linear head."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Classifier"]


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
