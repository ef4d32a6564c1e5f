"""Whole runs on a tiny model and forty small images: folder, best epoch, determinism, stopping and going on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import refold
from refold.errors import DataError, RefoldError
from refold.training import TrainConfig, TrainResult, evaluate, train

STEPS = 3  # of an epoch: 24 training images, 8 a step


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty noisy images, the classes overlapping in brightness so that no epoch gets all of them right."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, brightness in (("dark", 115), ("light", 140)):
        (root / name).mkdir()
        for i in range(20):
            level = noise.normal(brightness, 15)
            pixels = noise.normal(level, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def settings(images: Path, output: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        data=str(images),
        model="timm/test_vit",
        pretrained=False,
        method=refold.RepAdapter(rank=4),
        output=str(output),
        fractions=(24, 8, 8),
        image_size=32,
        epochs=3,
        batch_size=8,
        lr=3e-3,
        augment="flip",
        attention="default",
    )
    return base.replace(**changes)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The uninterrupted run that others are compared with."""
    return train(settings(images, tmp_path_factory.mktemp("runs") / "whole"))


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_result(folder: Path, whole: TrainResult) -> None:
    ours, theirs = load_file(folder / "adapter.safetensors"), load_file(whole.adapter)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert lines(folder) == lines(whole.output)
    assert (folder / "predictions.csv").read_text() == (whole.output / "predictions.csv").read_text()
    for name in ("metrics", "best_epoch", "confusion"):
        assert json.loads((folder / "summary.json").read_text())[name] == whole.summary[name]


# -- what a run leaves -----------------------------------------------------------------------------------------


def test_the_folder_tells_the_whole_run(whole: TrainResult, images: Path) -> None:
    folder = whole.output
    assert {path.name for path in folder.iterdir()} == {
        "adapter.safetensors",
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
        "predictions.csv",
        "summary.json",
        "tensorboard",
        "thumbnails",
    }
    assert TrainConfig.load(folder) == settings(images, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["environment"]["torch"] == torch.__version__
    assert config["command"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == whole.summary
    assert summary["images"] == {"train": 24, "val": 8, "test": 8}
    assert summary["file_bytes"] == whole.adapter.stat().st_size
    assert summary["trainable_parameters"] == sum(p.numel() for p in refold.trainable_parameters(whole.model).values())
    assert summary["parameters"] == sum(p.numel() for p in whole.model.parameters())
    assert sum(map(sum, summary["confusion"])) == 8
    assert summary["peak_memory"] > 2**20


def test_the_log_has_each_epoch_once_and_never_the_test_split(whole: TrainResult) -> None:
    rows = lines(whole.output)
    assert [(r["epoch"], r["step"], r["split"]) for r in rows] == [
        (epoch, epoch * STEPS, split) for epoch in (1, 2, 3) for split in ("train", "val")
    ]
    assert rows == [{k: v for k, v in row.items() if k != "seconds"} for row in whole.fit.history]
    assert rows[-2]["loss"] < rows[0]["loss"]


def test_the_events_hold_the_same_numbers(whole: TrainResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole.output / "tensorboard"))
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("val/accuracy")]
    assert scalars == [(r["step"], pytest.approx(r["accuracy"])) for r in whole.fit.history if r["split"] == "val"]


def test_the_best_epoch_is_the_validation_sets(whole: TrainResult) -> None:
    rows = [r for r in whole.fit.history if r["split"] == "val"]
    best = max(rows, key=lambda r: (r["accuracy"], -r["loss"]))
    assert whole.fit.best_epoch == best["epoch"]
    assert whole.fit.metrics["loss"] == best["loss"]


def test_predictions_and_thumbnails_are_those_of_the_test_split(whole: TrainResult) -> None:
    with (whole.output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    right = [row["target"] == row["prediction"] for row in rows]
    assert sum(right) / 8 == whole.metrics["test"]["accuracy"]
    for row in rows:
        assert Path(row["path"]).parent.name == row["target"]
        scores = {name: float(row[f"score {name}"]) for name in ("dark", "light")}
        assert sum(scores.values()) == pytest.approx(1)
        assert max(scores, key=scores.__getitem__) == row["prediction"]
    shown = json.loads((whole.output / "thumbnails" / "thumbnails.json").read_text())
    with np.load(whole.output / "thumbnails" / "thumbnails.npz") as archive:
        pixels = archive["images"]
    assert pixels.shape == (8, 112, 112, 3)
    assert [row["index"] for row in shown] == list(range(8))
    assert [row["correct"] for row in shown] == sorted(right)  # mistakes first
    first = np.asarray(Image.open(shown[0]["path"]).resize((112, 112), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels[0], first)


def test_the_file_alone_gives_the_same_numbers(whole: TrainResult) -> None:
    again = evaluate(whole.output)
    assert again.metrics == whole.metrics["test"]
    assert again.rows == whole.evaluations["test"].rows


def test_a_library_call_is_quiet(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = settings(images, tmp_path / "run", epochs=1)
    seen: list[dict[str, Any]] = []
    train(config, on_epoch=seen.append)
    assert capfd.readouterr() == ("", "")
    assert [row["split"] for row in seen] == ["train", "val"]
    train(config.replace(output=str(tmp_path / "loud")), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training" in err
    assert "3/3" in err


# -- the same seed, the same bits --------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_whatever_happened_before(
    whole: TrainResult, images: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    train(settings(images, tmp_path / "again"))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_result(tmp_path / "again", whole)
    other = train(settings(images, tmp_path / "other", seed=1))
    assert lines(other.output) != lines(whole.output)


KILLED = """
import os, signal, sys
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from refold.training import TrainConfig, train

torch.set_num_threads(1)
left = int(sys.argv[2])

def count(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_post_hook(count)
train(TrainConfig.load(sys.argv[1]).replace(output=sys.argv[3]))
"""


def test_a_run_killed_within_an_epoch_goes_on_to_the_same_bits(
    whole: TrainResult, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(whole.output), str(STEPS + 2), str(output)]
    killed = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (output / "adapter.safetensors").exists()
    assert lines(output) == lines(whole.output)[:2]
    seen: list[dict[str, Any]] = []
    train(settings(images, output), resume=True, on_epoch=seen.append)
    assert [row["epoch"] for row in seen if row["split"] == "train"] == [2, 3]
    assert_same_result(output, whole)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_interrupted_run_says_how_to_go_on_and_does(
    split: str, whole: TrainResult, images: Path, tmp_path: Path
) -> None:
    """Stopped after epoch 2 was logged and before it was saved, it trains epoch 2 again and logs it once."""

    def stop(row: dict[str, Any]) -> None:
        if (row["epoch"], row["split"]) == (2, split):
            raise KeyboardInterrupt

    config = settings(images, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt) as caught:
        train(config, on_epoch=stop)
    (note,) = caught.value.__notes__
    assert "after 1 of 3 epochs" in note
    assert "--resume" in note
    assert str(tmp_path / "run" / "checkpoint.pt") in note
    train(config, resume=True)
    assert_same_result(tmp_path / "run", whole)


def test_a_run_interrupted_in_its_first_epoch_says_so(images: Path, tmp_path: Path) -> None:
    def stop(row: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        train(settings(images, tmp_path / "run"), on_epoch=stop)
    assert caught.value.__notes__[0].startswith("Stopped before the first checkpoint")


def test_resuming_before_the_first_checkpoint_starts_anew_and_after_the_last_only_scores(
    whole: TrainResult, images: Path, tmp_path: Path
) -> None:
    config = settings(images, tmp_path / "run")
    train(config, resume=True)
    assert_same_result(tmp_path / "run", whole)
    (tmp_path / "run" / "adapter.safetensors").unlink()
    seen: list[dict[str, Any]] = []
    train(config, resume=True, on_epoch=seen.append)
    assert seen == []
    assert_same_result(tmp_path / "run", whole)


def test_another_setting_cannot_be_resumed(whole: TrainResult, images: Path) -> None:
    before = {path: path.read_bytes() for path in whole.output.rglob("*") if path.is_file()}
    for changes in ({"lr": 1e-3}, {"epochs": 4}, {"method": refold.LoRA()}, {"fractions": (30, 5, 5)}):
        (name,) = changes
        with pytest.raises(DataError) as caught:
            train(settings(images, whole.output, **changes), resume=True)
        assert caught.value.where == name
    with pytest.raises(DataError, match="not empty"):
        train(settings(images, whole.output))
    assert {path: path.read_bytes() for path in whole.output.rglob("*") if path.is_file()} == before


def test_other_images_cannot_be_resumed(images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "images"
    for name in ("dark", "light"):
        (copy / name).mkdir(parents=True)
        for path in (images / name).iterdir():
            (copy / name / path.name).write_bytes(path.read_bytes())
    config = settings(copy, tmp_path / "run", epochs=1, fractions=(0.6, 0.2, 0.2))
    train(config)
    (copy / "dark" / "00.png").unlink()
    (copy / "light" / "00.png").unlink()
    with pytest.raises(DataError, match=r"training images: the run began with 24 and cannot be resumed with 23"):
        train(config, resume=True)


# -- what can go wrong -------------------------------------------------------------------------------------------


def test_divergence_names_step_and_rate_and_keeps_the_checkpoint(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step of epoch 2 on, the loss is not a number."""
    from refold.training.tasks import Classification

    plain, calls = Classification.training_loss, []

    def poisoned(self: Classification, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return plain(self, logits, targets) * (float("nan") if len(calls) > STEPS + 1 else 1.0)

    monkeypatch.setattr(Classification, "training_loss", poisoned)
    with pytest.raises(RefoldError, match=r"the loss is nan at step 5 \(epoch 2, learning rate 0\.00\d+\)") as caught:
        train(settings(images, tmp_path / "run"))
    assert caught.value.remedy is not None
    assert "clip_grad" in caught.value.remedy
    monkeypatch.undo()
    train(settings(images, tmp_path / "run"), resume=True)
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_start_that_fails_before_training_can_be_repeated(images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run", epochs=1)
    with pytest.raises(DataError, match="select"):
        train(config.replace(select="speed"))
    with pytest.raises(DataError, match="no such file"):
        train(config.replace(data=str(tmp_path / "nowhere")))
    train(config)


def test_misspelt_and_missing_settings(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="learning_rate"):
        train(settings(images, tmp_path), learning_rate=1.0)
    with pytest.raises(DataError, match="method: is missing"):
        train(data=str(images), model="timm/test_vit", output=str(tmp_path))


def test_another_accelerator_with_mixed_precision_is_in_the_way(images: Path, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16")
        with pytest.raises(RefoldError, match="accelerate cannot start"):
            train(settings(images, tmp_path / "run"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_keywords_and_config_say_the_same(whole: TrainResult, images: Path, tmp_path: Path) -> None:
    config = settings(images, tmp_path / "run")
    values = {name: getattr(config, name) for name in config.to_json()}
    refold.train(**values)
    assert_same_result(tmp_path / "run", whole)
