"""The commands on methods that do not fold: trained, measured and exported with their adapters inside, never merged."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch

from commands import run
from refold.training import resolve


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    done = run(
        *("train", "photos", "--model", "timm/test_vit", "--random-weights", "--method", "AdaptFormer + LoRA(rank=2)"),
        *("--split", "0.5", "0.25", "0.25", "--epochs", "1", "--batch-size", "4", "--image-size", "160", "-o", "side"),
        cwd=workplace,
    )
    assert done.returncode == 0, done.stderr
    return workplace


def test_its_cost_is_measured_without_a_merged_model(trained: Path) -> None:
    rows = json.loads((trained / "side" / "cost.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["backbone", "unmerged"]
    assert not (trained / "side" / "certificate.json").exists()
    assert "does not fold" in run("explain", "side", cwd=trained).stdout


def test_merging_is_one_line_and_a_failure(trained: Path) -> None:
    done = run("merge", "side", "-o", "merged.safetensors", cwd=trained)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("AdaptFormer() does not fold into a backbone's weights. Ship it unmerged")
    assert not (trained / "merged.safetensors").exists()


def test_it_is_exported_with_its_adapters(trained: Path) -> None:
    done = run("export", "side", "-o", "side.onnx", cwd=trained)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(trained / "side.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 160, 160)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = resolve(trained / "side").model(images)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    weights = run("export", "side", "-o", "side.safetensors", "--format", "weights", cwd=trained)
    assert weights.returncode == 1
    assert "plain weights would leave them out. Use --format onnx or --format program" in weights.stderr
