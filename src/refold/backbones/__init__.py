"""Pretrained backbones by name: ``load("timm/vit_base_patch16_224")`` and where each name gets its weights."""

from __future__ import annotations

from refold.backbones.catalogue import ModelRow, list_models
from refold.backbones.classifier import Classifier, CosineHead
from refold.backbones.loading import load
from refold.backbones.normalization import with_normalization
from refold.backbones.prompts import Prompts, stored_head
from refold.backbones.request import Loaded
from refold.backbones.text_tower import TextClassifier, fixed_texts, fold_text

__all__ = [
    "Classifier",
    "CosineHead",
    "Loaded",
    "ModelRow",
    "Prompts",
    "TextClassifier",
    "fixed_texts",
    "fold_text",
    "list_models",
    "load",
    "stored_head",
    "with_normalization",
]
