"""One run on several processes and hosts: torchrun and accelerate, network namespaces as hosts, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import refold
from refold.training import TrainConfig
from refold.training.checkpoint import Checkpoint

pytestmark = pytest.mark.slow

#: Trains the config in argv[1] to argv[2]; from step argv[3] on, a process kills itself. Its rank and what it found are
#: written beside the output, whose place may differ from host to host.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from refold.training import TrainConfig, train, trainer

torch.set_num_threads(1)
kill_at, made, step = int(sys.argv[3]), 0, trainer.Trainer._step

def counted(self, *args):
    global made
    made += 1
    if made == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)

trainer.Trainer._step = counted
result = train(TrainConfig.load(sys.argv[1]).replace(output=sys.argv[2]), resume=True)
rank = os.environ.get("RANK", "0")
Path(sys.argv[2] + f"-rank{rank}.json").write_text(json.dumps([result.main_process, result.metrics]))
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 images: no split divides by two processes, or by the batch size; the same in a shard beside."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    with tarfile.open(root.parent / f"{root.name}.tar", "w") as tar:
        for name, count, brightness in (("dark", 31, 110), ("light", 30, 140)):
            (root / name).mkdir()
            for i in range(count):
                pixels = noise.normal(noise.normal(brightness, 12), 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                path = root / name / f"{i:02}.png"
                Image.fromarray(pixels).save(path)
                path.with_suffix(".cls").write_text(name)
                for file in (path, path.with_suffix(".cls")):
                    tar.add(file, f"{name}-{file.name}")
    return root


def write(folder: Path, images: Path, **changes: Any) -> Path:
    """The config and the script of a run."""
    settings: dict[str, Any] = {
        "data": str(images), "model": "timm/test_vit", "pretrained": False, "output": str(folder), "image_size": 32,
        "method": refold.RepAdapter(rank=4, dropout=0.0), "fractions": (40, 11, 10), "epochs": 2, "batch_size": 8,
        "lr": 2e-3, "drop_path": 0.0, "augment": "flip", "precision": "fp32", "attention": "default",
    }  # fmt: skip
    config = TrainConfig(**(settings | changes))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    (folder / "script.py").write_text(SCRIPT)
    return folder


def command(folder: Path, output: Path, kill_at: int = 0) -> list[str]:
    return [str(folder / "script.py"), str(folder), str(output), str(kill_at)]


def run(*parts: str, fails: bool = False) -> str:
    done = subprocess.run(parts, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr


def torchrun(processes: int, folder: Path, output: Path, kill_at: int = 0) -> None:
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", str(processes)]
    run(*launcher, *command(folder, output, kill_at), fails=kill_at > 0)


def found(output: Path, processes: int = 1) -> dict[str, dict[str, float]]:
    """The metrics, which all processes found; one of them wrote the folder."""
    results = [json.loads(path.read_text()) for path in sorted(output.parent.glob(f"{output.name}-rank*.json"))]
    assert len(results) == processes
    assert [main for main, _ in results] == [True] + [False] * (processes - 1)
    assert all(metrics == results[0][1] for _, metrics in results)
    assert json.loads((output / "summary.json").read_text())["metrics"] == results[0][1]
    return results[0][1]


def require_close(one: Path, other: Path, processes: int) -> None:
    """The same training up to the rounding of averaged gradients."""
    a, b = found(one), found(other, processes)
    assert a.keys() == b.keys() == {"val", "test"}
    for split, values in a.items():
        assert b[split] == pytest.approx(values, abs=2e-3), split
    first, second = (load_file(folder / "adapter.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (second[name] - tensor).norm() / tensor.norm().clamp(min=1e-3) < 0.05, name
    rows = [(folder / "predictions.csv").read_text().splitlines() for folder in (one, other)]
    assert [row.split(",")[0] for row in rows[0]] == [row.split(",")[0] for row in rows[1]]
    assert len(rows[1]) == len(set(rows[1])) == 1 + 10  # every image once


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, no launcher."""
    folder = write(tmp_path_factory.mktemp("alone"), images)
    run(sys.executable, *command(folder, folder / "run"))
    return folder / "run"


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}], ids=["whole", "accumulated"])
def test_torchrun_trains_like_one_process(images: Path, alone: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write(tmp_path, images, **changes)
    torchrun(2, folder, folder / "run")
    require_close(alone, folder / "run", 2)


def test_shards_are_divided_like_files(images: Path, alone: Path, tmp_path: Path) -> None:
    folder = write(tmp_path, images.parent / f"{images.name}.tar")
    torchrun(2, folder, folder / "run")
    found(folder / "run", 2)
    rows = [(output / "predictions.csv").read_text().splitlines()[1:] for output in (alone, folder / "run")]
    names = [sorted("-".join(Path(row.split(",")[0]).parts[-2:]).rsplit(".tar-")[-1] for row in some) for some in rows]
    assert names[0] == names[1]


def test_killed_and_resumed(images: Path, tmp_path: Path) -> None:
    """One process; two of torchrun: to the bit what was not killed gives."""
    for processes in (1, 2):
        folder = write(
            tmp_path / str(processes), images, method=refold.RepAdapter(rank=4, dropout=0.3), drop_path=0.1,
            checkpoint_every=3,
        )  # fmt: skip
        torchrun(processes, folder, folder / "whole")
        torchrun(processes, folder, folder / "killed", kill_at=9)  # of ten steps eight are made; six are kept
        saved = Checkpoint.read(folder / "killed" / "checkpoint.pt")
        assert saved.midway is not None
        assert [len(process.losses) for process in saved.midway] == [1] * processes
        assert not list(folder.glob("killed-rank*"))
        torchrun(processes, folder, folder / "killed")
        assert found(folder / "killed", processes) == found(folder / "whole", processes)
        for name in ("adapter.safetensors", "predictions.csv"):
            assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
        histories = [
            [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("whole", "killed")
        ]
        for a, b in zip(*histories, strict=True):
            assert {**a, "seconds": 0} == {**b, "seconds": 0}


# -- FSDP2 ------------------------------------------------------------------------------------------------------

BLOCKS = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", "Block"]


def launch(options: list[str], folder: Path, output: Path, kill_at: int = 0, fails: bool = False) -> str:
    """``accelerate launch`` with FSDP on two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", *options]
    launcher += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return run(
        *launcher, "--main_process_port", "0", *command(folder, output, kill_at), fails=fails or kill_at > 0
    )  # fmt: skip


SHARDED = {
    "whole": ([], {}),
    "blocks": (BLOCKS, {}),
    "bf16, accumulated": (BLOCKS, {"precision": "bf16", "accumulate": 2, "optimizer": "sgd", "lr": 0.01}),
    "two passes": (BLOCKS, {"consistency": 0.5, "consistency_noise": 0.5}),
}


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_weights_train_like_whole_ones(images: Path, alone: Path, tmp_path: Path, case: str) -> None:
    """To the bit what two processes compute without FSDP2, and what one process computes up to averages."""
    options, changes = SHARDED[case]
    folder = write(tmp_path, images, **changes)
    torchrun(2, folder, folder / "ddp")
    launch(["--fsdp_version", "2", *options], folder, folder / "fsdp")
    assert found(folder / "fsdp", 2) == found(folder / "ddp", 2)
    for name in ("adapter.safetensors", "predictions.csv"):
        assert (folder / "fsdp" / name).read_bytes() == (folder / "ddp" / name).read_bytes()
    assert len(list((folder / "fsdp").rglob("*.safetensors"))) == 1
    if not changes:
        require_close(alone, folder / "fsdp", 2)


def test_a_sharded_run_is_resumed_with_and_without_sharding(images: Path, tmp_path: Path) -> None:
    """Killed in an epoch twice: it goes on without FSDP2, then with it again, and ends as if nothing had been."""
    folder = write(tmp_path, images, method=refold.RepAdapter(rank=4, dropout=0.3), checkpoint_every=2)
    two = ["--fsdp_version", "2", *BLOCKS]
    launch(two, folder, folder / "whole")
    launch(two, folder, folder / "killed", kill_at=4)  # three steps are made, two are kept
    torchrun(2, folder, folder / "killed", kill_at=6)  # five more are made; the epoch's five and two are kept
    launch(two, folder, folder / "killed")
    assert found(folder / "killed", 2) == found(folder / "whole", 2)
    for name in ("adapter.safetensors", "predictions.csv"):
        assert (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_fsdp1_is_refused(images: Path, tmp_path: Path) -> None:
    folder = write(tmp_path, images)
    said = launch([], folder, folder / "run", fails=True)
    assert "FSDP1 is not supported" in said
    assert "Add --fsdp_version 2" in said
    assert not (folder / "run").exists()


# -- hosts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them: 10.213.7.1 and 10.213.7.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    names = [f"refold-{os.getpid()}-{k}" for k in (1, 2)]

    def ip(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)

    try:
        steps: list[tuple[str, ...]] = [("netns", "add", name) for name in names]
        steps.append(("link", "add", "cable1", "netns", names[0], "type", "veth", "peer", "cable2", "netns", names[1]))
        for k, name in enumerate(names, start=1):
            steps.append(("-n", name, "address", "add", f"10.213.7.{k}/24", "dev", f"cable{k}"))
            steps += [("-n", name, "link", "set", device, "up") for device in ("lo", f"cable{k}")]
        for step in steps:
            done = ip(*step)
            if done.returncode:
                pytest.skip(f"this system gives no network namespaces: ip {' '.join(step)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def test_two_hosts_train_like_one_process(images: Path, alone: Path, tmp_path: Path, hosts: list[str]) -> None:
    """They see each other over the cable alone and no file of each other's; one writes; killed, they go on."""
    folder = write(tmp_path, images, checkpoint_every=3)
    for k in (1, 2):
        (folder / f"disk{k}").mkdir()

    def start(kill_at: int) -> list[int]:
        running = []
        for k, name in enumerate(hosts, start=1):
            launcher = ["ip", "netns", "exec", name, *TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1"]
            launcher += ["--node_rank", str(k - 1), "--master_addr", "10.213.7.1", "--master_port", "29413"]
            rest = command(folder, folder / f"disk{k}" / "run", kill_at)
            running.append(subprocess.Popen([*launcher, *rest], env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": f"cable{k}"}))
        try:
            return [process.wait(timeout=300) for process in running]
        finally:
            for process in running:
                process.kill()

    assert all(start(kill_at=8))
    saved = Checkpoint.read(folder / "disk1" / "run" / "checkpoint.pt")
    assert saved.midway is not None
    assert (saved.epoch, [len(process.losses) for process in saved.midway]) == (1, [1, 1])
    assert start(kill_at=0) == [0, 0]
    written = sorted(path.name for path in (folder / "disk2").iterdir())
    assert written == ["run-rank1.json"]
    shutil.move(folder / "disk2" / "run-rank1.json", folder / "disk1")
    require_close(alone, folder / "disk1" / "run", 2)
    assert len(list(folder.rglob("adapter.safetensors"))) == 1
