"""Cached features of whole images on two processes: what two processes compute without them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import timm, torch
import refold
from refold import Preprocessing
from refold.data import ImageSet
from refold.dense.features import Features
from refold.training import Recipe, fit
from refold.training.trainer import trained_tensors

def images(count, seed):
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=random, dtype=torch.uint8)
    return ImageSet(map(str, range(count)), torch.arange(count) % 2, classes=["a", "b"], decoded=pixels.numpy())

torch.manual_seed(0)
model = refold.attach(timm.create_model("test_vit", img_size=32, num_classes=2), refold.E3VA(rank=2))
recipe = Recipe(epochs=3, batch_size=8, accumulate=2, lr=5e-3, attention="default", precision="fp32")
found = fit(
    model, images(20, 0), images(7, 1), Preprocessing(size=(32, 32)), recipe, classes=["a", "b"],
    features=Features("memory") if sys.argv[1] == "cached" else None,
)
if torch.distributed.get_rank() == 0:
    torch.save(([row["loss"] for row in found.history], trained_tensors(model)), sys.argv[2])
"""


def test_two_processes(tmp_path: Path) -> None:
    script, runs = tmp_path / "run.py", []
    script.write_text(SCRIPT)
    for kind in ("plain", "cached"):
        file = tmp_path / f"{kind}.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run([*launcher, str(script), kind, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs.append(torch.load(file))
    (plain, weights), (cached, others) = runs
    assert cached == pytest.approx(plain, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)
