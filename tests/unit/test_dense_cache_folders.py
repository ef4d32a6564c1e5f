"""Folders of cached features: taken up again, refused where stale, mended where damaged, and of a known size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import refold
from cached import (
    COUNT,
    NAMES,
    SIZE,
    SIZES,
    Counted,
    make_adapted,
    make_views,
)
from refold.dense import Encoder
from refold.dense import records as records_module
from refold.dense.cache import CachedEncoder, estimate, identify
from refold.errors import DataError, StoreError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of Swin under E3VA, with records of all."""
    path = tmp_path / "cache"
    encoder = make_adapted("swin", refold.E3VA(rank=3))
    with CachedEncoder(encoder, NAMES, SIZES, folder=path, pixels={"seed": 0}).serving([(k, 0) for k in range(COUNT)]):
        encoder(make_views()[0][:, 0])
    return path


def _open(folder: Path, encoder: Encoder | None = None, **changes: Any) -> CachedEncoder:
    arguments = {"images": NAMES, "sizes": SIZES, "pixels": {"seed": 0}, **changes}
    return CachedEncoder(encoder or make_adapted("swin", refold.E3VA(rank=3)), folder=folder, **arguments)


def test_another_run_takes_records_up(folder):
    """Of another rank, which reads the same."""
    encoder = make_adapted("swin", refold.E3VA(rank=5))
    cached = _open(folder, encoder)
    counted, keys = Counted(encoder.body), [(2, 0), (0, 0)]
    with torch.no_grad(), cached.serving(keys, blank=True):
        found = encoder(torch.zeros(2, 3, SIZE, SIZE))
    assert counted.images == 0
    with torch.no_grad():
        expected = encoder.eval()(make_views()[0][[2, 0], 0])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def _one_weight(encoder: Encoder) -> None:
    parameter = next(p for p in encoder.body.parameters() if not p.requires_grad)
    parameter.data.view(-1)[1] *= 1.0001


def _many_weights(encoder: Encoder) -> None:
    encoder.body.get_parameter("layers_0.blocks.0.norm1.weight").data *= 2


def _setting(encoder: Encoder) -> None:
    attention: Any = encoder.body.get_submodule("layers_1.blocks.0.attn")
    attention.scale *= 9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": [*NAMES[:2], "another", NAMES[3]]}, "image 2 has another content"),
        ({"images": NAMES[:3], "sizes": SIZES[:3]}, "4 images, not 3"),
        ({"sizes": [*SIZES[:3], (96, 96)]}, r"image 3 at \[64, 64\], not \[96, 96\]"),
        ({"pixels": {"seed": 1}}, "seed 0, not 1"),
        ({"pixels": {"seed": 0, "augment": "flip"}}, "augment None, not flip"),
        ({"views": 2}, "1 views of image 0, not 2"),
        ({"dtype": "float32"}, "dtype bfloat16, not float32"),
    ],
)
def test_a_stale_folder_is_refused(change, reason, folder):
    before = (folder / "features.bin").read_bytes()
    with pytest.raises(StoreError, match=f"its features are of something else: {reason}"):
        _open(folder, **change)
    assert (folder / "features.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_one_weight, "the backbone, whose weights differ a little"),
        (_many_weights, "the backbone, layers_0.blocks.0.norm1.weight has other values"),
        (_setting, "a backbone of the same weights that computes something else"),
    ],
)
def test_a_folder_of_another_backbone_is_refused(change, reason, folder):
    encoder = make_adapted("swin", refold.E3VA(rank=3))
    change(encoder)
    with pytest.raises(StoreError, match=reason):
        _open(folder, encoder)


def test_a_folder_of_another_way_to_read_is_refused(folder):
    for method in (refold.E3VA(rank=3, tap="stream"), refold.E3VA(rank=3, start="stem"), refold.LinearProbe()):
        with pytest.raises(StoreError, match="its features are of something else: reads"):
            _open(folder, make_adapted("swin", method))
    with pytest.raises(StoreError, match=r"precision torch\.float32, not autocast"), torch.autocast("cpu"):
        _open(folder)


def test_what_is_no_folder_of_features_is_refused(folder):
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "format": 2}))
    with pytest.raises(StoreError, match="is of format 2, not 1"):
        _open(folder)
    for content in ("", "[]", "{}", '{"format": 1}'):
        (folder / "header.json").write_text(content)
        with pytest.raises(StoreError, match="holds no features"):
            _open(folder)
    (folder / "header.json").write_text(json.dumps(header))
    with (folder / "features.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(StoreError, match="not as long as they were made"):
        _open(folder)


def test_a_damaged_record_is_made_again(folder):
    content = bytearray((folder / "features.bin").read_bytes())
    content[len(content) // COUNT + 7] ^= 1  # in the second record
    (folder / "features.bin").write_bytes(content)
    encoder = make_adapted("swin", refold.E3VA(rank=3))
    cached, keys = _open(folder, encoder), [(k, 0) for k in range(COUNT)]
    assert cached.missing(keys) == [(1, 0)]
    counted = Counted(encoder.body)
    with cached.serving(keys):
        encoder(make_views()[0][:, 0])
    assert counted.images == 1
    content[len(content) // COUNT + 7] ^= 1
    assert (folder / "features.bin").read_bytes() == content


def test_an_image_is_known_by_its_content(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"one")
    shutil.copy(a, b)
    c.write_bytes(b"two")
    one, same, other = identify([a, b, c])
    assert one == same != other
    with pytest.raises(DataError, match="cannot be read"):
        identify([tmp_path / "none"])


# -- size ---------------------------------------------------------------------------------------------------------


def test_the_size_is_known_before_anything_is_written(tmp_path, monkeypatch):
    """Two taps a block and a read-out a stage, of (SIZE / stride)^2 tokens; the probe keeps the maps alone."""
    encoder = make_adapted("swin", refold.E3VA(rank=3))
    stages = zip((1, 2, 1, 1), (16, 32, 64, 128), (4, 8, 16, 32), strict=True)
    each = sum((2 * depth + 1) * width * (SIZE // stride) ** 2 for depth, width, stride in stages)
    found = estimate(encoder, SIZES, views=3)
    assert (found.each, found.total) == (2 * each, 2 * each * COUNT * 3)
    assert estimate(encoder, SIZES, dtype="float32").each == 4 * each
    probe = estimate(make_adapted("swin", refold.LinearProbe()), SIZES)
    assert probe.each == 2 * sum(w * (SIZE // s) ** 2 for w, s in zip((16, 32, 64, 128), (4, 8, 16, 32), strict=True))

    folder = tmp_path / "cache"
    space = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space._replace(free=found.total - 1))
    with pytest.raises(StoreError, match="are free"):
        _open(folder, encoder, views=3)
    monkeypatch.setattr(records_module, "free_memory", lambda: float(found.total - 1))
    with pytest.raises(DataError, match="of memory are free"):
        CachedEncoder(encoder, NAMES, SIZES, views=3)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space._replace(free=found.total))
    assert _open(folder, encoder, views=3).estimate == found
    assert (folder / "features.bin").stat().st_size == found.total
    assert (folder / "features.bin").stat().st_blocks * 512 >= found.total  # taken, not a file with a hole
    assert sorted(tmp_path.iterdir()) == [folder]
