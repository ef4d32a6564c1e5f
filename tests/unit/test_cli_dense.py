"""The commands on dense tasks, end to end on drawn pictures, and one clear line for every bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import refold
from commands import run
from refold.dense.shapes import shapes
from refold.export import export_weights
from refold.training import resolve

pytestmark = pytest.mark.timeout(120)
COMMON = ("--model", "timm/test_convnext", "--random-weights", "--image-size", "64", "--epochs", "1")
RUNS = {
    "seg": ("--task", "segment", "--decoder", "fpn", "--method", "RepAdapter(rank=4)", "--batch-size", "4"),
    "side": ("--task", "segment", "--decoder", "linear", "--method", "E3VA", "--batch-size", "4"),
    "det": ("--task", "detect", "--decoder", "fcos", "--method", "RepAdapter(rank=4)", "--batch-size", "2"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a finished run of each of :data:`RUNS`."""
    folder = tmp_path_factory.mktemp("cli")
    shapes(folder, counts=(4, 2, 2), side=64).root.rename(folder / "data")
    for name, arguments in RUNS.items():
        done = run("train", "data", *COMMON, *arguments, "-o", name, cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / f"{name}.txt").write_text(done.stdout)
    return folder


def test_train_shows_its_results_and_what_it_wrote(place: Path) -> None:
    said = (place / "seg.txt").read_text()
    assert "val mIoU" in said
    assert "triangle" in said
    assert "Exactness certificate: holds" in said
    assert "Report: seg/report.html\nAdapter: seg/adapter.safetensors\nOverlays: seg/overlays.png\n" in said
    said = (place / "det.txt").read_text()
    assert "test AP50" in said
    assert "Predictions: det/predictions.json" in said
    assert "Exactness certificate" not in (place / "side.txt").read_text()
    assert json.loads((place / "seg" / "certificate.json").read_text())["holds"] is True
    assert {row["name"] for row in json.loads((place / "det" / "cost.json").read_text())["rows"]} == {
        "backbone", "unmerged", "merged",
    }  # fmt: skip


def test_evaluate_prints_the_metrics_of_the_run(place: Path) -> None:
    for name, metric in (("seg", "miou"), ("det", "ap")):
        done = run("evaluate", name, cwd=place)
        assert done.returncode == 0, done.stderr
        value = json.loads((place / name / "summary.json").read_text())["metrics"]["test"][metric]
        assert f"{value:.3f}" in done.stdout
    options = ("--window", "32", "--stride", "16", "--scale", "1", "--scale", "1.5", "--flip", "--short-side", "0")
    done = run("evaluate", "seg", "data", "--split", "val", *options, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "mIoU" in done.stdout


@pytest.mark.parametrize("name", ["seg", "det"])
def test_scoring_and_predicting_show_how_far_they_are(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    refold.evaluate(name, progress=True)
    assert "2/2" in capsys.readouterr().err
    refold.predict(name, "data/images", output=tmp_path / "out", progress=True)
    assert "8/8" in capsys.readouterr().err
    refold.evaluate(name)
    assert capsys.readouterr().err == ""


def test_predict_writes_masks_objects_and_overlays(place: Path) -> None:
    done = run("predict", "seg", "data/images/test", "-o", "masks-out", "--flip", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "2 images: masks-out" in done.stdout
    with Image.open(place / "masks-out" / "masks" / "test_000.png") as mask:
        assert mask.mode == "P"
        assert np.asarray(mask).max() < 4
    done = run("predict", "det", "data/images/test/test_001.png", "-o", "boxes-out", "--threshold", "0.1", cwd=place)
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "boxes-out" / "predictions.json").read_text())
    assert {(row["image_id"], row["file_name"]) for row in rows} <= {(1, "test_001.png")}
    assert (place / "boxes-out" / "overlays" / "test_001.png").is_file()


@pytest.mark.parametrize("name", ["seg", "det"])
def test_merge_writes_the_whole_model_with_a_plain_backbone(name: str, place: Path) -> None:
    import timm

    done = run("merge", name, "-o", f"{name}.safetensors", cwd=place)
    assert done.returncode == 0, done.stderr
    prefix = {"seg": "encoder.body", "det": "backbone.encoder.body"}[name]
    assert f"names begin with {prefix}." in done.stdout
    state = load_file(place / f"{name}.safetensors")
    body = {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}
    plain = timm.create_model("test_convnext", features_only=True)
    plain.load_state_dict(body, strict=True)
    images = torch.randn(2, 3, 64, 64)
    adapted = resolve(place / name)
    with torch.no_grad():
        for left, right in zip(plain.eval()(images), adapted.backbone(images), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    with pytest.raises(refold.MergeError, match="attached and not merged"):
        export_weights(adapted.model, place / "unmerged.safetensors")


@pytest.mark.parametrize("name", ["seg", "side"])
def test_export_writes_a_segmenter_that_takes_pixels(name: str, place: Path) -> None:
    import onnx
    import onnxruntime

    done = run("export", name, "-o", f"{name}.onnx", "--preprocessing", cwd=place)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(place / f"{name}.onnx", providers=["CPUExecutionProvider"])
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    (logits,) = session.run(None, {"images": pixels.numpy()})
    ready = resolve(place / name)
    mean, std = (torch.tensor(v)[:, None, None] for v in (ready.preprocessing.mean, ready.preprocessing.std))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(logits), ready.model((pixels / 255 - mean) / std), rtol=1e-3, atol=1e-3
        )
    facts = {entry.key: entry.value for entry in onnx.load(place / f"{name}.onnx").metadata_props}
    assert json.loads(facts["task"]) == "segment"
    assert json.loads(facts["classes"]) == ["background", "disc", "square", "triangle"]


def test_explain_shows_the_sites_in_the_backbone(place: Path) -> None:
    done = run("explain", "seg", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "RepAdapter" in done.stdout
    assert "folds" in done.stdout


def test_help_names_the_tasks(place: Path) -> None:
    done = run("train", "--help", cwd=place)
    for word in ("segment", "faster_rcnn", "setr_pup", "hflip", "--decoder"):
        assert word in done.stdout


TRAIN = ("train", "data", "--model", "timm/test_convnext", "--random-weights", "--image-size", "64", "-o", "new")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*TRAIN, "--task", "pose"), "task: must be one of None, segment, detect, instance"),
        ((*TRAIN, "--decoder", "fpn"), "decoder: is for dense tasks"),
        ((*TRAIN, "--task", "detect", "--decoder", "mask_rcnn"), "decoder: 'mask_rcnn' is not for detect"),
        ((*TRAIN, "--task", "segment", "--mixup", "0.1"), "mixup: is not for task 'segment'"),
        ((*TRAIN, "--task", "segment", "--target", "a"), "target: is not for task 'segment'"),
        ((*TRAIN, "--task", "detect", "--augment", "standard"), "augment: unknown augmentation 'standard'"),
        ((*TRAIN, "--task", "segment", "--select", "ap"), "select: 'ap' is no metric here"),
        (("train", "nowhere", "--task", "segment", "-o", "new"), "nowhere: there is no such folder"),
        (("evaluate", "det", "--flip"), "inference: is not for task 'detect'"),
        (("evaluate", "seg", "--window", "32", "--stride", "64"), "stride"),
        (("evaluate", "seg", "--batch-size", "2"), "batch_size: is not for task 'segment'"),
        (("predict", "seg", "data/images/test"), "--output: is needed for task 'segment'"),
        (("predict", "seg", "data/images/test", "-o", "data"), "the output folder is not empty"),
        (("predict", "seg", "data/images/test", "-o", "new", "--threshold", "0.1"), "threshold: is not for task"),
        (("export", "det", "-o", "det.pt2", "--format", "program"), "a detector takes a list of images"),
        (("export", "seg", "-o", "seg.onnx", "--size", "64", "64"), "--size: is for detectors in ONNX only"),
        (("export", "side", "-o", "w.safetensors", "--format", "weights"), "stay beside the backbone"),
        (("merge", "side"), "E3VA() does not fold into a backbone's weights"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(place: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments, cwd=place)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (place / "new" / "metrics.jsonl").exists()
