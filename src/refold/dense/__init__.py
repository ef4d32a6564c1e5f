"""Dense prediction: encoders that turn images into feature maps, and what segmentation and detection share."""

from __future__ import annotations

from refold.dense.encoder import Encoder, LoadedEncoder, load_encoder
from refold.dense.pyramid import SimplePyramid

__all__ = ["Encoder", "LoadedEncoder", "SimplePyramid", "load_encoder"]
