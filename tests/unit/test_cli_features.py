"""``refold train --features`` on whole images: the run without, a folder taken up again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from commands import run as command


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("features"), torch.Generator().manual_seed(0)
    for number, name in enumerate(("dark", "bright")):
        (folder / "photos" / name).mkdir(parents=True)
        for k, image in enumerate(torch.randint(0, 256, (12, 32, 32, 3), generator=random, dtype=torch.uint8)):
            Image.fromarray((image // 2 + 90 * number).numpy()).save(folder / "photos" / name / f"{k}.png")
    return folder


def test_the_command(photos: Path) -> None:
    def run(output: str, *options: str) -> Any:
        return command(
            *("train", "photos", "--model", "timm/test_vit", "--random-weights", "--image-size", "32", "-o", output),
            *("--split", "0.5", "0.25", "0.25", "--epochs", "3", "--batch-size", "4", "--precision", "fp32"),
            *options,
            cwd=photos,
        )

    def curve(output: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (photos / output / "metrics.jsonl").read_text().splitlines()]

    def summary(output: str) -> dict[str, Any]:
        return json.loads((photos / output / "summary.json").read_text())

    method = ("--method", "E3VA(rank=2)")
    for output, options in (("a", ("--drop-path", "0")), ("b", ("--features", "kept")), ("c", ("--features", "kept"))):
        done = run(output, *method, *options)
        assert done.returncode == 0, done.stderr
    for output in ("b", "c"):
        assert curve(output) == pytest.approx(curve("a"), rel=1e-4)
    assert summary("b")["features"] == {"kept": "kept", "bytes": (photos / "kept" / "features.bin").stat().st_size}
    assert "features" not in summary("a")
    assert summary("b")["metrics"]["test"] == pytest.approx(summary("a")["metrics"]["test"], rel=1e-4)
    for options, reason in (
        (("--method", "RepAdapter", "--features", "memory"), "RepAdapter changes what the backbone computes"),
        ((*method, "--features", "memory", "--mixup", "0.2"), "mixup: draws anew at every step"),
        ((*method, "--features", "kept", "--crop", "center"), "its features are of something else"),
    ):
        done = run("d", *options)
        assert done.returncode != 0
        assert reason in " ".join(done.stderr.split())
