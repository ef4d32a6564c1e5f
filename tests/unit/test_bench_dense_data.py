"""The benchmark's composite: made of the right parts, once, and refused without them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refold import DataError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import dense_data


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_data, "CACHE", tmp_path / "runs")
    monkeypatch.setattr(dense_data, "IMAGES", (3, 1, 2))
    monkeypatch.setattr(dense_data, "SIZE", 48)


@pytest.fixture
def stamps(tmp_path):
    """Four cut-outs of each category, and one photograph without alpha."""
    rng = np.random.default_rng(0)
    for category in (*dense_data.CLASSES.values(), "animals/fish"):
        folder = tmp_path / "stamps" / category
        folder.mkdir(parents=True)
        for k in range(4):
            pixels = np.zeros((30, 30, 4), np.uint8)
            pixels[5:25, 5:25, :3] = rng.integers(0, 255, (5, 5, 3)).repeat(4, 0).repeat(4, 1)
            pixels[5:25, 5:25, 3] = 255
            Image.fromarray(pixels).save(folder / f"{k}.png")
    Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8)).save(tmp_path / "stamps/town/roadsigns/full.png")
    return tmp_path / "stamps"


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "mvtb_data-9.9.dist-info").mkdir(parents=True)
    text = "Metadata-Version: 2.1\nName: mvtb-data\nVersion: 9.9\n"
    (site / "mvtb_data-9.9.dist-info" / "METADATA").write_text(text)
    rng = np.random.default_rng(1)
    for place in dense_data.PLACES:
        for pattern in place:
            path = site / "mvtbdata" / "images" / pattern.replace("**", "holdout").replace("*", "1").replace("?", "1")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(path)
    flower = site / "mvtbdata" / "images" / "flowers1.png"
    Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(flower)
    monkeypatch.syspath_prepend(str(site))


def test_composite_is_made_once_of_the_right_parts(stamps, photographs):
    folder = dense_data.composite(stamps)
    rows = list(dense_data.rows(folder))
    assert [row[:2] for row in rows] == [("train", 3), ("val", 1), ("test", 2)]
    assert {row[3] for row in rows} == {"48 x 48"}
    text = (folder.root / "sources.json").read_text()
    assert "flowers1" not in text
    assert "fish" not in text
    assert "full.png" not in text
    sources = json.loads(text)
    assert sum(len(part["backgrounds"]) for part in sources.values()) == len(dense_data.PLACES)
    assert all(sum(len(part["cutouts"][name]) for part in sources.values()) == 4 for name in dense_data.CLASSES)
    assert "GPL-2" in (folder.root / "README.md").read_text()
    assert dense_data.composite(Path("nowhere")) == folder


def test_composite_without_its_parts(stamps, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no Tux Paint stamps.*tuxpaint-stamps-default"):
        dense_data.composite(tmp_path / "nowhere")

    def absent(name: str):
        raise dense_data.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(dense_data.importlib.metadata, "distribution", absent)
    with pytest.raises(DataError, match="pip install mvtb-data"):
        dense_data.composite(stamps)
