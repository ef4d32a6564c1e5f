"""Videos end to end: batches, training, several views, run folders, files and commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import refold
from clips import coloured, numbered, numbers, seeded, write_video
from commands import run
from refold.errors import DataError, StoreError
from refold.preprocessing import Preprocessing
from refold.training import TrainConfig, TrainResult, evaluate, predict, resolve, train
from refold.training.trainer import Paused
from refold.video import ClipLoader, Sampling, VideoSet, ViewLoader, Views, load_videos, open_video
from refold.video.problem import view_batches
from refold.video.transforms import crops_of

pytest.importorskip("av")
pytestmark = pytest.mark.timeout(120)
PLAIN = Preprocessing(size=(16, 16), mean=(0.0,) * 3, std=(1 / 255,) * 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of two colours, some of them short, and weights."""
    root = tmp_path_factory.mktemp("videos")
    for k in range(10):
        write_video(root / "data/red" / f"{k}.mp4", 3 + k, picture=coloured(255 - k), size=(32, 48))
        write_video(root / "data/blue" / f"{k}.webm", 4 + k, picture=coloured(k), size=(48, 32), codec="libvpx")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), root / "backbone.safetensors")
    return root


def learn(root: Path, output: Path, **changes: Any) -> TrainResult:
    return train(**(settings(root, output) | changes))


def settings(root: Path, output: Path) -> dict[str, Any]:
    return {
        "data": root / "data",
        "task": "video",
        "frames": 4,
        "model": "timm/test_vit",
        "weights": root / "backbone.safetensors",
        "method": refold.RepAdapter(rank=4),
        "output": output,
        "fractions": (12, 4, 4),
        "image_size": 32,
        "epochs": 4,
        "batch_size": 4,
        "lr": 5e-3,
        "attention": "default",
        "precision": "fp32",
        "augment": "crop+flip",
    }


@pytest.fixture(scope="module")
def colours(root: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return learn(root, tmp_path_factory.mktemp("run") / "a", clips=2, crops=3)


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> VideoSet:
    """Videos of 40 frames that say their numbers."""
    folder = tmp_path_factory.mktemp("counted")
    paths = [write_video(folder / f"{k}.mp4", 40, picture=numbered) for k in range(5)]
    return VideoSet(paths, torch.tensor([0, 1, 2, 3, 4]), list("abcde"))


def shown(clips: torch.Tensor) -> list[list[int]]:
    return [numbers(clip) for clip in clips]


def test_views_are_the_clips_and_crops_of_the_definition(counted: VideoSet) -> None:
    sampling = Sampling("dense", 4, 3)
    loader = ViewLoader(counted, Views(sampling, clips=3, crops=3), PLAIN, batch_size=2)
    batches = list(loader)
    assert [tuple(clips.shape) for clips, _ in batches] == [(18, 4, 3, 16, 16)] * 2 + [(9, 4, 3, 16, 16)]
    assert torch.cat([targets for _, targets in batches]).tolist() == [0, 1, 2, 3, 4]
    # 40 frames leave 28 places for a window of 12; three of them begin at 0, 14 and 28. Crops follow each other.
    wanted = [[start + 3 * k for k in range(4)] for start in (0, 14, 28) for _ in range(3)]
    assert shown(batches[0][0][:9]) == wanted
    with open_video(counted.paths[0]) as video:
        frames = video.read([14, 17, 20, 23])
    torch.testing.assert_close(batches[0][0][3:6], crops_of(frames, PLAIN, 3).float())


def test_clips_are_a_function_of_seed_epoch_and_video(counted: VideoSet) -> None:
    def batches(epoch: int = 0, seed: int = 0, workers: int = 0, batch_size: int = 2, **order: Any) -> dict[int, Any]:
        loader = ClipLoader(
            counted, Sampling("strided", 4, 2), PLAIN, augment="crop", batch_size=batch_size, shuffle=True, seed=seed,
            workers=workers, **order,
        )  # fmt: skip
        loader.set_epoch(epoch)
        return {t: clip for clips, targets in loader for clip, t in zip(clips, targets.tolist(), strict=True)}

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = batches()
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(first) == [0, 1, 2, 3, 4]
    for other in (batches(), batches(workers=1), batches(batch_size=5)):
        assert all(torch.equal(first[video], other[video]) for video in first)
    halves = batches(rank=0, world=2, batch_size=2) | batches(rank=1, world=2, batch_size=2)
    assert all(torch.equal(first[video], halves[video]) for video in first)
    for other in (batches(epoch=1), batches(seed=1)):
        assert not any(torch.equal(first[video], other[video]) for video in first)
    for clip in first.values():
        assert np.diff(numbers(clip)).tolist() == [2, 2, 2]
    assert len({numbers(clip)[0] for clip in first.values()}) > 1


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_see_every_video_once(counted: VideoSet, world: int) -> None:
    seen = []
    for rank in range(world):
        process: Any = SimpleNamespace(process_index=rank, num_processes=world)
        batches = view_batches(counted, Views(Sampling("uniform", 2), crops=3), PLAIN, process, batch_size=6)
        targets = [target for _, part in batches for target in part.tolist()]
        assert targets == list(range(rank, 5, world))  # as compute_logits puts them together
        seen += targets
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_broken_video_is_named_from_any_process(tmp_path: Path) -> None:
    path = tmp_path / "broken.mp4"
    path.write_text("none")
    for workers in (0, 1):
        loader = ViewLoader(
            VideoSet([path], torch.tensor([0])), Views(Sampling()), PLAIN, batch_size=1, workers=workers
        )
        with pytest.raises(DataError, match=r"broken\.mp4"):
            list(loader)


# -- training -----------------------------------------------------------------------------------------------------


def test_colours_are_learned_and_the_folder_is_whole(colours: TrainResult) -> None:
    assert colours.metrics["test"]["accuracy"] == 1.0
    assert colours.metrics["test"]["loss"] < 0.1
    assert colours.summary["images"] == {"train": 12, "val": 4, "test": 4}
    assert (colours.summary["task"], colours.summary["frames"]) == ("video", 4)
    with (colours.output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["path"].rpartition("/")[0].rpartition("/")[2] for row in rows} == {"red", "blue"}
    assert all(row["target"] == row["prediction"] == Path(row["path"]).parent.name for row in rows)
    with np.load(colours.output / "thumbnails" / "thumbnails.npz") as archive:
        assert archive["images"].shape == (4, 192, 192, 3)


def test_scores_are_the_mean_over_the_views(colours: TrainResult, root: Path) -> None:
    ready = resolve(colours.model)
    test_set = load_videos(root / "data", fractions=(12, 4, 4)).test
    assert test_set is not None
    classes = ready.classes or []
    rows = {row["path"]: [row[f"score {name}"] for name in classes] for row in colours.evaluations["test"].rows}
    assert list(rows) == test_set.paths
    mean, std = (torch.tensor(v)[:, None, None] for v in (ready.preprocessing.mean, ready.preprocessing.std))
    for path, found in rows.items():
        with open_video(path) as video:
            count = len(video)
            every = video.read(range(count))
        probabilities = []
        for clip in (0, 1):
            frames = every[[int(count * (k + (clip + 0.5) / 2) / 4) for k in range(4)]]
            for crop in crops_of(frames, ready.preprocessing, 3):
                with torch.no_grad():
                    probabilities.append(ready.model(((crop / 255 - mean) / std)[None]).softmax(1)[0])
        torch.testing.assert_close(torch.tensor(found), torch.stack(probabilities).mean(0), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(colours: TrainResult, root: Path, tmp_path: Path) -> None:
    with pytest.raises(Paused):
        learn(root, tmp_path / "b", clips=2, crops=3, until=2)
    resumed = learn(root, tmp_path / "b", clips=2, crops=3, resume=True, workers=1)
    one, two = (load_file(result.adapter) for result in (colours, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert resumed.metrics == colours.metrics


def test_motion_is_learned(tmp_path: Path, root: Path) -> None:
    """Getting brighter or darker: the frames are the same, their order is not, which the mean of them cannot tell."""
    generator = np.random.default_rng(0)
    for k in range(12):
        first = int(generator.integers(0, 10))
        for name, order in (("brighter", range(first, first + 24)), ("darker", range(first + 23, first - 1, -1))):
            levels = list(order)
            write_video(
                tmp_path / name / f"{k}.mp4", 24, picture=lambda n, size, levels=levels: numbered(levels[n], size)
            )
    result = learn(
        root, tmp_path / "run", data=tmp_path, method=refold.STAdapter(hidden=16, frames=4), augment="none", epochs=15,
        fractions=(16, 8, 0), lr=1e-2,
    )  # fmt: skip
    assert result.metrics["val"]["accuracy"] == 1.0


# -- using a trained model ----------------------------------------------------------------------------------------


def test_evaluate_and_predict_agree_with_the_run(colours: TrainResult, root: Path) -> None:
    expected = colours.evaluations["test"]
    again = evaluate(colours.output, workers=1)
    assert again.metrics == pytest.approx(expected.metrics)
    rows = predict(colours.output, [row["path"] for row in expected.rows])
    for row, other in zip(rows, expected.rows, strict=True):
        assert row == pytest.approx({key: value for key, value in other.items() if key != "target"})
    one = evaluate(colours.model, root / "data", clips=1, crops=1)  # all of it: that data has no splits
    assert len(one.rows) == 20
    assert one.metrics["loss"] != expected.metrics["loss"]


def test_scoring_shows_how_far_it_is(colours: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(colours.output, progress=True)
    err = capsys.readouterr().err
    assert "videos" in err
    assert "4/4" in err


def test_a_file_says_how_videos_are_seen(colours: TrainResult, root: Path, tmp_path: Path) -> None:
    clip = torch.randn(2, 4, 3, 32, 32, generator=seeded(0))
    model = refold.from_pretrained(colours.adapter, weights=root / "backbone.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(clip), colours.model(clip))
        merged = refold.merge(model)
        torch.testing.assert_close(model(clip), colours.model(clip), rtol=1e-4, atol=1e-5)
    assert merged.folded
    tensors = load_file(colours.adapter)
    from safetensors import safe_open

    with safe_open(colours.adapter, framework="pt") as file:
        header = json.loads(file.metadata()["refold"])
    header["extra"]["views"]["sampling"]["frames"] = 10**9
    save_file(tensors, tmp_path / "huge.safetensors", metadata={"refold": json.dumps(header)})
    with pytest.raises(StoreError, match="4096"):
        refold.from_pretrained(tmp_path / "huge.safetensors", weights=root / "backbone.safetensors")


def test_bad_videos_of_a_run_are_listed(root: Path, tmp_path: Path, colours: TrainResult) -> None:
    (tmp_path / "x.mp4").write_text("none")
    good = next(str(path) for path in (root / "data/red").iterdir())
    with pytest.raises(DataError, match=r"x\.mp4"):
        predict(colours.model, [good, tmp_path / "x.mp4"])
    rows = predict(colours.model, [good, tmp_path / "x.mp4"], skip_bad_images=True)
    assert [row["prediction"] for row in rows] == ["red"]
    assert [path for path, _ in rows.skipped] == [str(tmp_path / "x.mp4")]


# -- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"target": "label"}, "target"),
        ({"cache": "memory"}, "cache"),
        ({"in_chans": 3}, "in_chans"),
        ({"crop": "center"}, "crop"),
        ({"decoder": "fpn"}, "decoder"),
        ({"features": "memory"}, "features"),
        ({"crops": 2}, "crops"),
        ({"clips": 0}, "clips"),
        ({"sampling": "sparse"}, "sampling"),
        ({"augment": "flip"}, "augment"),
        ({"method": refold.STAdapter(frames=8)}, "method"),
        ({"task": None, "frames": 4}, "frames"),
        ({"task": "segment", "frames": None, "clips": 2}, "clips"),
    ],
)
def test_settings_that_are_refused(root: Path, tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(DataError, match=f"^{where}: "):
        learn(root, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_defaults_of_videos(root: Path, tmp_path: Path) -> None:
    given = settings(root, tmp_path)
    del given["batch_size"]
    config = TrainConfig(**given)
    assert (config.batch_size, config.drop_path) == (16, 0.0)
    assert config.replace(task=None, frames=None, drop_path=None).drop_path == 0.1
    assert TrainConfig.from_json(config.to_json()) == config


def test_flips_where_direction_is_a_label(tmp_path: Path, root: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"Up": "0", "Down": "1"}))
    entries = [{"id": str(k), "template": ("Up", "Down")[k % 2]} for k in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    for k in range(4):
        (tmp_path / f"{k}.webm").touch()
    with pytest.raises(DataError, match=r"^augment: .*'crop'"):
        learn(root, tmp_path / "run", data=tmp_path, fractions=(1.0, 0.0, 0.0))


# -- commands -----------------------------------------------------------------------------------------------------


def test_commands(root: Path, tmp_path: Path) -> None:
    done = run(
        *("train", root / "data", "--task", "video", "--frames", "4", "--sampling", "strided", "--stride", "2"),
        *("--model", "timm/test_vit", "--random-weights", "--image-size", "32", "--epochs", "1", "--batch-size", "4"),
        *("--method", "RepAdapter(rank=4)", "--clips", "2", "--crops", "3", "-o", "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Exactness certificate: holds" in done.stdout
    assert (tmp_path / "run/report.html").is_file()
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert [config[name] for name in ("frames", "sampling", "stride", "clips", "crops")] == [4, "strided", 2, 2, 3]
    done = run("evaluate", "run", "--split", "val", "--clips", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ccuracy" in done.stdout
    done = run("predict", "run", root / "data/red", "--output", "out.csv", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 11
    done = run("predict", "run", root / "data/red", "--crops", "2", cwd=tmp_path)
    assert done.returncode != 0
    assert "crops: must be one of 1, 3" in done.stderr
