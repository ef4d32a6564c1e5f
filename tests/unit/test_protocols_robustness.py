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
from scipy import ndimage

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
    for severity in (3, 4, 5) if name == "elastic_transform" else (1, 3, 5):  # 1 and 2 are another distortion
        found = corrupt(images, name, severity)
        assert found.dtype == torch.uint8
        assert found.shape == images.shape
        distances.append(float((found.float() - images.float()).square().mean()))
        alone = corrupt(images[1:], name, severity, first=1)
        assert torch.equal(alone[0], found[1])
    assert min(distances) > 0
    if name != "fog":  # which may happen to be as bright as the picture; its own test is below
        assert distances == sorted(set(distances))


def test_corruptions_are_what_they_are_called() -> None:
    flat = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    noise = corrupt(flat, "gaussian_noise", 1).float() / 255 - 128 / 255
    assert float(noise.std()) == pytest.approx(0.08, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.003)
    shot = corrupt(flat, "shot_noise", 1).float() / 255
    assert float(shot.var()) == pytest.approx(128 / 255 / 60, rel=0.05)
    salt = corrupt(flat, "impulse_noise", 5)
    assert float(((salt == 0) | (salt == 255)).float().mean()) == pytest.approx(0.27, rel=0.05)
    still = ("blur", "contrast", "pixelate", "elastic_transform")
    for name in (name for name in CORRUPTIONS if name.endswith(still)):
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
    found = corrupt(picture[None], "jpeg_compression", 4)[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - expected).mean() < 2


def ramp(side: int = 200) -> torch.Tensor:
    """One level more at each column: what moves along columns shows by how much."""
    return torch.arange(20, 20 + side).repeat(side, 1)[None, None].to(torch.uint8)


def test_glass_takes_pixels_from_near_by() -> None:
    moved = (corrupt(ramp(), "glass_blur", 4).int() - ramp().int())[..., 12:-12]
    assert moved.min() >= -6  # twice, up to three columns back
    assert moved.max() <= 4  # or two ahead
    assert float(moved.double().mean()) == pytest.approx(-1, abs=0.05)
    assert float(moved.double().std()) == pytest.approx((35 / 6) ** 0.5 / (2 * np.pi**0.5 * 1.1), rel=0.2)  # blurred


def test_motion_smears_half_a_gaussian_to_one_side() -> None:
    dot = torch.zeros(1, 1, 101, 101, dtype=torch.uint8)
    dot[..., 50, 50] = 255
    steps = np.arange(21.0)
    weights = np.exp(-(steps**2) / 18) / np.exp(-(steps**2) / 18).sum()
    for seed in range(5):
        smeared = corrupt(dot, "motion_blur", 1, seed=seed)[0, 0].double() / 255
        assert float(smeared.sum()) == pytest.approx(1, abs=0.03)
        assert float(smeared[50, 50]) == pytest.approx(weights[0], abs=0.01)
        rows, columns = (smeared > 0).nonzero().double().T - 50
        assert bool((columns <= 0).all())
        assert bool((rows.abs() <= columns.abs()).all())  # no steeper than 45 degrees
        away = (torch.maximum(rows.abs(), columns.abs()) * smeared[smeared > 0]).sum()
        assert weights @ steps / 2**0.5 - 0.2 < float(away) < weights @ steps + 0.2


@pytest.mark.parametrize(("severity", "looks", "step"), [(1, 12, 0.01), (3, 11, 0.02), (5, 11, 0.03)])
def test_zoom_is_the_mean_of_looks_closer(severity: int, looks: int, step: float) -> None:
    picture = pictures(1, channels=1)
    x = picture[0, 0].numpy() / 255
    shown = [x]
    for k in range(looks):
        factor = 1 + k * step
        part = int(np.ceil(96 / factor))
        top = (96 - part) // 2
        large = ndimage.zoom(x[top : top + part, top : top + part], factor, order=1)
        edge = (len(large) - 96) // 2
        shown.append(large[edge : edge + 96, edge : edge + 96])
    expected = np.stack(shown).mean(0) * 255
    assert np.abs(corrupt(picture, "zoom_blur", severity)[0, 0].numpy() - expected).max() < 0.6


def test_snow_falls_on_what_is_behind_it() -> None:
    black = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    found = corrupt(black, "snow", 2)[0]
    assert torch.equal(found[0], found[1])  # without colour
    assert torch.equal(found, found.rot90(2, (1, 2)))  # flakes and the same flakes turned
    assert int(found.min()) == round(255 * 0.3 * 0.5)  # what is not clear is paler
    assert len(found.unique()) > 30


@pytest.mark.parametrize(("severity", "thickness"), list(enumerate((1.5, 2, 2.5, 2.5, 3), start=1)))
def test_fog_is_one_cloud_before_any_picture(severity: int, thickness: float) -> None:
    bits = torch.randint(0, 2, (2, 3, 50, 70), generator=torch.Generator().manual_seed(0))
    first, second = (corrupt(one[None] * 255, "fog", severity)[0].int() for one in bits.to(torch.uint8))
    assert torch.allclose((first - second).float(), (bits[0] - bits[1]) * 255 / (1 + thickness), atol=1.1)
    cloud = first[0][bits[0, 0] == 0]  # thickness times 0 to 1, over what the brightest can be
    assert cloud.min() < 40
    assert cloud.max() > 0.8 * 255 * thickness / (1 + thickness)


def test_elastic_ripples_are_as_strong_as_said() -> None:
    """Uniform noise of deviation 1/sqrt(3), smoothed in two directions, times the strength, beside an affine map."""
    moved = (corrupt(ramp(), "elastic_transform", 5)[0, 0].double() - ramp()[0, 0])[20:-20, 20:-20]
    where = torch.stack(torch.meshgrid(*map(torch.arange, moved.shape), indexing="ij"), -1).reshape(-1, 2).double()
    affine = torch.cat([where, torch.ones(len(where), 1).double()], 1)
    ripples = moved.flatten() - affine @ torch.linalg.lstsq(affine, moved.flatten()[:, None]).solution[:, 0]
    side = 200 * 244 / 224
    expected = 0.12 * side / 3**0.5 / (2 * np.pi**0.5 * 0.01 * side)
    assert float(ripples.std()) == pytest.approx(expected, rel=0.1)


def test_what_is_not_a_corruption_is_refused() -> None:
    flat = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    for arguments, reason in (("frost", 1), "unknown corruption"), (("fog", 6), "must be 1 to 5"):
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
    (row,) = examine([place / "lora"], corruptions=["shot_noise", "jpeg_compression"], severities=[4, 5]).rows
    assert row.corrupted["shot_noise"][0] == pytest.approx(expected)
    assert list(row.corrupted) == ["shot_noise", "jpeg_compression"]
    assert row.corrupted_mean == pytest.approx(sum(sum(v) for v in row.corrupted.values()) / 4)


def test_it_shows_how_far_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examine([place / "probe", place / "lora"], corruptions=["contrast"], severities=[1], progress=True)
    assert "48/48" in capsys.readouterr().err  # 24 images, clean and with one severity of one corruption


def test_adapters_that_do_not_go_together_are_refused(place: Path) -> None:
    for sources, reason in (
        ([place / "probe", place / "other"], "its backbone is not that of"),
        ([place / "probe", place / "probe"], "names one adapter twice"),
        ([], "there is none"),
    ):
        with pytest.raises(RefoldError, match=reason):
            examine(sources, corruptions=[])
    with pytest.raises(DataError, match="unknown corruption"):
        examine([place / "probe"], corruptions=["frost"])


def test_the_command(place: Path, tmp_path: Path) -> None:
    done = run(
        "robustness", str(place / "probe"), str(place / "lora"), "--corruptions", "zoom_blur", "--severities", "1,5",
        "-o", "found.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ensemble" in done.stdout
    assert any(line.split()[:2] == ["zoom", "blur"] for line in done.stdout.splitlines())
    assert "at least one" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["rows"][0]["corrupted"].keys() == {"zoom_blur"}
