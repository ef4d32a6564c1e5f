"""Running statistics of a run on two processes: everywhere those of the model that is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file

import refold
from launched import spawn
from photos import class_folders
from refold.training import TrainConfig, train


def trained(folder: Path, rank: int) -> None:
    """With the last epoch's, and with those of a best epoch before it."""
    for select in (None, "loss"):
        output = folder / str(select)
        config = TrainConfig.of(
            data=folder / "images", output=output, model="timm/test_resnet", pretrained=False, image_size=32,
            method=refold.FullFineTune(), epochs=2, batch_size=4, fractions=(8, 4, 4), lr=1e-2, warmup_epochs=0,
            precision="fp32", attention="default", augment="flip", select=select,
        )  # fmt: skip
        model = train(config).model
        buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith(("_mean", "_var"))}
        assert len(buffers) > 10
        torch.manual_seed(0)
        found = [(model(torch.randn(2, 3, 32, 32)).tolist(), {name: b.tolist() for name, b in buffers.items()})]
        first, second = gather_object(found)
        assert first == second
        if rank == 0:
            saved = load_file(output / "adapter.safetensors")
            assert all(torch.equal(saved[f"model/{name}"], buffer) for name, buffer in buffers.items())


def test_processes_judge_the_model_that_is_saved(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", {"cat": 8, "dog": 8})
    spawn(partial(trained, tmp_path))
