"""Imports every worker of the families sweep needs, done once in the fork server."""

from __future__ import annotations

import importlib
import warnings

import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
for _name in ("families_check", "families_timm", "peft", "transformers", "open_clip", "torchvision"):
    try:
        importlib.import_module(_name)
    except ImportError:
        continue
