"""Every example runs to its end and merges exactly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "plain_pytorch.py": ("--images", "32", "--epochs", "1"),
    "transformers_trainer.py": ("--epochs", "1"),
    "lightning_module.py": ("--images", "32"),
    "segment.py": ("--epochs", "1"),
    "detect.py": ("--epochs", "1"),
    "instance.py": ("--epochs", "1", "--image-size", "64"),
    "multitask.py": ("--epochs", "1", "--image-size", "64"),
    "video.py": ("--epochs", "1", "--image-size", "28", "--method", "RepAdapter"),
}

pytestmark = pytest.mark.slow


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *ARGUMENTS[name]],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "relative difference" in done.stdout
