"""Checkpoints: atomic, free of code, and refused where they do not belong. Run folders likewise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import refold
from refold.errors import DataError, RefoldError
from refold.training import TrainConfig
from refold.training.checkpoint import Best, Checkpoint, check_same, write_atomically
from refold.training.run import RunFolder


def checkpoint(**changes) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    parameter.sum().backward()
    optimizer.step()
    values = {
        "epoch": 2,
        "settings": {"lr": 1e-3, "method": {"name": "RepAdapter"}},
        "data": {"training images": 40, "classes": ["a", "b"]},
        "attention": "math",
        "tensors": {"head.weight": torch.randn(2, 3)},
        "optimizer": optimizer.state_dict(),
        "best": Best(1, 0.5, 0.7, {"head.weight": torch.randn(2, 3)}),
        "history": [{"epoch": 1, "split": "val", "accuracy": 0.5}],
        "seconds": 1.5,
    }
    return Checkpoint(**(values | changes))


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    original = checkpoint()
    original.write(tmp_path / "checkpoint.pt")
    read = Checkpoint.read(tmp_path / "checkpoint.pt")
    for name in ("epoch", "settings", "data", "attention", "history", "seconds"):
        assert getattr(read, name) == getattr(original, name)
    assert torch.equal(read.tensors["head.weight"], original.tensors["head.weight"])
    assert original.best is not None
    assert read.best is not None
    assert (read.best.epoch, read.best.worth, read.best.loss) == (1, 0.5, 0.7)
    assert torch.equal(read.best.tensors["head.weight"], original.best.tensors["head.weight"])
    assert torch.equal(read.optimizer["state"][0]["exp_avg"], original.optimizer["state"][0]["exp_avg"])
    checkpoint(best=None).write(tmp_path / "checkpoint.pt")
    assert Checkpoint.read(tmp_path / "checkpoint.pt").best is None


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint().write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RefoldError, match="is damaged") as caught:
        Checkpoint.read(path)
    assert caught.value.where == str(path)
    torch.save({"format": 99}, path)
    with pytest.raises(RefoldError, match="has format 99"):
        Checkpoint.read(path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "epoch": Payload()}, tmp_path / "checkpoint.pt")
    with pytest.raises(RefoldError, match="is damaged"):
        Checkpoint.read(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RefoldError, match="No space left") as caught:
        write_atomically(path, fail)
    assert caught.value.where == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_setting_that_differs_is_named() -> None:
    check_same({"lr": 1, "workers": 0}, {"lr": 1, "workers": 4}, ignore=("workers",))
    with pytest.raises(DataError, match=r"lr: the run began with 1 and cannot be resumed with 2"):
        check_same({"lr": 1, "seed": 0}, {"lr": 2, "seed": 0})


def config(output: Path, **changes) -> TrainConfig:
    settings = {"data": "d", "model": "timm/test_vit", "method": refold.BitFit(), "output": output}
    return TrainConfig(**(settings | changes))


def test_a_used_folder_is_refused_unless_the_same_run_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "run"
    folder = RunFolder(output)
    folder.check(config(output), resume=False)
    folder.check(config(output), resume=True)
    folder.open(config(output, lr=1e-3))
    folder.check(config(output, lr=2e-3), resume=False)  # it failed before it began: nothing is lost
    folder.start_log([])
    folder.close()
    with pytest.raises(DataError, match="not empty"):
        folder.check(config(output), resume=False)
    folder.check(config(output, lr=1e-3, workers=2), resume=True)
    with pytest.raises(DataError, match=r"lr: the run began with 0\.001 and cannot be resumed with 0\.002"):
        folder.check(config(output, lr=2e-3), resume=True)
    with pytest.raises(DataError, match=r"method: the run began"):
        folder.check(config(output, method=refold.LinearProbe()), resume=True)
    assert TrainConfig.load(output) == config(output, lr=1e-3)


def test_a_file_or_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(DataError, match="is a file"):
        RunFolder(file).check(config(file), resume=False)
    with pytest.raises(DataError, match="Is this a run folder"):
        RunFolder(tmp_path).check(config(tmp_path), resume=True)
    with pytest.raises(RefoldError, match="cannot be created"):
        RunFolder(file / "run").open(config(file / "run"))


def test_a_full_disk_is_refused_before_training(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.require_space(1)
    with pytest.raises(RefoldError, match="MB are free"):
        folder.require_space(10**18)


def test_the_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    rows = [{"epoch": e, "step": 5 * e, "split": "val", "loss": 1.0 / e} for e in (1, 2, 3)]
    first = RunFolder(tmp_path)
    first.start_log([])
    for row in rows:
        first.log(row)
    first.close()
    second = RunFolder(tmp_path)
    second.start_log(rows[:1])
    second.log(rows[1])
    second.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows[:2]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", main=False)
    folder.open(config(tmp_path / "run"))
    folder.start_log([])
    folder.log({"epoch": 1, "step": 1, "split": "val", "loss": 1.0})
    folder.write_json("summary.json", {})
    folder.write_predictions([{"path": "a"}])
    folder.close()
    assert not (tmp_path / "run").exists()
