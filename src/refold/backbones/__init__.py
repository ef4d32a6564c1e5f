"""Pretrained backbones by name: ``load("timm/vit_base_patch16_224")`` and where each name gets its weights."""

from __future__ import annotations

from refold.backbones.catalogue import ModelRow, list_models
from refold.backbones.classifier import Classifier
from refold.backbones.loading import load
from refold.backbones.normalization import with_normalization
from refold.backbones.request import Loaded

__all__ = ["Classifier", "Loaded", "ModelRow", "list_models", "load", "with_normalization"]
