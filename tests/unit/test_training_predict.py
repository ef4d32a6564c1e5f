"""Evaluation and prediction from models, run folders and files, on folders, tables and single images."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import refold
from refold.errors import DataError, StoreError
from refold.training import TrainResult, evaluate, predict, resolve, train


def paint(path: Path, red: float, green: float, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 20, (32, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * np.array([red, green, 0.5]) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three colours in a folder each, and tables of what is in them."""
    root = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = []
    for i in range(36):
        red, green = [(0.9, 0.1), (0.1, 0.9), (0.8, 0.8)][i % 3]
        path = root / "colours" / ("red", "green", "yellow")[i % 3] / f"{i:02}.png"
        paint(path, red, green, i)
        labels = ";".join(name for name, level in (("green", green), ("red", red)) if level > 0.5)
        rows.append({"path": path.relative_to(root), "labels": labels, "warmth": 10.25 + 30 * red})
    for column in ("labels", "warmth"):
        with (root / f"{column}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", column])
            writer.writerows([row["path"], row[column]] for row in rows)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), root / "backbone.safetensors")
    return root


def learn(root: Path, output: Path, data: str, **changes: Any) -> TrainResult:
    settings: dict[str, Any] = {
        "data": root / data,
        "model": "timm/test_vit",
        "weights": root / "backbone.safetensors",
        "method": refold.RepAdapter(rank=4),
        "output": output,
        "fractions": (24, 6, 6),
        "image_size": 32,
        "epochs": 6,
        "batch_size": 8,
        "lr": 5e-3,
        "attention": "default",
        "precision": "fp32",
    }
    return train(**(settings | changes))


@pytest.fixture(scope="module")
def colours(root: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return learn(root, tmp_path_factory.mktemp("runs") / "colours", "colours")


def test_model_folder_and_file_predict_the_same(colours: TrainResult, root: Path) -> None:
    images = root / "colours"
    rows = predict(colours.output, images)
    assert [row["path"] for row in rows] == sorted(str(p) for p in images.rglob("*.png"))
    assert rows.skipped == []
    assert sum(row["prediction"] == Path(row["path"]).parent.name for row in rows) > 18
    assert set(rows[0]) == {"path", "prediction", "score green", "score red", "score yellow"}
    assert predict(colours.model, images) == rows
    assert predict(colours.adapter, images, weights=root / "backbone.safetensors") == rows
    few = predict(colours.model, [rows[7]["path"], rows[0]["path"]], batch_size=1)
    assert [row["path"] for row in few] == [rows[7]["path"], rows[0]["path"]]
    assert few[1]["prediction"] == rows[0]["prediction"]
    assert few[1]["score red"] == pytest.approx(rows[0]["score red"], abs=1e-5)
    (single,) = predict(colours.model, rows[0]["path"])
    assert single["prediction"] == rows[0]["prediction"]


def test_a_merged_model_predicts_the_same(colours: TrainResult, root: Path) -> None:
    ready = resolve(colours.output)
    before = predict(ready.model, root / "colours")
    refold.merge(ready.model)
    after = predict(ready.model, root / "colours")
    assert [row["prediction"] for row in after] == [row["prediction"] for row in before]
    assert [r["score red"] for r in after] == pytest.approx([r["score red"] for r in before], abs=1e-5)


def test_a_run_folder_knows_its_data(colours: TrainResult) -> None:
    assert evaluate(colours.output).metrics == colours.metrics["test"]
    assert evaluate(colours.output, split="val").metrics == colours.metrics["val"]
    assert len(evaluate(colours.output, split="train").rows) == 24


def test_other_data_is_scored_in_the_models_order_of_classes(colours: TrainResult, root: Path, tmp_path: Path) -> None:
    """Without green, the folder's own order of classes is another one than the model's."""
    for name in ("yellow", "red"):
        for path in (root / "colours" / name).iterdir():
            paint(tmp_path / name / path.name, 0, 0, 0)
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    result = evaluate(colours.output, tmp_path)
    known = {row["path"]: row["prediction"] for row in predict(colours.model, tmp_path)}
    assert len(result.rows) == 24
    assert all(Path(row["path"]).parent.name == row["target"] for row in result.rows)
    assert {row["path"]: row["prediction"] for row in result.rows} == known
    right = sum(row["target"] == row["prediction"] for row in result.rows)
    assert result.metrics["accuracy"] == right / 24
    assert [sum(row) for row in result.details["confusion"]] == [0, 12, 12]


def test_multilabel_from_a_table(root: Path, tmp_path: Path) -> None:
    result = learn(root, tmp_path / "run", "labels.csv", target="labels", epochs=8)
    assert result.summary["task"] == "multilabel"
    assert result.summary["selected_by"] == "map"
    assert "confusion" not in result.summary
    assert [row["class"] for row in result.summary["per_class"]] == ["green", "red"]
    with (tmp_path / "run" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["target"] for row in rows} <= {"green", "red", "green, red"}
    (one,) = predict(tmp_path / "run", root / "colours" / "red" / "00.png")
    assert isinstance(one["prediction"], list)
    assert one["prediction"] == [name for name in ("green", "red") if one[f"score {name}"] > 0.5]
    assert evaluate(tmp_path / "run").metrics == result.metrics["test"]


def test_regression_from_a_table(root: Path, tmp_path: Path) -> None:
    """Warmth is 13.25, 34.25 or 37.25: predictions from the file alone are in that unit."""
    result = learn(root, tmp_path / "run", "warmth.csv", target="warmth", epochs=10)
    assert result.summary["classes"] is None
    assert result.summary["selected_by"] == "mae"
    assert set(result.metrics["test"]) == {"loss", "mae", "rmse", "r2"}
    assert result.metrics["val"]["mae"] < 8  # guessing the mean gives 10
    (one,) = predict(tmp_path / "run", root / "colours" / "red" / "00.png")
    assert set(one) == {"path", "prediction"}
    with (tmp_path / "run" / "predictions.csv").open() as file:
        errors = [abs(float(row["target"]) - float(row["prediction"])) for row in csv.DictReader(file)]
    assert sum(errors) / len(errors) == pytest.approx(result.metrics["test"]["mae"], rel=1e-4)
    again = evaluate(tmp_path / "run")
    assert again.metrics == pytest.approx(result.metrics["test"])
    with pytest.raises(DataError, match="is made for 'classify', and the model for 'regress'"):
        evaluate(tmp_path / "run", root / "colours")


def test_bad_images_are_named_or_left_out(colours: TrainResult, root: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "a.png", tmp_path / "b.png"
    paint(good, 0.9, 0.1, 0)
    bad.write_bytes(good.read_bytes()[:100])
    with pytest.raises(DataError) as caught:
        predict(colours.model, tmp_path)
    assert caught.value.where == str(bad)
    rows = predict(colours.model, tmp_path, skip_bad_images=True)
    assert [row["path"] for row in rows] == [str(good)]
    ((path, reason),) = rows.skipped
    assert path == str(bad)
    assert "cannot be decoded" in reason


def test_what_cannot_be_scored(colours: TrainResult, root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="split: must be train, val or test"):
        evaluate(colours.output, split="dev")
    with pytest.raises(DataError, match="data: is needed"):
        evaluate(colours.model)
    with pytest.raises(DataError, match="there is no such file"):
        predict(colours.model, tmp_path / "nothing.png")
    with pytest.raises(DataError, match="has no adapter"):
        resolve(nn.Linear(2, 2))
    paint(tmp_path / "red" / "0.png", 0.9, 0.1, 0)
    paint(tmp_path / "blue" / "0.png", 0.1, 0.1, 0)
    with pytest.raises(DataError, match="classes the model does not know: blue"):
        evaluate(colours.output, tmp_path)
    with pytest.raises(DataError, match=r"config\.json"):
        resolve(tmp_path)
    with pytest.raises(StoreError):
        resolve(root / "backbone.safetensors")
    undescribed = refold.attach(timm.create_model("test_vit", num_classes=2), refold.LinearProbe())
    with pytest.raises(DataError, match="does not say its preprocessing"):
        resolve(undescribed)


def test_training_says_what_it_skipped_and_scores_no_test_when_told(root: Path, tmp_path: Path) -> None:
    for path in (root / "colours").rglob("*.png"):
        target = tmp_path / "data" / path.relative_to(root / "colours")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    bad = tmp_path / "data" / "red" / "bad.png"
    bad.write_bytes(b"no image")
    result = learn(
        tmp_path, tmp_path / "run", "data", weights=root / "backbone.safetensors", epochs=1, skip_bad_images=True,
        evaluate_test=False, method=refold.LinearProbe(),
    )  # fmt: skip
    assert [path for path, _ in result.skipped] == [str(bad)]
    assert result.summary["skipped"][0]["path"] == str(bad)
    assert set(result.evaluations) == {"val"}
    assert result.summary["evaluated_split"] == "val"
    assert sum(map(sum, result.summary["confusion"])) == 6


def test_a_split_that_the_data_lacks_is_not_replaced_by_another(
    colours: TrainResult, root: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        for path in (root / "colours").rglob("*.png"):
            target = tmp_path / split / path.relative_to(root / "colours")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert len(evaluate(colours.output, tmp_path, split="val").rows) == 36
    with pytest.raises(DataError, match="the data has no test split"):
        evaluate(colours.output, tmp_path)
