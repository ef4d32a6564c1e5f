"""Helpers for tests of adapter files: rewriting them, and checking that a refused one changed nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import refold
from zoo import build

__all__ = ["METHOD", "refused", "rewrite"]

METHOD = refold.RepAdapter(rank=4)


def refused(path: Path, reason: str, target: nn.Module | None = None, kind: type = refold.StoreError) -> None:
    """Loading raises one clear error and leaves the model as it was."""
    target = build("vit") if target is None else target
    before = {n: v.clone() for n, v in target.state_dict().items()}
    names = target.__dict__.keys()
    with pytest.raises(kind, match=reason):
        refold.load(target, path)
    after = target.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], v) for n, v in before.items())
    assert target.__dict__.keys() == names


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any] | None = None, **tensors: torch.Tensor | None) -> None:
    """Rewrite a file with a changed header and with tensors replaced (None: left out)."""
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["refold"])
    stored = load_file(path)
    for name, value in tensors.items():
        if value is None:
            del stored[name]
        else:
            stored[name] = value
    if change is not None:
        change(header)
    save_file(stored, path, metadata={"refold": json.dumps(header)})
