"""docs/methods is what the sources say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

import refold

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "methods"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("method_pages")


@pytest.fixture(scope="module")
def rendered(script: ModuleType) -> dict[str, str]:
    return script.render()


def test_there_is_a_page_and_a_picture_for_each_method_and_no_other(script, rendered):
    expected = {f"{name}.{end}" for name in refold.METHODS for end in ("md", "svg")} | {"README.md"}
    assert set(rendered) == expected
    written = {p.name for p in FOLDER.iterdir() if p.suffix == ".svg" or script.MARK in p.read_text()}
    assert written == expected


def test_pages_are_up_to_date_with_the_sources(script, rendered):
    """All but the results, which have a test of their own, so that this one needs none."""
    stale = [
        name
        for name, content in rendered.items()
        if (FOLDER / name).read_text().split(script.RESULTS)[0] != content.split(script.RESULTS)[0]
    ]
    assert stale == [], "run `make docs`"


def test_results_are_those_of_the_benchmark(script, rendered):
    stale = [
        name
        for name, content in rendered.items()
        if (FOLDER / name).read_text().split(script.RESULTS)[1:] != content.split(script.RESULTS)[1:]
    ]
    assert stale == [], "run `make docs`"


def test_without_results_a_page_has_no_such_section(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script.common, "RESULTS", tmp_path)
    assert script._results("LoRA", script._rows()) == ""


def test_results_are_shown_beside_the_linear_probe(script):
    def row(name: str, *accuracy: float) -> dict:
        return {
            "dataset": "elpv",
            "backbone": "a/b",
            "method": name,
            "settings": {"name": name},
            "lr": 0.003,
            "adapter_parameters": 1200,
            "test_accuracy": accuracy,
        }

    told = script._results("LoRA", [row("LoRA", 0.8, 0.82, 0.84), row("LinearProbe", 0.7, 0.7, 0.7)])
    assert "| elpv | a/b | LoRA | 1,200 | 0.003 | 82.0 ± 2.0 | 70.0 ± 0.0 |" in told


@pytest.mark.parametrize("name", refold.METHODS)
def test_a_picture_shows_the_slots_of_the_plan(rendered, name):
    picture = rendered[f"{name}.svg"]
    ElementTree.fromstring(picture)  # well formed
    words = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert (name in words) == ("it adds nothing" not in rendered[f"{name}.md"])
    assert "head" in words


def test_a_picture_puts_adapters_where_they_act(rendered):
    """Left to right in one ViT block: before qkv and fc1 for RepAdapter, behind every operation for SSF."""

    def line(name: str) -> list[str]:
        boxes = re.findall(r'<text x="([\d.]+)" y="100" [^>]*>([^<]*)</text>', rendered[f"{name}.svg"])
        return [word for _, word in sorted((float(x), word) for x, word in boxes)]

    block = ["norm1", "qkv", "proj", "norm2", "fc1", "fc2"]
    assert [w for w in line("LoRA") if w != "head"] == ["patch_embed", *block, "norm"]
    assert line("RepAdapter")[1:-2] == ["norm1", "RepAdapter", "qkv", "proj", "norm2", "RepAdapter", "fc1", "fc2"]
    assert line("SSF")[:-1] == [word for layer in ("patch_embed", *block, "norm") for word in (layer, "SSF")]
