"""Sweeps without Ray: what is chosen, what a restart does, and the command line of the best."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dense_runs
import refold
from commands import run
from refold.cli.sweep import command_line
from refold.dense.shapes import shapes
from refold.errors import DataError, RefoldError
from refold.sweeps import RayEngine, SweepResult, run_sweep
from refold.sweeps.halving import halve, rungs
from refold.sweeps.run import make_trials
from refold.sweeps.trials import survey
from refold.training import TrainConfig, train
from sweep_runs import dark_and_bright, settings

GRID = ["lr=1e-4,1e-2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dark_and_bright(tmp_path_factory.mktemp("sweep") / "photos", 16)


def summary(folder: str | Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "summary.json").read_text())


def stamps(output: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in output.glob("trials/*/summary.json")}


# -- successive halving ---------------------------------------------------------------------------------------------


def test_rungs_are_powers_of_the_reduction_below_the_last_epoch() -> None:
    assert rungs(81, 1, 3) == [1, 3, 9, 27]
    assert rungs(82, 1, 3) == [1, 3, 9, 27, 81]
    assert rungs(100, 2, 4) == [2, 8, 32]
    assert rungs(2, 1, 3) == [1]


def test_halving_promotes_the_best_third_of_each_rung() -> None:
    """Nine trials: the last three lead after one epoch, "g" after three, and what came later is not asked."""
    scores = {1: dict(zip("abcdefghi", range(9), strict=True)), 3: {"g": 2, "h": 0, "i": 1}, 9: {"g": -5}}
    calls: list[tuple[str, int]] = []

    def score(trial: str, epochs: int) -> float:
        calls.append((trial, epochs))
        return scores[epochs][trial]

    assert halve("abcdefghi", score, epochs=9, grace=1, reduction=3) == ["g"]
    assert calls == [*((trial, 1) for trial in "abcdefghi"), *((trial, 3) for trial in "ihg"), ("g", 9)]


def test_halving_keeps_one_of_few_takes_the_earlier_of_equals_and_drops_failures() -> None:
    assert halve("ab", lambda trial, epochs: 1.0, epochs=10, grace=1, reduction=3) == ["a"]
    assert halve("abcd", lambda trial, epochs: None if trial == "a" else 0, epochs=4, grace=2, reduction=2) == [
        "b",
        "c",
    ]
    assert halve("ab", lambda trial, epochs: None, epochs=4, grace=1, reduction=2) == []


# -- grids ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return run_sweep(settings(photos, tmp_path_factory.mktemp("grid")), GRID, seeds=[0, 1])


def test_every_trial_is_the_run_that_train_makes(swept: SweepResult, photos: Path, tmp_path: Path) -> None:
    row = swept.rows[3]
    assert (row.trial.values, row.trial.config.seed) == ({"lr": 1e-2}, 1)
    alone = train(settings(photos, tmp_path / "alone", lr=1e-2, seed=1, evaluate_test=False))
    assert alone.metrics["val"] == summary(row.trial.config.output)["metrics"]["val"]
    assert row.value == alone.metrics["val"]["loss"]
    assert "test" not in alone.metrics


def test_the_best_has_the_least_mean_loss(swept: SweepResult) -> None:
    losses = {
        lr: [
            summary(row.trial.config.output)["metrics"]["val"]["loss"]
            for row in swept.rows
            if row.trial.values["lr"] == lr
        ]
        for lr in (1e-4, 1e-2)
    }
    least = min(losses, key=lambda lr: sum(losses[lr]))
    assert swept.best.values == {"lr": least}
    assert swept.best.config.seed == 0
    assert [list(one.values) for one in swept.ranking] == sorted(losses.values(), key=sum)
    root = Path(swept.best.config.output).parents[1]
    written = json.loads((root / "results.json").read_text())
    assert written["best"] == swept.best.name
    assert [row["value"] for row in written["trials"]] == [row.value for row in swept.rows]


def test_results_are_a_parquet_table(swept: SweepResult) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert swept.parquet is not None
    rows = parquet.read_table(swept.parquet).to_pylist()
    assert [(row["setting lr"], row["seed"], row["value"]) for row in rows] == [
        (row.trial.values["lr"], row.trial.config.seed, row.value) for row in swept.rows
    ]


def test_again_nothing_is_trained_and_other_settings_or_data_are_refused(
    swept: SweepResult, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(swept.best.config.output).parents[1]
    monkeypatch.setattr("refold.sweeps.trials.train", _never)
    config = settings(photos, root)
    again = run_sweep(config, GRID, seeds=[0, 1])
    assert again == swept
    with pytest.raises(DataError, match="epochs: the run began with 2"):
        run_sweep(config.replace(epochs=3), GRID, seeds=[0, 1])
    extra = photos / "dark" / "more.png"
    try:
        Image.new("RGB", (16, 16)).save(extra)
        with pytest.raises(DataError, match="began with other images or labels"):
            run_sweep(config, GRID, seeds=[0, 1])
    finally:
        extra.unlink()


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is left to be trained")


def test_a_stopped_sweep_goes_on_in_the_middle_of_a_trial(swept: SweepResult, photos: Path, tmp_path: Path) -> None:
    """Stopped after the first epoch of the third trial: two are finished, and that epoch is not trained again."""

    def stop(row: Any) -> None:
        if row.trial.name == swept.rows[2].trial.name and row.epochs == 2:
            raise KeyboardInterrupt

    config = settings(photos, tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_sweep(config, GRID, seeds=[0, 1], on_row=stop)
    assert caught.value.__notes__ == [f"Stopped. The same call, or command, goes on with what is in {tmp_path}"]
    before = stamps(tmp_path)
    assert len(before) == 2
    seen: list[Any] = []
    result = run_sweep(config, GRID, seeds=[0, 1], on_row=seen.append)
    assert {path: stamps(tmp_path)[path] for path in before} == before
    assert [row.value for row in result.rows] == [row.value for row in swept.rows]
    assert [(row.trial.name, row.epochs) for row in seen if row.status == "running"] == [
        (swept.rows[2].trial.name, 2), (swept.rows[3].trial.name, 1), (swept.rows[3].trial.name, 2)
    ]  # fmt: skip


def test_a_trial_that_diverges_is_out_and_named(photos: Path, tmp_path: Path) -> None:
    result = run_sweep(settings(photos, tmp_path, epochs=1), ["lr=1e30,1e-3"])
    assert [row.status for row in result.rows] == ["failed", "finished"]
    assert "the loss is" in result.rows[0].reason
    assert [one.name for one in result.ranking] == ["RepAdapter(rank=2), lr 0.001"]
    with pytest.raises(RefoldError, match="no trial was finished: the loss is"):
        run_sweep(settings(photos, tmp_path / "none", epochs=1), ["lr=1e30"])


# -- successive halving of runs -------------------------------------------------------------------------------------


def test_asha_pauses_runs_without_changing_them_and_decides_the_same_after_a_stop(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, grid = settings(photos, tmp_path / "whole", epochs=4), ["lr=1e-8,1e-2,1e-7"]
    result = run_sweep(config, grid, search="asha", reduction=3)
    assert [(row.status, row.epochs) for row in result.rows] == [("stopped", 1), ("finished", 4), ("stopped", 1)]
    alone = train(settings(photos, tmp_path / "alone", epochs=4, lr=1e-2, evaluate_test=False))
    assert alone.summary["metrics"] == summary(result.best.config.output)["metrics"]
    first, second = (
        (Path(folder) / "metrics.jsonl").read_text() for folder in (alone.output, result.best.config.output)
    )

    def without_times(text: str) -> list[dict[str, Any]]:
        return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]

    assert without_times(first) == without_times(second)
    monkeypatch.setattr("refold.sweeps.trials.train", _never)
    assert run_sweep(config, grid, search="asha", reduction=3) == result


# -- dense tasks ----------------------------------------------------------------------------------------------------


def test_dense_tasks_are_compared_by_their_own_metrics(tmp_path: Path) -> None:
    data = shapes(tmp_path / "data", counts=(4, 2, 2), side=64).root
    result = run_sweep(dense_runs.settings(data, tmp_path / "swept", epochs=1), ["lr=1e-9,1e-1"])
    assert result.metric == "miou"
    values = [summary(row.trial.config.output)["metrics"]["val"]["miou"] for row in result.rows]
    assert [row.value for row in result.rows] == values
    assert values[0] != values[1]
    assert result.best.values == {"lr": [1e-9, 1e-1][values.index(max(values))]}


def test_other_boxes_are_other_data(tmp_path: Path) -> None:
    folder = shapes(tmp_path / "data", counts=(4, 2, 2), side=64).root
    config = dense_runs.settings(folder, tmp_path, task="detect", decoder="fcos")
    metric, before = survey(config)
    assert (metric, list(before)) == ("ap", ["train", "val", "test"])
    assert survey(config) == (metric, before)
    (file,) = [path for path in folder.rglob("*.json") if "val" in path.name or "val" in path.parent.name]
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][2] -= 1
    file.write_text(json.dumps(content))
    after = survey(config)[1]
    assert [name for name in before if before[name] != after[name]] == ["val"]


# -- random ---------------------------------------------------------------------------------------------------------


def test_more_samples_are_the_same_and_others(photos: Path, tmp_path: Path) -> None:
    config, method = settings(photos, tmp_path), [refold.RepAdapter()]
    grid = ["lr=1e-4,1e-3,1e-2", "scale=0.1,1,5"]
    names = {n: [t.name for t in make_trials(config, method, grid, [0], n)] for n in (None, 3, 6)}
    assert names[6][:3] == names[3]
    assert len(set(names[6])) == 6
    assert set(names[6]) < set(names[None] or [])
    assert names[6] != (names[None] or [])[:6]
    other = [trial.name for trial in make_trials(config, method, grid, [1], 6)]
    assert [name[:-2] for name in other] != [name[:-2] for name in names[6]]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "search": ({"search": "tpe"}, "must be one of grid, random, asha"),
    "no samples": ({"search": "random"}, "samples: is needed for a random search"),
    "samples of a grid": ({"samples": 2}, "samples: is not for a grid"),
    "no seed": ({"seeds": []}, "seeds: must be one or more"),
    "seeds of asha": ({"search": "asha", "seeds": [0, 1]}, "asha compares runs of one seed"),
    "grace": ({"search": "asha", "grace": 2}, "grace: must be at least 1 and under epochs"),
    "reduction": ({"search": "asha", "reduction": 1}, "reduction: must be 2 or more"),
    "epochs": ({"search": "asha", "grid": ["epochs=2,4"]}, "epochs: is what asha itself decides"),
    "grid": ({"grid": ["width=3"]}, "RepAdapter has no 'width'"),
    "method": ({"methods": [refold.RepAdapter(), refold.RepAdapter()]}, "two candidates have one name"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_makes_no_sweep_is_refused(name: str, photos: Path, tmp_path: Path) -> None:
    changes, reason = BAD[name]
    with pytest.raises(DataError, match=reason):
        run_sweep(settings(photos, tmp_path), **{"grid": GRID, **changes})
    assert not (tmp_path / "trials").exists()


def test_without_validation_images_nothing_is_compared(photos: Path, tmp_path: Path) -> None:
    config = settings(photos, tmp_path, fractions=(24, 0, 8), select=None)
    with pytest.raises(DataError, match="has no validation split"):
        run_sweep(config, GRID)
    for name, value in (("cpus", 0), ("gpus", -1.0), ("retries", -1)):
        with pytest.raises(DataError, match=f"{name}: must be"):
            RayEngine(**{name: value})


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_ranks_and_writes_a_command_line_that_trains_the_best(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    # Which kernel is fastest is measured, and another one rounds differently.
    monkeypatch.setattr("refold.training.trainer.choose_attention", lambda *_: "default")
    here = photos.parent
    done = run(
        *("sweep", "photos", "--model", "timm/test_vit", "--random-weights", "--method", "RepAdapter(rank=2)"),
        *("--method", "LinearProbe", "--split", "16", "8", "8", "--epochs", "1", "--batch-size", "8"),
        *("--image-size", "32", "--select", "loss", "--grid", "scale=0.5,2", "--search", "random", "--samples", "2"),
        *("--seeds", "3", "-o", "swept"),
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    assert "random search; 1 seed" in done.stdout
    assert "pip install 'refold[sweep]'" in done.stdout
    assert not (here / "swept" / "results.parquet").exists()
    result = json.loads((here / "swept" / "results.json").read_text())
    assert len(result["trials"]) == 2
    assert min(result["trials"], key=lambda row: row["value"])["trial"] == result["best"]
    words = shlex.split((here / "swept" / "best.sh").read_text().splitlines()[-1])
    assert shlex.join(words) in done.stdout
    again = run(*words[1:], cwd=here)
    assert again.returncode == 0, again.stderr
    trial, best = (
        TrainConfig.load(here / "swept" / "trials" / result["best"]),
        TrainConfig.load(here / "swept" / "best"),
    )
    assert best == trial.replace(output=best.output, evaluate_test=True)
    values = {row["trial"]: row["value"] for row in result["trials"]}
    assert summary(here / "swept" / "best")["metrics"]["val"]["loss"] == values[result["best"]]
    assert "test" in summary(here / "swept" / "best")["metrics"]


SAID = {
    "plain": {},
    "numbers": {"lr": 3e-4, "head_lr": 1e-2, "weight_decay": 0.0, "warmup_epochs": 0.5, "mixup": 0.8, "clip_grad": 1.0},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "names": {"data": "my photos", "weights": "a b.pth", "select": "f1", "class_weights": "balanced", "target": "it's"},
    "splits": {"train": "a.csv", "val": "b.csv", "test": "c.csv", "fractions": (0.5, 0.3, 0.2), "seed": 7},
    "counts": {"fractions": (40, 11, 10), "batch_size": 5, "pretrained": False, "skip_bad_images": True},
    "method": {"method": refold.LoRA(rank=3, sites=("attention_out", "blocks.*.fc1"))},
    "composed": {"method": refold.Compose([refold.VPT(tokens=3), refold.LoRA()])},
    "video": {
        "task": "video",
        "frames": 4,
        "sampling": "dense",
        "clips": 2,
        "crops": 3,
        "method": refold.STAdapter(frames=4),
    },
    "text": {"head": "zeroshot", "freeze_head": True, "templates": ("a {}.", "the {}."), "class_names": "names.csv"},
    "dense": {"task": "segment", "decoder": "fpn", "method": refold.E3VA(), "features": "memory", "batch_size": 3},
}


@pytest.mark.parametrize("name", list(SAID))
def test_a_config_is_said_in_words_that_make_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself is started with the words, and what it would train is compared."""
    config = TrainConfig.of(
        **{"data": "photos", "model": "timm/test_vit", "method": refold.RepAdapter(scale=5), "output": "runs/a"}
        | SAID[name]
    )
    heard: list[TrainConfig] = []

    def listen(given: TrainConfig, **_: Any) -> Any:
        heard.append(given)
        raise RefoldError("heard")

    monkeypatch.setattr("refold.training.train", listen)
    words = shlex.split(shlex.join(command_line(config)))
    assert words[:2] == ["refold", "train"]
    run(*words[1:], cwd=Path.cwd())
    assert heard == [config]


def test_what_the_config_decides_by_itself_is_not_said() -> None:
    plain = {"data": "photos", "model": "timm/test_vit", "method": refold.RepAdapter(scale=5), "output": "runs/a"}
    shown = ["--model", "timm/test_vit", "--method", "RepAdapter(scale=5)"]
    assert command_line(TrainConfig.of(**plain)) == ["refold", "train", "photos", *shown, "--output", "runs/a"]
    # The same numbers are said where they are not what a config of that task begins with.
    video = plain | {"task": "video", "method": refold.STAdapter(frames=8)}
    own = TrainConfig.of(**video)
    for config, further in (
        (own, set()),
        (TrainConfig.of(**video, batch_size=64), {"--batch-size"}),
        (TrainConfig.of(**video, drop_path=0.1), {"--drop-path"}),
        (TrainConfig.of(**plain, batch_size=own.batch_size), {"--batch-size"}),
        (TrainConfig.of(**plain, drop_path=0.0), {"--drop-path"}),
    ):
        options = {word for word in command_line(config) if word.startswith("--")}
        assert options - {"--model", "--method", "--output", "--task"} == further


def test_what_the_command_cannot_say_is_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"validate_every: `refold train` has no option for 2"):
        command_line(settings(photos, tmp_path, attention="auto", validate_every=2))
    done = run("sweep", str(photos), "--grid", "lr=1e-7,1e-3", "-o", str(tmp_path / "s"), cwd=tmp_path)
    assert done.returncode == 1
    assert "_lr: `refold train` has no option for 1e-07" in done.stderr
    for options, reason in (
        (("--engine", "spark"), "must be sequential or ray"),
        (("--cpus", "2"), "--cpus: is for --engine ray"),
        (("--grid", "lr"), "cannot read 'lr'"),
        (("--seeds", "a"), "must be whole numbers"),
    ):
        done = run("sweep", str(photos), *options, "-o", str(tmp_path / "s"), cwd=tmp_path)
        assert done.returncode == 1
        assert reason in done.stderr
    assert not (tmp_path / "s").exists()


def test_help_has_the_options_of_both() -> None:
    done = run("sweep", "--help", cwd=Path.cwd())
    assert done.returncode == 0
    for option in ("--grid", "--search", "--engine", "--epochs", "--decoder", "Example"):
        assert option in done.stdout
