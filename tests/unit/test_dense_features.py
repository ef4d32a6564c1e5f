"""``refold.train`` with cached features: the run without them, the backbone seen once, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import refold
from cached import Counted
from dense_runs import settings
from refold.dense.encoder import Encoder
from refold.dense.features import Features
from refold.dense.job import build_dense, load_parts, make_problem
from refold.dense.shapes import shapes
from refold.errors import DataError, RefoldError
from refold.training import TrainResult, train
from refold.training.loop import solve

pytestmark = pytest.mark.timeout(120)
TRAINED, VALIDATED, EPOCHS = 4, 2, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data"), counts=(TRAINED, VALIDATED, 2), side=64).root


def run(data: Path, output: Path, **changes: Any) -> TrainResult:
    return train(settings(data, output, **{"method": refold.E3VA(rank=2), "epochs": EPOCHS, **changes}))


def curve(result: TrainResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "split")} for row in result.fit.history]


def losses(result: TrainResult) -> list[float]:
    return [row["loss"] for row in result.fit.history if row["split"] == "train"]


@pytest.mark.parametrize("kind", ["segment E3VA", "segment probe", "detect E3VA"])
def test_a_run_with_cached_features_is_the_run_without(kind: str, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"lr": 1e-3}
    if kind.startswith("detect"):
        changes |= {"task": "detect", "decoder": "fcos", "epochs": 2}
    if kind.endswith("probe"):
        changes["method"] = refold.LinearProbe()
    without, cached = run(data, tmp_path / "a", **changes), run(data, tmp_path / "b", features="memory", **changes)
    for expected, found in zip(curve(without), curve(cached), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for split, scored in without.evaluations.items():
        assert cached.evaluations[split].metrics == pytest.approx(scored.metrics, rel=1e-4)
    assert cached.summary["features"]["kept"] == "memory"
    assert cached.summary["features"]["bytes"] > 0
    assert "features" not in without.summary


@pytest.mark.parametrize("views", [1, 2])
def test_the_backbone_sees_each_view_of_each_image_once(views: int, data: Path, tmp_path: Path) -> None:
    config = settings(
        data, tmp_path / "run", method=refold.E3VA(rank=2), epochs=4, augment="standard" if views > 1 else "none"
    )
    parts = load_parts(config)
    model, preprocessing = build_dense(config, parts.classes)
    assert isinstance(model.encoder, Encoder)
    features = Features("memory", views)
    seen: list[int] = []

    def count(row: dict[str, Any]) -> None:
        seen.append(counted.images)

    counted = Counted(model.encoder.body)
    before_training: list[int] = []
    solve(
        model, make_problem(model, parts, preprocessing, config, features), config, on_epoch=count,
        before_step=lambda step: before_training.append(counted.images),
    )  # fmt: skip
    proofs = before_training[0]  # of what is replayed, before the first step
    by_epoch = [number - proofs for number in seen[1::2]]  # after each validation
    fresh = [TRAINED + VALIDATED] + [TRAINED] * (views - 1)
    assert by_epoch == [sum(fresh[: k + 1]) for k in range(4)]


def test_views_are_shown_in_turn(data: Path, tmp_path: Path) -> None:
    """Two views: epochs 1 and 2 are those without a cache, epoch 3 shows the first view again."""
    base: dict[str, Any] = {"augment": "standard", "lr": 1e-12, "min_lr": 0, "warmup_lr": 0}
    without = losses(run(data, tmp_path / "a", **base))
    found = losses(run(data, tmp_path / "b", **base, features="memory", views=2))
    assert found[:2] == pytest.approx(without[:2], rel=1e-4)
    assert found[2] != pytest.approx(without[2], rel=1e-4)


def test_a_folder_is_taken_up_by_a_run_with_another_adapter_and_refused_to_other_images(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    first = run(data, tmp_path / "a", features=folder)
    stamp = (folder / "features.bin").read_bytes()
    run(data, tmp_path / "b", features=folder, method=refold.E3VA(rank=3), decoder="fpn", lr=1e-3, batch_size=4)
    assert (folder / "features.bin").read_bytes() == stamp
    assert first.summary["features"] == {"kept": str(folder), "bytes": len(stamp)}
    for name, changes, reason in (
        ("c", {"augment": "flip"}, "augment none, not flip"),
        ("d", {"image_size": 96}, "preprocessing"),
        ("e", {"method": refold.LinearProbe()}, "reads"),
        ("f", {"model": "timm/test_convnext2"}, "backbone"),
    ):
        with pytest.raises(RefoldError, match=reason):
            run(data, tmp_path / name, features=folder, **changes)
    changed = shutil.copytree(data, tmp_path / "data")
    image = next((changed / "images" / "train").iterdir())
    pixels = np.array(Image.open(image))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    with pytest.raises(RefoldError, match="has another content"):
        run(changed, tmp_path / "g", features=folder)


def test_a_run_goes_on_from_its_checkpoint_with_or_without_cached_features(data: Path, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", features="memory")

    class Stop(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Stop

    config = settings(
        data, tmp_path / "halves", method=refold.E3VA(rank=2), epochs=EPOCHS, features=tmp_path / "features"
    )
    with pytest.raises(Stop):
        train(config, on_epoch=stop)
    resumed = train(config.replace(features="memory"), resume=True)
    assert curve(resumed) == curve(whole)


BAD = {
    "method": ({"method": refold.RepAdapter()}, "RepAdapter changes what the backbone computes"),
    "views": ({"views": 2}, "2 views of images that are not augmented"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_cannot_be_cached_is_refused(name: str, data: Path, tmp_path: Path) -> None:
    changes, reason = BAD[name]
    with pytest.raises(RefoldError, match=reason):
        run(data, tmp_path / "run", features="memory", **changes)


def test_settings_that_mean_nothing_are_refused(data: Path, tmp_path: Path) -> None:
    for changes, name in (
        ({"views": 2}, "views"),
        ({"task": "video", "decoder": None, "features": "memory"}, "features"),
    ):
        with pytest.raises(DataError, match=f"^{name}"):
            settings(data, tmp_path / "run", **changes)


def test_detection_on_images_of_several_shapes_is_cached_one_by_one(data: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(data, tmp_path / "data")
    file = mixed / "annotations" / "instances_train.json"
    image = mixed / "images" / "train" / "train_001.png"
    Image.open(image).crop((0, 0, 64, 32)).save(image)
    content = json.loads(file.read_text())
    for entry in content["images"]:
        if entry["file_name"].endswith("train_001.png"):
            entry["height"] = 32
    file.write_text(json.dumps(content))
    changes: dict[str, Any] = {"task": "detect", "decoder": "fcos", "epochs": 2, "lr": 1e-3}
    with pytest.raises(DataError, match=r"train_001.*is seen at \(.*batch_size 1"):
        run(mixed, tmp_path / "two", features="memory", **changes)
    without = run(mixed, tmp_path / "a", batch_size=1, **changes)
    cached = run(mixed, tmp_path / "b", batch_size=1, features="memory", **changes)
    for expected, found in zip(curve(without), curve(cached), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
