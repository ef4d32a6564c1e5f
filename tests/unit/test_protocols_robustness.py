"""Corruptions against their definitions; calibration, pairs and ensembles of adapters against plain formulas."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import refold
from commands import run
from refold.errors import DataError, RefoldError
from refold.protocols import CORRUPTIONS, corrupt, examine
from refold.training import TrainConfig, evaluate, train

pytestmark = pytest.mark.timeout(120)


def pictures(count: int = 2, side: int = 96, channels: int = 3) -> torch.Tensor:
    """Smooth, and neither black nor white."""
    rows = torch.linspace(60, 190, side)
    waves = torch.stack([rows[:, None] + 20 * torch.sin(rows / (5 + k)) for k in range(channels)])
    return torch.stack([waves, waves.flip(-1)][:count]).to(torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_corruption_grows_with_its_severity_and_depends_on_its_image_alone(name: str, channels: int) -> None:
    images = pictures(channels=channels)
    assert images.dtype == torch.uint8
    distances = []
    for severity in (1, 3, 5):
        found = corrupt(images, name, severity)
        assert found.dtype == torch.uint8
        assert found.shape == images.shape
        distances.append(float((found.float() - images.float()).square().mean()))
        alone = corrupt(images[1:], name, severity, first=1)
        assert torch.equal(alone[0], found[1])
    assert 0 < distances[0] < distances[1] < distances[2]


def test_corruptions_are_what_they_are_called() -> None:
    flat = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    noise = corrupt(flat, "gaussian_noise", 1).float() / 255 - 128 / 255
    assert float(noise.std()) == pytest.approx(0.08, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.003)
    shot = corrupt(flat, "shot_noise", 1).float() / 255
    assert float(shot.var()) == pytest.approx(128 / 255 / 60, rel=0.05)
    salt = corrupt(flat, "impulse_noise", 5)
    assert float(((salt == 0) | (salt == 255)).float().mean()) == pytest.approx(0.27, rel=0.05)
    for name in ("defocus_blur", "gaussian_blur", "contrast", "pixelate"):
        assert torch.equal(corrupt(flat, name, 4), flat)
    assert corrupt(flat, "brightness", 2).unique().tolist() == [179]  # (128 / 255 + 0.2) 255
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 100
    assert corrupt(red, "brightness", 1)[0, :, 0, 0].tolist() == [126, 0, 0]
    dot = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    dot[..., 20, 20] = 255
    disk = corrupt(dot, "defocus_blur", 1)[0, 0]
    assert int((disk > 0).sum()) == 29  # grid points in a circle of radius 3
    steps = torch.arange(32).repeat(32, 1)[None, None].to(torch.uint8) * 4
    assert len(corrupt(steps, "pixelate", 2)[0, 0, 0].unique()) == 16
    picture = pictures(1)[0]
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "jpeg", quality=10)
    expected = np.asarray(Image.open(buffer)).astype(int)
    found = corrupt(picture[None], "jpeg", 4)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).mean() < 2
    for arguments, reason in (("fog", 1), "unknown corruption"), (("jpeg", 6), "must be 1 to 5"):
        with pytest.raises(DataError, match=reason):
            corrupt(flat, *arguments)


# -- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: two methods on one backbone, one on another."""
    base = tmp_path_factory.mktemp("robust")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 8)):
        for k, name in enumerate("abc"):
            (base / "data" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.normal((60 + 50 * k, 200 - 50 * k, 90), 60, (32, 32, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(base / "data" / part / name / f"{number}.png")
    for name, changes in (
        ("probe", {"method": refold.LinearProbe()}),
        ("lora", {"method": refold.LoRA(rank=2)}),
        ("other", {"method": refold.LoRA(rank=2), "model": "timm/test_vit2"}),
    ):
        settings: dict[str, Any] = {
            "data": base / "data", "output": base / name, "model": "timm/test_vit", "pretrained": False,
            "image_size": 32, "epochs": 2, "warmup_epochs": 0, "lr": 3e-3, "precision": "fp32", "batch_size": 12,
            "attention": "default", "fractions": (1.0, 0.0, 0.0),
        }  # fmt: skip
        train(TrainConfig.of(**settings | changes))
    return base


def probabilities(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    rows = evaluate(folder).rows
    scores = torch.tensor([[row[f"score {name}"] for name in "abc"] for row in rows])
    return scores, torch.tensor(["abc".index(row["target"]) for row in rows])


def test_accuracy_calibration_pairs_and_the_ensemble_are_those_of_the_runs(place: Path, tmp_path: Path) -> None:
    sources = [place / "probe", place / "lora"]
    result = examine(sources, corruptions=[], output=tmp_path / "out.json")
    (first, targets), (second, _) = map(probabilities, sources)
    assert [row.name for row in result.rows] == ["probe", "lora", "ensemble"]
    for row, scores in zip(result.rows, (first, second, (first + second) / 2), strict=True):
        hits = scores.argmax(1) == targets
        assert row.accuracy == pytest.approx(float(hits.float().mean()))
        confidence, error = scores.amax(1), 0.0
        for k in range(15):
            inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
            if inside.any():
                error += float((hits[inside].float().mean() - confidence[inside].mean()).abs() * inside.float().mean())
        assert row.calibration_error == pytest.approx(error, abs=1e-5)
        assert row.corrupted_mean is None
    (pair,) = result.pairs
    a, b = first.argmax(1) == targets, second.argmax(1) == targets
    assert pair.only_first == pytest.approx(float((a & ~b).float().mean()))
    assert pair.only_second == pytest.approx(float((b & ~a).float().mean()))
    assert pair.either == pytest.approx(float((a | b).float().mean()))
    assert json.loads((tmp_path / "out.json").read_text())["rows"][2]["name"] == "ensemble"


def test_corrupted_images_are_scored_as_such(place: Path, tmp_path: Path) -> None:
    """Against a folder of the same images corrupted by hand, at the size the model sees them."""
    for path in (place / "data" / "test").rglob("*.png"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
    paths = sorted((place / "data" / "test").rglob("*.png"), key=lambda p: (p.parent.name, p.name))
    for number, path in enumerate(paths):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
        changed = corrupt(pixels, "shot_noise", 4, first=number)[0].permute(1, 2, 0).numpy()
        Image.fromarray(changed).save(tmp_path / path.parent.name / path.name)
    expected = evaluate(place / "lora", tmp_path).metrics["accuracy"]
    (row,) = examine([place / "lora"], corruptions=["shot_noise", "jpeg"], severities=[4, 5]).rows
    assert row.corrupted["shot_noise"][0] == pytest.approx(expected)
    assert list(row.corrupted) == ["shot_noise", "jpeg"]
    assert row.corrupted_mean == pytest.approx(sum(sum(v) for v in row.corrupted.values()) / 4)


def test_adapters_that_do_not_go_together_are_refused(place: Path) -> None:
    for sources, reason in (
        ([place / "probe", place / "other"], "its backbone is not that of"),
        ([place / "probe", place / "probe"], "names one adapter twice"),
        ([], "there is none"),
    ):
        with pytest.raises(RefoldError, match=reason):
            examine(sources, corruptions=[])
    with pytest.raises(DataError, match="unknown corruption"):
        examine([place / "probe"], corruptions=["fog"])


def test_the_command(place: Path, tmp_path: Path) -> None:
    done = run(
        "robustness", str(place / "probe"), str(place / "lora"), "--corruptions", "jpeg", "--severities", "1,5",
        "-o", "found.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ensemble" in done.stdout
    assert "at least one" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["corrupted"].keys() == {"jpeg"}
