"""Detectors small enough to be exported in a test, whose random heads find many objects, and pictures for them."""

from __future__ import annotations

import torch
from torch import Tensor

from refold.dense import load_encoder
from refold.detection import Detector, build_detector
from refold.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(size=(96, 96))
SIZE = (90, 133)  # of the pictures: scaled to 96 x 141, padded to 96 x 160


def tiny_detector(kind: str) -> Detector:
    torch.manual_seed(0)
    encoder = load_encoder("timm/test_convnext", pretrained=False).encoder
    model = build_detector(
        kind, encoder, 3, preprocessing=PREPROCESSING, min_size=96, max_size=160, channels=64 if kind == "fcos" else 16,
        hidden=32, rois=16, score_threshold=0.3, detections=20,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("backbone.fpn"):
                parameter.add_(0.05 * torch.randn_like(parameter))
            elif not name.startswith("backbone"):
                parameter.mul_(3).add_(0.1 * torch.randn_like(parameter))
            if "cls_score" in name:  # scores of exactly 1 would be ties, which every runtime breaks its own way
                parameter.mul_(0.05)
            if name.endswith("cls_logits.bias"):  # starts at a probability of 0.01
                parameter.fill_(-0.2)
    return model


def picture(seed: int) -> Tensor:
    """(3, 90, 133) uint8: a square on noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 128, (3, *SIZE), generator=generator, dtype=torch.uint8)
    pixels[:, 20:60, 30 + 9 * seed : 80] = torch.tensor([250, 180, 40 * seed]).view(3, 1, 1)
    return pixels


def found_by(model: Detector, pixels: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return model([pixels.float() / 255])[0]


def shared(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    """Objects on both sides: one class, boxes to 0.1 pixels, scores to 0.001, masks alike on 97 of 100 pixels."""
    count = 0
    for k in range(len(ours["scores"])):
        for j in range(len(theirs["scores"])):
            alike = (
                ours["labels"][k] == theirs["labels"][j]
                and (ours["boxes"][k] - theirs["boxes"][j]).abs().max() < 0.1
                and (ours["scores"][k] - theirs["scores"][j]).abs() < 1e-3
            )
            if alike and "masks" in ours:
                a, b = ours["masks"][k] >= 0.5, theirs["masks"][j] >= 0.5
                alike = (a != b).sum() <= 0.03 * (a | b).sum()
            if alike:
                count += 1
                break
    return count
