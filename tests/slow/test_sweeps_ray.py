"""Sweeps, protocols and predictions on Ray: two workers, one that is killed, and a driver that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from rich.console import Console

import refold
import sweep_runs
from commands import run
from refold.errors import DataError, RefoldError
from refold.protocols import TASKS, Standing, run_vtab
from refold.sweeps import RayEngine, SweepResult, predict_batches, run_sweep
from refold.sweeps.cluster import ray_started
from refold.training import predict, train
from sweep_runs import dark_and_bright

pytest.importorskip("ray", reason="pip install 'refold[sweep]'")
import pyarrow.parquet

pytestmark = [
    pytest.mark.slow,
    # Of Ray itself: files and sockets that its processes leave to the end of this one.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


@pytest.fixture(scope="module", autouse=True)
def two_cores() -> Iterator[None]:
    import ray

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    ray.init(
        "local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()
    del os.environ["RAY_CHDIR_TO_TRIAL_DIR"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dark_and_bright(tmp_path_factory.mktemp("ray") / "photos", 20)


settings = partial(sweep_runs.settings, epochs=4, batch_size=4, fractions=(24, 16, 0), select=None)


GRID = ["lr=1e-4,1e-3", "scale=1,5"]


def values(result: SweepResult) -> dict[str, float | None]:
    return {row.trial.name: row.value for row in result.rows}


def ray_workers(title: str) -> list[psutil.Process]:
    """Processes of this one's Ray that do the work of that title now."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def one_after_the_other(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return run_sweep(settings(photos, tmp_path_factory.mktemp("sequential")), GRID)


def test_trials_on_ray_are_those_of_the_sequential_engine(
    one_after_the_other: SweepResult, photos: Path, tmp_path: Path
) -> None:
    seen = []
    result = run_sweep(settings(photos, tmp_path), GRID, engine=RayEngine(), on_row=seen.append)
    assert values(result) == values(one_after_the_other)
    assert [one.name for one in result.ranking] == [one.name for one in one_after_the_other.ranking]
    assert {row.status for row in result.rows} == {"finished"}
    assert Counter(row.status for row in seen) == {"waiting": 4, "running": 4 * 4, "finished": 4}
    assert not (tmp_path / "ray").exists()
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert {(row["setting lr"], row["setting scale"]): row["value"] for row in table} == {
        (row.trial.values["lr"], row.trial.values["scale"]): row.value for row in one_after_the_other.rows
    }


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_the_command_shows_where_trials_stand(
    terminal: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What writes to a terminal does not pickle, and Ray pickles what watches its trials."""
    monkeypatch.setattr("refold.cli.board.console", Console(force_terminal=terminal, width=120))
    done = run(
        *("sweep", photos, "--model", "timm/test_vit", "--random-weights", "--image-size", "32", "--epochs", "2"),
        *("--batch-size", "8", "--split", "24", "16", "0", "--grid", "lr=1e-4,1e-3", "--engine", "ray", "-o", "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    if terminal:
        assert "Trials: 2 waiting" in done.stdout
        assert "Trials: 2 finished" in done.stdout
    else:
        assert done.stdout.count("finished, epoch 2 of 2") == 2
    assert (tmp_path / "out" / "best.sh").is_file()


def test_a_killed_worker_goes_on_from_its_checkpoint(
    one_after_the_other: SweepResult, photos: Path, tmp_path: Path
) -> None:
    """One of two workers dies in the middle of a trial: it ends as it would have, with every epoch in its log once."""
    killed: list[int] = []

    def kill(row: Any) -> None:
        if row.status == "running" and row.epochs == 2 and not killed:
            killed.append(ray_workers("ray::ImplicitFunc")[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    result = run_sweep(settings(photos, tmp_path), GRID, engine=RayEngine(), on_row=kill)
    assert killed
    assert values(result) == values(one_after_the_other)
    for row in result.rows:
        lines = (Path(row.trial.config.output) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]


DRIVER = """
import sys
from refold.sweeps import RayEngine, run_sweep
from refold.training import TrainConfig

config = TrainConfig.load(sys.argv[1])
run_sweep(config, sys.argv[2:], engine=RayEngine(), on_row=lambda row: print(row.status, flush=True))
"""


def test_a_killed_driver_loses_no_finished_trial(
    one_after_the_other: SweepResult, photos: Path, tmp_path: Path
) -> None:
    config = settings(photos, tmp_path / "sweep")
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    command = [sys.executable, "-c", DRIVER, str(tmp_path), *GRID]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.strip() == "finished":
            break
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    _, left = psutil.wait_procs(children, timeout=60)
    alive = [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    idle = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # they look only now and then for who started them
    assert [process.name() for process in alive if process.name() not in idle] == []
    for process in alive:
        process.kill()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("trials/*/summary.json")}
    assert 1 <= len(finished) < 4
    result = run_sweep(config, GRID, engine=RayEngine())
    assert values(result) == values(one_after_the_other)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_asha_on_ray_stops_the_worse_and_stays_with_it(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The good rates come first, so that the bad ones are below them whichever worker is faster."""
    config, grid = settings(photos, tmp_path, epochs=5, select="loss"), ["lr=1e-2,3e-3,1e-7,2e-7"]
    result = run_sweep(config, grid, search="asha", engine=RayEngine())
    assert capfd.readouterr() == ("", "")
    best = result.ranking[0].rows[0]
    assert best.epochs == 5
    assert best.trial.values["lr"] > 1e-3
    stopped = [row for row in result.rows if row.status == "stopped"]
    assert stopped
    assert {row.epochs for row in stopped} <= {1, 3}
    assert sorted(json.loads((tmp_path / "stopped.json").read_text())) == sorted(row.trial.name for row in stopped)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/*/*")}
    again = run_sweep(config, grid, search="asha", engine=RayEngine())
    assert again.rows == result.rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/*/*")} == files
    # A larger grid: what is decided tells the new trials what to beat, and is not trained again.
    larger = run_sweep(config, ["lr=1e-2,3e-3,1e-7,2e-7,1e-8"], search="asha", engine=RayEngine())
    assert larger.rows[:4] == result.rows
    assert (larger.rows[4].status, larger.rows[4].epochs) == ("stopped", 1)


def test_a_trial_that_fails_is_told_and_the_others_finish(photos: Path, tmp_path: Path) -> None:
    result = run_sweep(settings(photos, tmp_path), ["lr=1e-3,1e30"], engine=RayEngine())
    good, bad = result.rows
    assert (good.status, bad.status) == ("finished", "failed")
    assert "the loss is" in bad.reason
    with pytest.raises(DataError, match="a trial wants 99 CPUs and Ray has 2"):
        run_sweep(settings(photos, tmp_path / "many"), ["lr=1e-3"], engine=RayEngine(cpus=99))


def test_vtab_on_ray_is_the_sequential_one(tmp_path: Path) -> None:
    names = ["kitti", "dtd"]
    for name in names:
        task, folder = TASKS[name], tmp_path / "data" / name
        (folder / "images").mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (8, 8), (60 * k, 200 - 50 * k, 30)).save(folder / "images" / f"{k}.png")
        lines = [f"images/{k % 4}.png {(k % 4) * (task.classes - 1) // 3}\n" for k in range(1000)]
        (folder / "train800.txt").write_text("".join(lines[:800]))
        (folder / "val200.txt").write_text("".join(lines[800:]))
        (folder / "test.txt").write_text("".join(lines[:6]))
    config = settings(tmp_path / "data", tmp_path / "a", method=refold.LoRA(rank=2), epochs=1, batch_size=200)
    config = config.replace(fractions=(0.8, 0.2, 0.0))
    options: dict[str, Any] = {"tasks": names, "grid": {"lr": [1e-5, 1e-2]}, "seeds": [0, 1]}
    one = run_vtab(config, **options)
    seen: list[Standing] = []
    two = run_vtab(config.replace(output=str(tmp_path / "b")), engine=RayEngine(), on_job=seen.append, **options)
    told = Counter((one.status, one.epochs) for one in seen)
    assert told == {("waiting", 0): 8, ("running", 1): 8, ("finished", 1): 8}
    assert len({one.name for one in seen}) == 8
    assert [(row.point, row.candidates, row.accuracy) for row in two.rows] == [
        (row.point, row.candidates, row.accuracy) for row in one.rows
    ]
    assert sorted(path.name for path in (tmp_path / "b").rglob("*.json")) == sorted(
        path.name for path in (tmp_path / "a").rglob("*.json")
    )
    published = run_vtab(
        config.replace(output=str(tmp_path / "c")), engine=RayEngine(), published_protocol=True, **options
    )
    assert len(list((tmp_path / "c").rglob("published-*.json"))) == 2 * 2 * 2
    assert published.published_protocol
    bad = config.replace(output=str(tmp_path / "d"), lr=1e30)
    seen.clear()
    with pytest.raises(RefoldError, match=r"val-.*the loss is"):
        run_vtab(bad, engine=RayEngine(), tasks=["kitti"], grid={"scale": [1.0, 2.0]}, on_job=seen.append)
    assert Counter(one.status for one in seen) == {"waiting": 2, "failed": 2}


# -- predictions ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    train(settings(photos, output, lr=1e-2, method=refold.RepAdapter(rank=4)))
    return output


def read(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [row for part in folder.glob("part-*.parquet") for row in pyarrow.parquet.read_table(part).to_pylist()]
    assert len({row["path"] for row in rows}) == len(rows), "an image has two rows"
    return {row["path"]: row for row in rows}


def assert_equal(found: dict[str, dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert found.keys() == {row["path"] for row in expected}
    for row in expected:
        other = found[row["path"]]
        assert other.keys() == row.keys()
        assert other["prediction"] == row["prediction"]
        for name in row.keys() - {"path", "prediction"}:
            assert other[name] == pytest.approx(row[name], abs=1e-5)


def test_predictions_on_ray_are_those_of_one_process_and_bad_files_are_listed(
    trained: Path, photos: Path, tmp_path: Path
) -> None:
    import shutil

    images = tmp_path / "images"
    shutil.copytree(photos, images)
    (images / "broken.png").write_bytes((images / "dark" / "0.png").read_bytes()[:60])
    expected = predict(trained, images, skip_bad_images=True)
    found = predict_batches(trained, images, tmp_path / "out", batch_size=8, workers=2, skip_bad_images=True)
    assert_equal(read(tmp_path / "out"), expected)
    assert (found.rows, found.before) == (40, 0)
    assert [path for path, _ in found.skipped] == [str(images / "broken.png")]
    assert "broken.png" in (tmp_path / "out" / "_skipped.csv").read_text()
    table = pyarrow.parquet.read_table(tmp_path / "out")
    assert sorted(table["path"].to_pylist()) == sorted(row["path"] for row in expected)
    with pytest.raises(DataError, match=r"broken\.png: .*cannot be decoded"):
        predict_batches(trained, images, tmp_path / "strict", batch_size=8, workers=2)


def test_the_command_writes_a_table_and_says_one_line(
    trained: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = run("predict", trained, "--engine", "ray", "--input", photos, "--output", "seen.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["40 predictions, 0 of them from before: seen.parquet"]
    shown = done.stderr + "".join(capfd.readouterr())
    # Ray's core warns once a process of how Ray Data starts its own actors; nothing turns that off.
    assert [line for line in shown.splitlines() if "core_worker.cc" not in line] == []
    assert len(pyarrow.parquet.read_table(tmp_path / "seen.parquet")) == 40


def test_a_killed_predictor_costs_no_row_and_doubles_none(trained: Path, photos: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(done: int, total: int) -> None:
        if not killed:
            workers = sorted(ray_workers("ray::MapWorker"), key=lambda worker: worker.create_time())
            assert len(workers) >= 2  # one of an earlier job may linger
            killed.append(workers[-1].pid)
            os.kill(killed[0], signal.SIGKILL)

    found = predict_batches(trained, photos, tmp_path / "out", batch_size=1, workers=2, on_batch=kill)
    assert killed
    assert found.rows == 40
    assert_equal(read(tmp_path / "out"), list(predict(trained, photos)))


def test_predicting_goes_on_where_it_was_stopped(trained: Path, photos: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_batches(trained, photos, tmp_path / "out", batch_size=8, workers=2, on_batch=stop)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert len(before) == 2
    found = predict_batches(trained, photos, tmp_path / "out", batch_size=8, workers=2)
    assert (found.rows, found.before) == (40, 16)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_equal(read(tmp_path / "out"), list(predict(trained, photos)))
    other = tmp_path / "other"
    train(settings(photos, other, seed=1, epochs=1))
    with pytest.raises(DataError, match="holds predictions of another model"):
        predict_batches(other, photos, tmp_path / "out")


def test_a_ray_of_its_own_is_started_and_ended_and_a_wrong_address_is_named() -> None:
    script = (
        "from refold.sweeps.cluster import ray_started\n"
        "import ray, pytest\n"
        "from refold.errors import DataError, RefoldError\n"
        "with ray_started(None) as resources:\n"
        "    assert resources['CPU'] >= 1\n"
        "    assert ray.is_initialized()\n"
        "assert not ray.is_initialized()\n"
        "with pytest.raises(RefoldError, match='Ray cannot be reached'):\n"
        "    with ray_started('127.0.0.1:1'):\n"
        "        pass\n"
        "with pytest.raises(DataError, match='is no address of a Ray cluster'):\n"
        "    with ray_started('nonsense'):\n"
        "        pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    with ray_started(None) as resources:  # the one that runs is used, and left running
        assert resources["CPU"] == 2
    import ray

    assert ray.is_initialized()
