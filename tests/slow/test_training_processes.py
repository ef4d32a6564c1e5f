"""Two processes of ``accelerate launch`` on the CPU: the metrics of one, within noise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import refold
from refold.training import TrainConfig

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from pathlib import Path
import torch
from refold.training import TrainConfig, predict, train

torch.set_num_threads(1)
config = TrainConfig.load(sys.argv[1]).replace(output=sys.argv[2])
result = train(config)
everything = predict(result.model, config.data)  # every process gets all rows, in order
assert len(everything) == 61 and [r["path"] for r in everything] == sorted(r["path"] for r in everything)
Path(sys.argv[2] + f"-rank{int(result.main_process)}").write_text(repr((result.metrics, everything)))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 images: no split divides by two processes, or by the batch size."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count, brightness in (("dark", 31, 110), ("light", 30, 140)):
        (root / name).mkdir()
        for i in range(count):
            pixels = noise.normal(noise.normal(brightness, 12), 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def launch(folder: Path, output: Path, processes: int) -> dict[str, dict[str, float]]:
    """Run the script under the launcher; all processes must hold the same results."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    script = folder / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(folder), str(output)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = {path.read_text() for path in output.parent.glob(f"{output.name}-rank*")}
    assert len(results) == 1
    assert len(list(output.parent.glob(f"{output.name}-rank*"))) == processes
    return json.loads((output / "summary.json").read_text())["metrics"]


@pytest.mark.parametrize("method", [refold.RepAdapter(rank=4, dropout=0.0), refold.FullFineTune()])
def test_two_processes_train_like_one(images: Path, tmp_path: Path, method: refold.Method) -> None:
    """Without dropout the two differ by the rounding of averaged gradients alone."""
    config = TrainConfig(
        data=str(images),
        model="timm/test_vit",
        pretrained=False,
        method=method,
        output=str(tmp_path),
        fractions=(40, 11, 10),
        image_size=32,
        epochs=3,
        batch_size=8,
        lr=2e-3,
        drop_path=0.0,
        augment="flip",
        precision="fp32",
        attention="auto",
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    one = launch(tmp_path, tmp_path / "one", 1)
    two = launch(tmp_path, tmp_path / "two", 2)
    assert one.keys() == two.keys() == {"val", "test"}
    for split, values in one.items():
        assert two[split] == pytest.approx(values, abs=2e-3), split
    histories = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for a, b in zip(*histories, strict=True):
        assert (a["epoch"], a["step"], a["split"]) == (b["epoch"], b["step"], b["split"])
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-3)
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    for name, tensor in first.items():
        distance = (second[name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
        assert distance < 0.05, name
    rows = (tmp_path / "two" / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + 10
