"""VTAB-1k on a tree of all 19 tasks with the right names, counts and classes, and pictures of one colour."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import refold
from commands import run
from refold.errors import DataError, RefoldError
from refold.protocols import TASKS, find_tasks, parse_grid, points, prepare, run_vtab
from refold.protocols.vtab import GROUPS, load_task
from refold.report.protocols import vtab_grid
from refold.training import TrainConfig

pytestmark = pytest.mark.timeout(240)
TESTED = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists of the right length that name few images again and again."""
    base = tmp_path_factory.mktemp("vtab")
    for name, task in TASKS.items():
        folder = base / name
        (folder / "images").mkdir(parents=True)
        shown = min(task.classes, 4)
        for k in range(shown):
            Image.new("RGB", (8, 8), (60 * k, 200 - 50 * k, 30)).save(folder / "images" / f"{k}.png")
        lines = [f"images/{k % shown}.png {(k % shown) * (task.classes - 1) // (shown - 1)}\n" for k in range(1000)]
        (folder / "train800.txt").write_text("".join(lines[:800]))
        (folder / "val200.txt").write_text("".join(lines[800:]))
        (folder / "test.txt").write_text("".join(lines[:TESTED]))
    return base


def config(root: Path, output: Path, **changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "data": root, "output": output, "model": "timm/test_vit", "pretrained": False, "image_size": 32,
        "method": refold.LoRA(rank=2), "epochs": 1, "warmup_epochs": 0, "lr": 1e-2, "precision": "fp32",
        "attention": "default", "normalize": "imagenet",
    }  # fmt: skip
    return TrainConfig.of(**base | changes)


def test_all_tasks_with_groups_and_averages(root: Path, tmp_path: Path) -> None:
    result = run_vtab(config(root, tmp_path, epochs=1, batch_size=500), tasks=None)
    assert [row.name for row in result.rows] == list(TASKS)
    assert [sum(task.group == name for task in TASKS.values()) for name in GROUPS] == [7, 4, 8]
    means = [row.accuracy.mean for row in result.rows]
    groups = [statistics.mean(part) for part in (means[:7], means[7:11], means[11:])]
    assert [result.group(name) for name in GROUPS] == pytest.approx(groups)
    assert result.group_average == pytest.approx(statistics.mean(groups))
    assert result.task_average == pytest.approx(statistics.mean(means))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["selected_on"] == "val200"
    assert written["normalize"] == "imagenet"
    assert written["group_average"] == result.group_average
    grid = vtab_grid(result)
    assert len(grid.rows) == 19 + 3 + 2
    assert grid.rows[0][4] == "6 of 10,000"
    record = json.loads((tmp_path / "dtd" / "test-given-0.json").read_text())
    assert record["images"] == {"train": 1000, "test": TESTED}


def test_candidates_are_chosen_on_validation_and_the_test_set_is_seen_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    import refold.protocols.trial as module

    scored = module.score

    def counting(model: Any, image_set: Any, *rest: Any, **named: Any) -> Any:
        seen.append(len(image_set))
        return scored(model, image_set, *rest, **named)

    monkeypatch.setattr(module, "score", counting)
    settings = config(root, tmp_path, epochs=2)
    result = run_vtab(settings, tasks=["svhn"], grid={"lr": [1e-9, 1e-2]}, seeds=[0, 1])
    (row,) = result.rows
    assert seen == [TESTED, TESTED]
    assert list(row.candidates) == ["lr 1e-09", "lr 0.01"]
    assert dict(row.point.values) == {"lr": 1e-2}
    assert row.candidates["lr 0.01"] > row.candidates["lr 1e-09"]
    assert len(row.accuracy) == 2
    files = {path.name for path in (tmp_path / "svhn").iterdir()}
    assert files == {"val-lr1e-09-0.json", "val-lr0.01-0.json", "test-lr0.01-0.json", "test-lr0.01-1.json"}
    search = json.loads((tmp_path / "svhn" / "val-lr0.01-0.json").read_text())
    assert [one["epoch"] for one in search["val"]] == [2]
    assert search["images"] == {"train": 800, "val": 200}
    # Again: nothing is trained, and a setting that differs is refused.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "svhn").iterdir()}
    assert run_vtab(settings, tasks=["svhn"], grid={"lr": [1e-9, 1e-2]}, seeds=[0, 1]).rows == result.rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "svhn").iterdir()} == before
    with pytest.raises(DataError, match="epochs: the run began with 2"):
        run_vtab(settings.replace(epochs=3), tasks=["svhn"], grid={"lr": [1e-9, 1e-2]})


def test_the_published_protocol_takes_the_best_epoch_on_test_and_says_so(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refold.protocols.vtab_run._PUBLISHED_EVERY", 2)
    settings = config(root, tmp_path, epochs=3, batch_size=500)
    result = run_vtab(settings, tasks=["eurosat"], grid={"lr": [1e-9, 1e-3]}, published_protocol=True)
    (row,) = result.rows
    best = {}
    for point in points({"lr": [1e-9, 1e-3]}):
        record = json.loads((tmp_path / "eurosat" / f"published-{point.slug}-0.json").read_text())
        assert [one["epoch"] for one in record["val"]] == [2, 3]
        assert record["images"] == {"train": 1000, "val": TESTED}
        best[str(point)] = max(one["accuracy"] for one in record["val"])
    assert row.candidates == best
    assert row.accuracy.mean == max(best.values())
    assert result.to_json()["selected_on"] == "test"
    assert "ON TEST" in vtab_grid(result).title


def test_a_grid_is_of_the_method_and_of_the_recipe() -> None:
    grid, other = parse_grid(["scale=0.1,5", "lr=1e-3"], [refold.RepAdapter(), refold.VPT()])
    assert other == {"lr": [1e-3]}
    assert grid == {"scale": [0.1, 5], "lr": [1e-3]}
    settings = config(Path("a"), Path("b"), method=refold.RepAdapter(rank=4))
    found = [point.apply(settings) for point in points(grid)]
    assert [one.method for one in found] == [refold.RepAdapter(rank=4, scale=0.1), refold.RepAdapter(rank=4, scale=5)]
    assert all(one.lr == 1e-3 for one in found)
    assert points({}) == [points({})[0]]
    assert points({})[0].apply(settings) == settings
    for text, reason in (("scale", "cannot read"), ("width=1", "LoRA has no 'width'"), ("lr=", "cannot read")):
        with pytest.raises(DataError, match=reason):
            parse_grid([text], [refold.LoRA()])
    with pytest.raises(DataError, match="twice"):
        parse_grid(["lr=1", "lr=2"], [refold.LoRA()])


def test_lists_are_drawn_from_folders_per_class(tmp_path: Path) -> None:
    folder, task = tmp_path / "kitti", TASKS["kitti"]
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for part, count in (("train", 300), ("test", 5)):
        for name in "abcd":
            (folder / part / name).mkdir(parents=True)
            first = folder / part / name / "0.png"
            Image.fromarray(pixels).save(first)
            for k in range(1, count):
                (folder / part / name / f"{k}.png").hardlink_to(first)
    notes = prepare(tmp_path, ["kitti"], seed=1)
    assert notes == {
        "kitti": ["800 and 200 images drawn with seed 1, not those of NOAH's lists", "20 test images, not 711"]
    }
    search, final = load_task(task, find_tasks(tmp_path, ["kitti"])["kitti"])
    assert search.val is not None
    assert final.test is not None
    assert (len(search.train), len(search.val), len(final.train), len(final.test)) == (800, 200, 1000, 20)
    assert final.train.paths == search.train.paths + search.val.paths
    assert len(set(final.train.paths)) == 1000
    counts = final.train.targets.bincount(minlength=4)
    assert counts.sum() == 1000
    assert counts.min() > 200
    for path, target in zip(final.test.paths, final.test.targets.tolist(), strict=True):
        assert Path(path).parent.name == "abcd"[target]
    lists = {path: path.read_text() for path in folder.glob("*.txt")}
    assert prepare(tmp_path, ["kitti"], seed=2) == {}
    assert {path: path.read_text() for path in folder.glob("*.txt")} == lists


def test_what_is_missing_or_wrong_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no lists of cifar, .*NOAH's release.*CIFAR-100"):
        find_tasks(tmp_path)
    with pytest.raises(DataError, match="no such task"):
        find_tasks(root, ["mnist"])
    with pytest.raises(DataError, match=r"no images of dmlab\. Download DMLab, .*dmlab-train\.tfrecord.*TASK/train"):
        prepare(tmp_path, ["dmlab"])
    for count, classes, reason in ((10, 4, "holds 40 images"), (2, 3, "has 3 classes; KITTI distance has 4")):
        folder = tmp_path / reason[:4] / "kitti"
        for part in ("train", "test"):
            for name in "abcd"[:classes]:
                (folder / part / name).mkdir(parents=True)
                for k in range(count):
                    Image.new("L", (2, 2)).save(folder / part / name / f"{k}.png")
        with pytest.raises(DataError, match=reason):
            prepare(folder.parent, ["kitti"])
    dtd = tmp_path / "dtd"
    dtd.mkdir()
    (dtd / "images").symlink_to(root / "dtd" / "images")
    for name in ("train800.txt", "val200.txt", "test.txt"):
        (dtd / name).write_text((root / "dtd" / name).read_text())
    (dtd / "test.txt").write_text("images/0.png 47\n")
    with pytest.raises(DataError, match="has class 47; DTD has 47, from 0"):
        load_task(TASKS["dtd"], dtd)
    (dtd / "val200.txt").write_text("images/0.png 0\n")
    with pytest.raises(DataError, match="lists 1 images, not 200"):
        load_task(TASKS["dtd"], dtd)
    with pytest.raises(RefoldError, match="seeds"):
        run_vtab(config(root, tmp_path / "out"), seeds=[0, 0])


def test_the_command_prints_the_table_and_keeps_it(root: Path, tmp_path: Path) -> None:
    done = run(
        "vtab", "--root", str(root), "--tasks", "svhn,dtd", "--model", "timm/test_vit", "--random-weights",
        "--image-size", "32", "--epochs", "1", "--batch-size", "500", "--method", "RepAdapter(rank=4)",
        "--grid", "scale=1,5", "-o", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "DTD" in done.stdout
    assert "mean of Natural" in done.stdout
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.startswith(
        "VTAB-1k, RepAdapter(rank=4): test accuracy, last epoch; 1 seed; inputs normalised: imagenet"
    )
    assert "| mean of the 19 tasks |" in table
    done = run(
        "vtab", "--root", str(root), "--tasks", "svhn", "--model", "timm/test_vit", "--random-weights", "--image-size",
        "32", "--epochs", "1", "--batch-size", "500", "--method", "RepAdapter(rank=4, scale=5)", "-o", "fixed",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "fixed" / "svhn").iterdir()} == {"test-given-0.json"}
    refused = run("vtab", "--root", str(tmp_path), cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1
