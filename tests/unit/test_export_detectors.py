"""Detectors in ONNX: one whole file, and the parts that stand in for torchvision's or decide what is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import boxes as box_operations

import refold
from refold.errors import MergeError, MissingExtraError, RefoldError
from refold.export import export_detector
from refold.export.common import Difference
from refold.export.detector_file import compare_objects, paste
from tiny_detectors import PREPROCESSING, SIZE, found_by, picture, shared, tiny_detector


def test_masks_are_pasted_as_torchvision_does() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(40, 1, 28, 28, generator=generator)
    boxes = torch.rand(40, 4, generator=generator) * 80 - 10
    boxes[:, 2:] = boxes[:, :2] + torch.rand(40, 2, generator=generator) * 60
    boxes[0] = torch.tensor([3.0, 3.0, 3.0, 3.0])  # a point
    boxes[1] = torch.tensor([-10.3, -5.2, 200.0, 300.0])  # all of the image and more
    boxes[2] = torch.tensor([0.0, 0.0, 1.5, 2.5])
    for size in ((80, 96), (33, 70)):
        inside = box_operations.clip_boxes_to_image(boxes, size)  # as a detector's are
        torch.testing.assert_close(paste(masks, inside, size), paste_masks_in_image(masks, inside, size))
    assert paste(masks[:0], boxes[:0], (8, 9)).shape == (0, 1, 8, 9)


def objects(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, generator=generator) * 100
    return {
        "boxes": torch.cat([corners, corners + 20], dim=1),
        "labels": torch.randint(1, 4, (count,), generator=generator),
        "scores": torch.linspace(1, 0.5, count),
        "masks": torch.rand(count, 1, 30, 30, generator=generator),
    }


def test_objects_are_compared_in_any_order() -> None:
    expected, order = objects(40), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    found = {name: value[order] for name, value in expected.items()}
    found["boxes"] = found["boxes"] + 0.01
    difference = Difference("file")
    assert compare_objects(found, expected, difference) == (80, 0)
    assert difference.max_abs == pytest.approx(0.01, rel=1e-3)
    assert difference.max_rel == pytest.approx(0.01 / float(expected["boxes"].max()), rel=1e-3)
    fewer = {name: value[1:] for name, value in expected.items()}
    assert compare_objects(fewer, expected, Difference("file")) == (78, 1)
    nothing = {name: value[:0] for name, value in expected.items()}
    assert compare_objects(nothing, nothing, Difference("file")) == (0, 0)
    assert compare_objects(nothing, expected, Difference("file")) == (0, 40)


@pytest.mark.parametrize("name", ["boxes", "labels", "scores", "masks"])
def test_other_objects_are_no_partners(name: str) -> None:
    expected = objects(40)
    found = {key: value.clone() for key, value in expected.items()}
    found[name][:8] = found[name][:8] + 1 if name == "labels" else found[name][:8] * 0.8
    assert compare_objects(found, expected, Difference("file")) == (64, 16)


def test_a_file_finds_what_the_model_finds(tmp_path: Path) -> None:
    model = tiny_detector("fcos").train()
    nms = box_operations.batched_nms
    path = tmp_path / "model.onnx"
    result = export_detector(model, path, preprocessing=PREPROCESSING, size=SIZE, with_preprocessing=True)
    assert (result.path, result.bytes) == (path, path.stat().st_size)
    assert result.max_rel is not None
    assert result.max_rel < 1e-3
    assert model.training
    assert (model.score_thresh, box_operations.batched_nms) == (0.3, nms)
    model.eval()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for seed in range(3):
        expected = found_by(model, picture(seed))
        assert len(expected["scores"]) == 20
        outputs = session.run(["boxes", "labels", "scores"], {"image": picture(seed).numpy()})
        names = ("boxes", "labels", "scores")
        found = {name: torch.tensor(value) for name, value in zip(names, outputs, strict=True)}
        assert found["scores"].shape == (20,)
        assert shared(expected, found) >= 19
        threshold = np.array(float(expected["scores"][4]), dtype=np.float32)
        (scores,) = session.run(["scores"], {"image": picture(seed).numpy(), "score_threshold": threshold})
        assert 3 <= len(torch.tensor(scores)) <= 5
        assert float(torch.tensor(scores).min()) > threshold
    none = session.run(None, {"image": picture(0).numpy(), "score_threshold": np.array(2, dtype=np.float32)})
    assert [tuple(torch.tensor(value).shape) for value in none] == [(0, 4), (0,), (0,)]
    assert "preprocessing" not in session.get_modelmeta().custom_metadata_map  # it is in the graph


def test_bad_requests_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_detector("faster_rcnn")
    refold.attach(model.encoder.body, refold.E3VA(), example=torch.rand(1, 3, 96, 160))
    with pytest.raises(MergeError, match=r"a faster_rcnn cannot be traced with them.*Call refold\.merge"):
        export_detector(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    refold.detach(model.encoder.body)
    with pytest.raises(RefoldError, match=r"size: must be a height and a width in pixels, not 0 and 64"):
        export_detector(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING, size=(0, 64))
    with pytest.raises(RefoldError, match=r"float16, not float32.*model\.float"):
        export_detector(model.half(), tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    monkeypatch.setattr("refold.export.onnx_file._LIMIT", 100)
    with pytest.raises(RefoldError, match=r"do not fit in one ONNX file\. Use export_weights"):
        export_detector(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    monkeypatch.setattr("refold.export.onnx_file.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'onnx' is not installed.*refold\[export\]"):
        export_detector(model, tmp_path / "m.onnx", preprocessing=PREPROCESSING)
    assert not list(tmp_path.iterdir())
