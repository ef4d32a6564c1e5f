"""Small image files on disk, and what reading them says."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from refold.data import ImageSet, load_dataset
from refold.errors import DataError

__all__ = ["COLOURS", "class_folders", "complaint", "image", "names", "photos", "table"]

COLOURS = {"cat": "red", "dog": "lime", "bird": "blue"}


def image(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), colour).save(path)
    return path


def class_folders(root: Path, counts: dict[str, int], prefix: str = "") -> Path:
    for name, count in counts.items():
        for k in range(count):
            image(root / name / f"{prefix}{k:03}.png", COLOURS[name])
    return root


def table(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")
    return path


def names(image_set: ImageSet | None) -> list[str]:
    assert image_set is not None
    return [Path(path).name for path in image_set.paths]


def complaint(*args, **options) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(*args, **options)
    return str(caught.value)


@pytest.fixture
def photos(tmp_path):
    """Ten images beside the tables of a test."""
    for k in range(10):
        image(tmp_path / f"{k}.png")
    return tmp_path
