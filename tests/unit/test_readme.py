"""What the README shows must run, and its results must be those of the benchmarks' files."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refold.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    written = re.findall(r"refold\.save(?:_peft)?\(\w+, \"(.*?)\"\)", code)
    assert written
    for path in (tmp_path / name for name in written):
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        assert sum(file.stat().st_size for file in files) > 1000


@pytest.mark.parametrize("line", re.findall(r"^\$ refold (.*?)(?:\s{2,}#.*)?$", README, re.MULTILINE))
def test_commands_exist_with_their_options(line: str) -> None:
    for command in line.replace("refold ", "").split(";"):
        name, *words = command.split()
        help_text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert "Example" in help_text
        for option in [word for word in words if word.startswith("-")]:
            assert option in help_text, f"refold {name} has no {option}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\$ make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_results_are_those_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_readme", ROOT / "benchmarks" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_readme", module)
    spec.loader.exec_module(module)
    assert module.render() in README


def test_every_method_is_in_the_table() -> None:
    from refold import METHODS

    for name in METHODS:
        assert f"| `{name}` |" in README
