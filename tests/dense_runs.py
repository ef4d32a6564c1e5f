"""Settings of tiny runs of dense tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import refold
from refold.training import TrainConfig


def settings(data: Path, output: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "data": data, "output": output, "task": "segment", "decoder": "linear", "model": "timm/test_convnext",
        "pretrained": False, "image_size": 64, "method": refold.LinearProbe(), "epochs": 2, "batch_size": 2,
        "lr": 1e-2, "warmup_epochs": 0, "precision": "fp32", "attention": "default",
    }  # fmt: skip
    return TrainConfig.of(**base | changes)
