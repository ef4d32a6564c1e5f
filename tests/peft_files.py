"""Helpers for tests of PEFT checkpoints: PEFT's own files, and models on which names or layers are awkward."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zoo import perturb

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

__all__ = ["Odd", "logits", "peft", "rewrite", "saved_by_peft", "timm_model"]


def timm_model(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options).eval()


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "a_fc": nn.Linear(6, 6)})
        self.inner_fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner_fc(self.inner["a_fc"](self.inner["fc"](self.fc(x))))


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


def saved_by_peft(folder: Path, model: nn.Module, **options: Any) -> nn.Module:
    """A checkpoint of a trained PEFT adapter, and the PEFT model itself, at evaluation."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})).eval()
    torch.manual_seed(3)
    perturb({n: p for n, p in wrapped.named_parameters() if p.requires_grad}, 0.1)
    wrapped.save_pretrained(str(folder))
    return wrapped


def rewrite(folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> None:
    """Change keys of the configuration, and tensors (None: left out)."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    weights = folder / "adapter_model.safetensors"
    stored = load_file(weights) | (tensors or {})
    save_file({k: v for k, v in stored.items() if v is not None}, weights, metadata={"format": "pt"})
