"""Few shots and domain generalization on small pictures of one colour: draws, choices, further sets, commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import refold
from commands import run
from refold.data import load_dataset
from refold.errors import DataError
from refold.protocols import load_other, run_domains, run_few_shot, run_suite
from refold.protocols.fewshot import draw_shots
from refold.report.protocols import domain_grid, few_shot_curves, few_shot_grid, suite_grid
from refold.training import TrainConfig

pytestmark = pytest.mark.timeout(120)
COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (220, 30, 30)}


def paint(folder: Path, names: dict[str, str], count: int, *, seed: int, noise: int) -> None:
    """``count`` pictures of each class, called as ``names`` says."""
    generator = np.random.default_rng(seed)
    for colour, name in names.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.array(COLOURS[colour]) + generator.integers(-noise, noise + 1, (16, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{k}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("shots")
    same = {name: name for name in COLOURS}
    paint(base / "source" / "train", same, 9, seed=0, noise=30)
    paint(base / "source" / "test", same, 4, seed=1, noise=30)
    paint(base / "noisy", same, 5, seed=2, noise=90)
    paint(base / "two", {"red": "rot", "blue": "blau"}, 3, seed=3, noise=30)
    (base / "two.csv").write_text("rot,red\nblau,blue\n")
    return base


def config(place: Path, output: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "data": place / "source", "output": output, "model": "timm/test_vit", "pretrained": False, "image_size": 32,
        "method": refold.LinearProbe(), "epochs": 4, "warmup_epochs": 0, "lr": 1e-2, "precision": "fp32",
        "attention": "default", "batch_size": 8, "fractions": (1.0, 0.0, 0.0),
    }  # fmt: skip
    return TrainConfig.of(**base | changes)


def test_draws_are_nested_disjoint_and_of_every_class() -> None:
    targets = torch.tensor([0, 1, 2] * 10)
    names = ["a", "b", "c"]
    small, validation = draw_shots(targets, names, 2, 0, validate=True)
    large, more = draw_shots(targets, names, 6, 0, validate=True)
    assert set(small) < set(large)
    assert targets[small].bincount().tolist() == [2, 2, 2]
    assert targets[validation].bincount().tolist() == [2, 2, 2]
    assert targets[more].bincount().tolist() == [4, 4, 4]
    assert not set(large) & set(more)
    assert draw_shots(targets, names, 6, 0) == (large, [])
    assert draw_shots(targets, names, 6, 1) != (large, [])
    with pytest.raises(DataError, match="class 'a' has 10 training images; 8 to train and 4 to validate are needed"):
        draw_shots(targets, names, 8, 0, validate=True)


def test_curves_of_several_methods(place: Path, tmp_path: Path) -> None:
    methods = [refold.LinearProbe(), refold.RepAdapter(rank=2)]
    settings = config(place, tmp_path)
    result = run_few_shot(settings, methods, shots=[4, 1], seeds=[0, 1], grid=["scale=1,5"])
    assert [(row.method, row.shots) for row in result.rows] == [
        (method.describe(), shots) for method in methods for shots in (1, 4)
    ]
    assert (result.classes, result.test_images) == (3, 12)
    for row in result.rows:
        assert len(row.accuracy) == 2
        assert bool(row.candidates) == row.method.startswith("RepAdapter")
    record = json.loads(next((tmp_path / "LinearProbe__" / "4-shot").iterdir()).read_text())
    assert record["images"] == {"train": 12, "test": 12}
    search = json.loads((tmp_path / "RepAdapter_rank_2_" / "4-shot" / "val-scale5-0.json").read_text())
    assert search["images"] == {"train": 12, "val": 12}
    grid = few_shot_grid(result)
    assert grid.columns == ("method", "1 shot", "4 shots")
    assert "12 test images" in grid.title
    assert few_shot_curves(result).axes[0].get_legend().get_texts()[1].get_text() == methods[1].describe()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-shot/*.json")}
    assert run_few_shot(settings, methods, shots=[1, 4], seeds=[0, 1], grid=["scale=1,5"]).rows == result.rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*-shot/*.json")} == files


def test_a_further_set_counts_as_the_source_and_its_classes_compete_alone(place: Path) -> None:
    classes = ["blue", "green", "red"]
    whole = load_other(place / "noisy", classes)
    assert whole.outputs is None
    assert whole.images.targets.bincount().tolist() == [5, 5, 5]
    part = load_other(place / "two", classes, place / "two.csv")
    assert part.outputs is not None
    assert part.outputs.tolist() == [0, 2]
    for path, target in zip(part.images.paths, part.images.targets.tolist(), strict=True):
        assert {"blau": 0, "rot": 2}[Path(path).parent.name] == target
    with pytest.raises(DataError, match=r"its class 'blau' is none of the source's\. Map it"):
        load_other(place / "two", classes)


def test_a_further_set_keeps_its_channels() -> None:
    splits = load_dataset("packaged/elpv", fractions=(1.0, 0.0, 0.0))
    assert splits.classes is not None
    other = load_other("packaged/elpv", splits.classes[::-1])
    assert torch.equal(other.images.targets, 1 - splits.train.targets)
    assert torch.equal(other.images.read([0, 7], (16, 16)), splits.train.read([0, 7], (16, 16)))


def test_domains_are_tested_with_one_training(place: Path, tmp_path: Path) -> None:
    settings = config(place, tmp_path, epochs=2)
    others = {"noisy": place / "noisy", "two": place / "two"}
    result = run_domains(
        settings, [refold.BitFit()], others, mappings={"two": place / "two.csv"}, shots=4, seeds=[0, 1]
    )
    (row,) = result.rows
    assert row.source is not None
    assert result.images == {"": 12, "noisy": 15, "two": 6}
    assert row.average.mean == pytest.approx((row.others["noisy"].mean + row.others["two"].mean) / 2)
    records = [json.loads((tmp_path / "BitFit__" / f"test-given-{seed}.json").read_text()) for seed in (0, 1)]
    assert [record["others"]["two"] for record in records] == list(row.others["two"])
    assert records[0]["images"] == {"train": 12, "test": 12}
    assert domain_grid(result).columns[2:] == (
        "source, 12 images", "noisy, 15 images", "two, 6 images", "mean of the others"
    )  # fmt: skip


def test_a_suite_is_its_sets_and_their_mean(place: Path, tmp_path: Path) -> None:
    methods = [refold.LinearProbe(), refold.RepAdapter(rank=2)]
    settings = config(place, tmp_path, fractions=(0.6, 0.2, 0.2))
    sets = {"clean": place / "source", "noisy": place / "noisy"}
    result = run_suite(settings, methods, sets, seeds=[0, 1], grid=["scale=1,5"])
    assert [(row.method, row.data) for row in result.rows] == [(m.describe(), s) for m in methods for s in sets]
    probe = [row.accuracy for row in result.rows[:2]]
    assert list(result.average("LinearProbe()")) == [(a + b) / 2 for a, b in zip(*probe, strict=True)]
    record = json.loads(next((tmp_path / "noisy" / "LinearProbe__").iterdir()).read_text())
    assert record["images"] == {"train": 9, "test": 3}
    search = json.loads((tmp_path / "noisy" / "RepAdapter_rank_2_" / "val-scale1-0.json").read_text())
    assert search["images"] == {"train": 9, "val": 3}
    grid = suite_grid(result)
    assert grid.columns == ("method", "clean, 12 images", "noisy, 3 images", "mean")
    with pytest.raises(DataError, match=r"^noisy: has no test split"):
        run_suite(settings.replace(fractions=(0.8, 0.2, 0.0)), methods, sets)


def test_a_record_of_other_images_or_labels_is_not_taken_for_this_one(place: Path, tmp_path: Path) -> None:
    settings, method = config(place, tmp_path, epochs=1), [refold.LinearProbe()]
    others = {"two": place / "two"}
    run_domains(settings, method, others, mappings={"two": place / "two.csv"}, shots=2, seeds=[0])
    crossed = tmp_path / "crossed.csv"
    crossed.write_text("rot,blue\nblau,red\n")
    for changed in ({"two": crossed}, None):
        further = others if changed else {"noisy": place / "noisy"}
        with pytest.raises(DataError, match="was trained or tested on other images or labels"):
            run_domains(settings, method, further, mappings=changed, shots=2, seeds=[0])


def test_what_does_not_go_together_is_refused(place: Path, tmp_path: Path) -> None:
    settings = config(place, tmp_path)
    probe = [refold.LinearProbe()]
    for call, reason in (
        (lambda: run_few_shot(settings, probe, shots=[10]), "class 'blue' has 9 training images"),
        (lambda: run_few_shot(settings, probe, shots=[0]), "^shots: must be 1 or more"),
        (lambda: run_few_shot(settings, probe, seeds=[]), "^seeds"),
        (lambda: run_few_shot(settings, []), "^methods"),
        (lambda: run_few_shot(settings, probe, grid=["width=1"]), "LinearProbe has no 'width'"),
        (lambda: run_few_shot(settings.replace(data=str(place / "noisy")), probe), "has no test split"),
        (lambda: run_domains(settings, probe, {}), "^others"),
        (lambda: run_domains(settings, probe, {"a": place / "noisy"}, mappings={"b": "x"}), "^mapping of b"),
        (
            lambda: run_domains(settings, probe, {"a": place / "noisy"}, grid=["lr=1e-3,1e-2"], shots=None),
            "has no validation split",
        ),
    ):
        with pytest.raises(DataError, match=reason):
            call()
    assert not list(tmp_path.rglob("*.json"))


def test_the_commands(place: Path, tmp_path: Path) -> None:
    common = ("--model", "timm/test_vit", "--random-weights", "--image-size", "32", "--epochs", "1", "--seeds", "0")
    done = run(
        "fewshot", str(place / "source"), *common, "--shots", "1,2", "--method", "LinearProbe", "--method", "BitFit",
        "--published-recipe", "-o", "few", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 shots" in done.stdout
    assert (tmp_path / "few" / "curves.png").stat().st_size > 5000
    record = json.loads((tmp_path / "few" / "BitFit__" / "1-shot" / "test-given-0.json").read_text())
    assert record["settings"]["mixup"] == 0.8
    assert record["settings"]["augment"] == "randaugment"
    done = run(
        "dg", str(place / "source"), *common, "--other", f"n={place / 'noisy'}", "--other", f"t={place / 'two'}",
        "--mapping", f"t={place / 'two.csv'}", "--method", "LinearProbe", "-o", "far", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mean of the others" in (tmp_path / "far" / "results.md").read_text()
    done = run(
        "suite", f"a={place / 'source'}", f"b={place / 'noisy'}", *common, "--method", "LinearProbe", "-o", "all",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "b, 3 images" in done.stdout
    refused = run("dg", str(place / "source"), "--other", "noisy", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr == "error: --other: cannot read 'noisy'. Write NAME=PATH, each name once\n"
