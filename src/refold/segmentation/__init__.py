"""Semantic segmentation: models on any encoder, folders of masks, scores, and testing on whole or partial images."""

from __future__ import annotations

from refold.segmentation.data import MaskSet
from refold.segmentation.decoders import DECODERS
from refold.segmentation.inference import Inference, evaluate
from refold.segmentation.labels import IGNORE, Labels
from refold.segmentation.layouts import LAYOUTS, MaskSplits, load_masks
from refold.segmentation.loader import AUGMENTATIONS, MaskLoader, evaluation_pairs
from refold.segmentation.losses import segmentation_loss
from refold.segmentation.metrics import PixelConfusion
from refold.segmentation.models import Segmenter
from refold.segmentation.pixel_text import PixelText, embed_classes

__all__ = [
    "AUGMENTATIONS",
    "DECODERS",
    "IGNORE",
    "LAYOUTS",
    "Inference",
    "Labels",
    "MaskLoader",
    "MaskSet",
    "MaskSplits",
    "PixelConfusion",
    "PixelText",
    "Segmenter",
    "embed_classes",
    "evaluate",
    "evaluation_pairs",
    "load_masks",
    "segmentation_loss",
]
