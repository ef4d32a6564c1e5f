"""Every kind of detector in ONNX, with adapters inside, the command, and the refusal of a file that differs."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime
import pytest
import torch

import refold
from commands import run
from refold.dense.shapes import shapes
from refold.detection import KINDS, Detector
from refold.errors import RefoldError
from refold.export import export_detector
from refold.training import resolve
from tiny_detectors import PREPROCESSING, SIZE, found_by, picture, shared, tiny_detector

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def found_in(path: Path, pixels: torch.Tensor, **more: np.ndarray) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {"image": (pixels.float() / 255).numpy(), **more}
    return {name: torch.tensor(value) for name, value in zip(names, session.run(None, feeds), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_finds_what_the_model_finds(kind: str, tmp_path: Path) -> None:
    model = tiny_detector(kind)
    before = found_by(model, picture(0))
    export_detector(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING, size=SIZE)
    for name, value in found_by(model, picture(0)).items():
        assert torch.equal(value, before[name])  # tracing left nothing behind
    total = same = 0
    for seed in range(4):
        expected, found = found_by(model, picture(seed)), found_in(tmp_path / "m.onnx", picture(seed))
        assert found.keys() == expected.keys()
        assert abs(len(found["scores"]) - len(expected["scores"])) <= 1
        total, same = total + len(expected["scores"]), same + shared(expected, found)
    assert total >= 40
    assert same >= 0.95 * total
    none = found_in(tmp_path / "m.onnx", picture(0), score_threshold=np.array(2, dtype=np.float32))
    assert {name: len(value) for name, value in none.items()} == dict.fromkeys(before, 0)


def test_adapters_that_are_not_merged_are_in_the_graph(tmp_path: Path) -> None:
    model = tiny_detector("retinanet")
    plain = found_by(model, picture(1))
    body = model.encoder.body
    refold.attach(body, refold.E3VA(), example=torch.rand(1, 3, 96, 160))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in refold.trainable_parameters(body).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    export_detector(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING, size=SIZE)
    expected, found = found_by(model, picture(1)), found_in(tmp_path / "m.onnx", picture(1))
    assert len(expected["scores"]) >= 5
    assert shared(expected, found) >= 0.9 * len(expected["scores"])
    assert shared(expected, plain) < 0.5 * len(expected["scores"])


class _Changing(torch.nn.Module):
    """Computes something else when it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * x if torch.compiler.is_compiling() else x


def test_a_file_that_differs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_detector("fcos")
    model.head.classification_head.conv.append(_Changing())
    with pytest.raises(RefoldError, match=r"m.onnx: \d+ of 120 objects are found by the model or by onnxruntime alone"):
        export_detector(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING, size=SIZE)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_detector(tmp_path: Path) -> None:
    shapes(tmp_path, counts=(4, 2, 2), side=64).root.rename(tmp_path / "data")
    done = run(
        "train", "data", "--task", "instance", "--decoder", "mask_rcnn(channels=16, hidden=32, rois=16)", "--model",
        "timm/test_convnext", "--random-weights", "--image-size", "64", "--epochs", "1", "--batch-size", "2",
        "--method", "RepAdapter(rank=4)", "-o", "run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run("export", "run", "-o", "m.onnx", "--preprocessing", "--size", "48", "80", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest difference from the model in PyTorch" in done.stdout
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = ["boxes", "labels", "scores", "masks"]
    outputs = session.run(names, {"image": pixels.numpy(), "score_threshold": np.array(0.01, dtype=np.float32)})
    found = {name: torch.tensor(value) for name, value in zip(names, outputs, strict=True)}
    model = cast(Detector, resolve(tmp_path / "run").model)
    model.roi_heads.score_thresh = 0.01
    expected = found_by(model, pixels)
    assert len(found["scores"]) == len(expected["scores"]) > 0
    assert found["masks"].shape == (len(found["scores"]), 1, 48, 80)
    assert shared(expected, found) >= 0.95 * len(expected["scores"])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["classes"] == '["disc", "square", "triangle"]'
