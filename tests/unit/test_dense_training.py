"""``refold.train`` of dense tasks on tiny pictures: the run folder, resuming, loading again, methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import refold
from dense_runs import settings
from refold.attachment import attached_part
from refold.dense import Encoder, load_encoder
from refold.dense.job import build_dense, build_plain, load_parts
from refold.dense.shapes import shapes
from refold.errors import DataError, StoreError
from refold.report import write_report
from refold.segmentation import Inference, Segmenter
from refold.training import TrainConfig, TrainResult, evaluate, resolve, train

pytestmark = pytest.mark.timeout(120)
COUNTS = (4, 2, 2)
FILES = {
    "config.json", "metrics.jsonl", "adapter.safetensors", "checkpoint.pt", "tensorboard", "summary.json",
    "overlays.png",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data"), counts=COUNTS, side=64).root


@pytest.fixture(scope="module")
def segmented(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(settings(data, tmp_path_factory.mktemp("runs") / "segment", method=refold.RepAdapter(rank=4)))


@pytest.fixture(scope="module")
def detected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    output = tmp_path_factory.mktemp("runs") / "detect"
    return train(settings(data, output, task="detect", decoder="fcos", method=refold.E3VA(), epochs=1, lr=1e-3))


def pixels() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def seen(model: nn.Module) -> list[Tensor]:
    """What a model says of noise, in evaluation."""
    if isinstance(model, Segmenter):
        return [model(pixels())]
    return [value for one in model([image.sigmoid() for image in pixels()]) for value in one.values()]


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for left, right in zip(seen(a), seen(b), strict=True):
        torch.testing.assert_close(left, right)


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# -- the run folder -----------------------------------------------------------------------------------------------


def test_a_run_of_segmentation_leaves_its_files_and_true_metrics(segmented: TrainResult, data: Path) -> None:
    assert {path.name for path in segmented.output.iterdir()} == FILES
    summary = json.loads((segmented.output / "summary.json").read_text())
    assert summary["classes"] == ["background", "disc", "square", "triangle"]
    assert summary["images"] == dict(zip(("train", "val", "test"), COUNTS, strict=True))
    confusion, prep = np.zeros((4, 4)), segmented.preprocessing
    for file in sorted((data / "images" / "test").iterdir()):
        image = (np.asarray(Image.open(file)) / 255 - prep.mean) / prep.std
        mask = np.asarray(Image.open(data / "masks" / "test" / file.name))
        with torch.no_grad():
            logits = segmented.model(torch.from_numpy(image.transpose(2, 0, 1)[None]).float())
        np.add.at(confusion, (mask, logits[0].argmax(0).numpy()), 1)
    hits, union = confusion.diagonal(), confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    assert summary["metrics"]["test"]["miou"] == pytest.approx((hits / union)[union > 0].mean(), abs=1e-9)
    assert [row["pixels"] for row in summary["per_class"]] == confusion.sum(1).tolist()


def test_a_run_of_detection_leaves_its_files_and_coco_results(detected: TrainResult, data: Path) -> None:
    assert {path.name for path in detected.output.iterdir()} == FILES | {"predictions.json"}
    rows = json.loads((detected.output / "predictions.json").read_text())
    truth = json.loads((data / "annotations" / "instances_test.json").read_text())
    assert {row["image_id"] for row in rows} <= {image["id"] for image in truth["images"]}
    assert {row["category_id"] for row in rows} <= {1, 2, 3}
    assert {"val", "test"} == set(detected.summary["metrics"])


def test_a_run_of_instances_has_masks(data: Path, tmp_path: Path) -> None:
    result = train(settings(data, tmp_path / "run", task="instance", decoder=None, epochs=1, lr=1e-3))
    assert result.summary["decoder"] == "mask_rcnn"
    assert {"box_ap", "mask_ap", "ap"} <= set(result.metrics["test"])
    assert result.metrics["test"]["ap"] == result.metrics["test"]["mask_ap"]
    assert_equal(resolve(tmp_path / "run").model, result.model)


def test_the_report_has_the_pictures_and_the_classes(segmented: TrainResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(segmented.output, folder)
    page = write_report(folder).read_text()
    assert "semantic segmentation" in page
    assert "data:image/jpeg;base64" in page
    assert "triangle" in page
    assert "mIoU" in page
    assert "Decoder: linear" in page


def test_a_resumed_run_is_the_uninterrupted_one(segmented: TrainResult, data: Path, tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        if (row["epoch"], row["split"]) == (2, "train"):
            raise KeyboardInterrupt

    config = settings(data, tmp_path / "run", method=refold.RepAdapter(rank=4))
    with pytest.raises(KeyboardInterrupt):
        train(config, on_epoch=stop)
    result = train(config, resume=True)
    assert metric_rows(result.output) == metric_rows(segmented.output)
    assert result.metrics == segmented.metrics
    before, after = (load_file(one.adapter) for one in (segmented, result))
    assert all(torch.equal(before[key], after[key]) for key in before)


# -- the trained model again ----------------------------------------------------------------------------------------


METHODS = [
    refold.E3VA(), refold.RepAdapter(rank=4), refold.LoRA(rank=2), refold.LinearProbe(), refold.FullFineTune(),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("model", ["timm/test_convnext", "timm/test_vit"])
def test_every_method_is_trained_saved_and_found_again(
    method: refold.Method, model: str, data: Path, tmp_path: Path
) -> None:
    config = settings(data, tmp_path / "run", method=method, model=model, epochs=1, evaluate_test=False)
    untrained, _ = build_dense(config, load_parts(config).classes)
    result = train(config)
    with pytest.raises(AssertionError):
        assert_equal(untrained.eval(), result.model)
    assert_equal(resolve(tmp_path / "run").model, result.model)
    frozen = load_encoder_of(config).body.state_dict()
    body = result.model.get_submodule(attached_part(result.model))
    if method.mergeable:
        before = seen(result.model)
        refold.merge(body)
        for left, right in zip(seen(result.model), before, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        refold.unmerge(body)
    refold.detach(body)
    same = all(torch.equal(frozen[key], value) for key, value in body.state_dict().items())
    assert same or isinstance(method, refold.FullFineTune)


def load_encoder_of(config: TrainConfig) -> Encoder:
    """The config's encoder as it was before training."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return load_encoder(config.model, image_size=config.image_size, pretrained=False).encoder


def test_a_merged_detector_finds_the_same(data: Path, tmp_path: Path) -> None:
    config = settings(
        data, tmp_path / "run", task="detect", decoder="fcos", method=refold.RepAdapter(rank=4), epochs=1, lr=1e-3
    )
    model = train(config).model
    before = seen(model)
    assert before[0].numel()
    refold.merge(model.get_submodule(attached_part(model)))
    for left, right in zip(seen(model), before, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def plain(data: Path, **changes: Any) -> nn.Module:
    """The model of :func:`settings` before anything was attached."""
    config = settings(data, data / "unused", **changes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_plain(config, ["background", "disc", "square", "triangle"])[0]


def test_a_file_is_loaded_into_the_whole_model_or_into_the_encoder(segmented: TrainResult, data: Path) -> None:
    whole = plain(data)
    assert refold.load(whole, segmented.adapter) is whole
    assert_equal(whole.eval(), segmented.model)
    encoder: Any = load_encoder_of(TrainConfig.load(segmented.output))
    refold.load(encoder.body, segmented.adapter)
    trained: Any = segmented.model
    with torch.no_grad():
        for left, right in zip(encoder(pixels()), trained.encoder(pixels()), strict=True):
            torch.testing.assert_close(left, right)


def test_a_file_for_another_decoder_or_other_shapes_is_refused(
    segmented: TrainResult, data: Path, tmp_path: Path
) -> None:
    other = plain(data, decoder="segformer")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(StoreError, match="missing tensors"):
        refold.load(other, segmented.adapter)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    assert not attached_part(other)
    with safe_open(segmented.adapter, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(segmented.adapter)
    key = next(key for key in tensors if key.startswith("task/") and key.endswith("head.weight"))
    save_file({**tensors, key: tensors[key][:3].contiguous()}, tmp_path / "three.safetensors", metadata=metadata)
    with pytest.raises(StoreError, match=r"has shape \(3, .*this model needs \(4,"):
        refold.load(plain(data), tmp_path / "three.safetensors")
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / "less.safetensors", metadata=metadata)
    with pytest.raises(StoreError, match=f"missing tensors.*{key.removeprefix('task/')}"):
        refold.load(plain(data), tmp_path / "less.safetensors")


# -- scores and predictions -----------------------------------------------------------------------------------------


def test_evaluate_finds_the_metrics_of_the_run(segmented: TrainResult, detected: TrainResult, data: Path) -> None:
    for result in (segmented, detected):
        assert evaluate(result.output).metrics == pytest.approx(result.metrics["test"], abs=1e-6)
        assert evaluate(result.model, data, split="val").metrics == pytest.approx(result.metrics["val"], abs=1e-6)


def test_evaluate_counts_classes_as_the_model_does(
    segmented: TrainResult, detected: TrainResult, data: Path, tmp_path: Path
) -> None:
    """The same pictures with the classes in another order, masks and JSON alike."""
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (copy / "classes.txt").write_text("triangle\nsquare\nbackground\ndisc\n")
    turned = np.array([2, 3, 1, 0], np.uint8)
    for file in copy.glob("masks/*/*.png"):
        Image.fromarray(turned[np.asarray(Image.open(file))]).save(file)
    for file in copy.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        ids = {"disc": 30, "square": 20, "triangle": 10}
        old = {one["id"]: one["name"] for one in content["categories"]}
        content["categories"] = [{"id": ids[name], "name": name} for name in reversed(ids)]
        for one in content["annotations"]:
            one["category_id"] = ids[old[one["category_id"]]]
        file.write_text(json.dumps(content))
    for result in (segmented, detected):
        assert evaluate(result.output, copy).metrics == pytest.approx(result.metrics["test"], abs=1e-6)
    (copy / "classes.txt").write_text("triangle\nsquare\nbackground\nhexagon\n")
    with pytest.raises(DataError, match="does not know: hexagon"):
        evaluate(segmented.output, copy)


def test_evaluate_looks_through_windows_at_scales_and_mirrored(segmented: TrainResult) -> None:
    whole = evaluate(segmented.output).metrics
    assert evaluate(segmented.output, inference=Inference(window=(64, 64))).metrics == pytest.approx(whole)
    assert evaluate(segmented.output, short_side=64).metrics == pytest.approx(whole)
    for inference in (Inference(window=(32, 32)), Inference(scales=(0.5,)), Inference(flip=True)):
        assert evaluate(segmented.output, inference=inference).metrics["miou"] != whole["miou"]


def test_predicted_masks_are_palette_images_of_the_models_classes(
    segmented: TrainResult, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for k, file in enumerate(sorted((data / "images" / "test").iterdir())):
        Image.open(file).resize((100, 70)).save(tmp_path / "photos" / ("more" if k else "") / "a.jpg")
    rows = refold.predict(segmented.model, tmp_path / "photos")
    refold.predict(segmented.output, tmp_path / "photos", output=tmp_path / "out")
    for row, name in zip(rows, ("a", "more/a"), strict=True):
        with Image.open(tmp_path / "out" / "masks" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", (100, 70))
            assert np.array_equal(np.asarray(mask), row["prediction"].numpy())
            assert (mask.getpalette() or [1])[:6] == [0, 0, 0, 0xE6, 0x19, 0x4B]  # the background, the first class
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as overlay:
            assert overlay.size == (700, 490)  # enlarged sevenfold
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["background", "disc", "square", "triangle"]
    with pytest.raises(DataError, match="not empty"):
        refold.predict(segmented.output, tmp_path / "photos", output=tmp_path / "out")


def test_predicted_objects_score_in_coco_as_the_run_does(detected: TrainResult, data: Path, tmp_path: Path) -> None:
    """The file, given to COCO's evaluation together with the truth; ids follow the order of the names in both."""
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    refold.predict(detected.output, data / "images" / "test", output=tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    truth = COCO(json.loads((data / "annotations" / "instances_test.json").read_text()))
    names = {image["id"]: image["file_name"] for image in truth.dataset["images"]}
    assert all(names[row["image_id"]] == row["file_name"] for row in rows)
    evaluation = COCOeval_faster(truth, truth.loadRes(rows), "bbox", print_function=lambda *_: None)
    evaluation.run()
    assert evaluation.stats_as_dict["AP_all"] == pytest.approx(detected.metrics["test"]["ap"], abs=1e-6)
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == COUNTS[2]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"target": "label"}, "target"),
        ({"batch_size": 2}, "batch_size"),
        ({"skip_bad_images": True}, "skip_bad_images"),
        ({"test": "test.csv"}, "test"),
    ],
)
def test_evaluate_refuses_what_is_not_for_dense_tasks(
    segmented: TrainResult, arguments: dict[str, Any], name: str
) -> None:
    with pytest.raises(DataError, match="is not for task 'segment'") as caught:
        evaluate(segmented.output, **arguments)
    assert caught.value.where == name


def test_windows_are_for_segmentation_and_thresholds_for_detection(
    segmented: TrainResult, detected: TrainResult, data: Path
) -> None:
    with pytest.raises(DataError, match="inference: is not for task 'detect'"):
        evaluate(detected.output, inference=Inference(flip=True))
    with pytest.raises(DataError, match="short_side: is not for task 'detect'"):
        refold.predict(detected.output, data / "images", short_side=0)
    with pytest.raises(DataError, match="threshold: is not for task 'segment'"):
        refold.predict(segmented.output, data / "images", threshold=0.3)
    with pytest.raises(DataError, match="no adapter"):
        evaluate(plain(data))
