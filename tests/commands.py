"""Running refold's commands in tests, and a folder in which one has run."""

from __future__ import annotations

import io
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

__all__ = ["Done", "run", "workplace"]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, cwd: Path) -> Done:
    """What the installed command does, in this process: starting Python and torch anew takes longer than the work."""
    from refold.cli import main  # slow to import, and only needed here

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["refold", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    generator = torch.Generator().manual_seed(0)
    for name, level in (("dark", 60), ("bright", 190)):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(12):
            noise = torch.randint(-40, 40, (48, 48, 3), generator=generator)
            pixels = (level + noise).clamp(0, 255).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / "photos" / name / f"{index}.png")
    done = run(
        *("train", "photos", "--model", "timm/test_vit", "--random-weights", "--method", "RepAdapter(rank=4)"),
        *("--split", "0.5", "0.25", "0.25", "--epochs", "2", "--batch-size", "4", "--image-size", "160", "-o", "run"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Report: run/report.html" in done.stdout
    return folder
