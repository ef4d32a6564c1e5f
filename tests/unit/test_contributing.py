"""The example of CONTRIBUTING.md works as it stands there, and adding it takes one file and one line."""

from __future__ import annotations

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
#: First line of a block, a comment that says where it goes -> the block without it.
BLOCKS = dict(re.findall(r"```python\n# (.*?)\n(.*?)```", TEXT, re.DOTALL))
NEW, LISTED = "src/refold/methods/gate.py", "src/refold/methods/shelf.py"

#: The example against its formula, in float64 and on a convolutional backbone too.
CHECK = """
import copy
import torch, timm, refold
from pathlib import Path
from refold.methods import METHODS

assert Path(refold.__file__).is_relative_to({root!r}), refold.__file__
assert list(METHODS)[-1] == "Gate" and refold.Gate is METHODS["Gate"]
for name, layer in (("test_vit", "blocks.0.mlp.fc2"), ("test_convnext", "stages.0.blocks.0.mlp.fc2")):
    model = timm.create_model(name, num_classes=2).double().eval()
    plain = copy.deepcopy(model)
    refold.attach(model, refold.Gate())
    with torch.no_grad():
        for key, value in refold.trainable_parameters(model).items():
            value.add_(0.1 * torch.randn_like(value))
    gates = model.get_submodule(layer).refold.default.gates.detach().clone()
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:], dtype=torch.float64)
    adapted = model(x)
    refold.merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)
    weight = plain.get_submodule(layer).weight @ torch.diag(gates)
    torch.testing.assert_close(model.get_submodule(layer).weight, weight, rtol=1e-12, atol=1e-12)
"""


def sources(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted((root / "src").rglob("*.py"))}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with the example in them."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (root / NEW).write_text(BLOCKS[NEW])
    (root / LISTED).write_text((root / LISTED).read_text() + BLOCKS[LISTED])
    return root


def test_it_takes_one_new_file_and_one_line(copy):
    before, after = sources(ROOT), sources(copy)
    assert after.keys() - before.keys() == {NEW}
    assert before.keys() <= after.keys()
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [LISTED]
    lines = difflib.ndiff(before[LISTED].splitlines(), after[LISTED].splitlines())
    assert [line for line in lines if line[0] in "+-"] == [f"+ {BLOCKS[LISTED].strip()}"]


def test_it_attaches_trains_and_merges(copy):
    """First as printed, then against its formula."""
    program = BLOCKS["try it"] + CHECK.replace("{root!r}", repr(str(copy)))
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_in_the_house_style(copy):
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(copy / NEW)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# -- the map ------------------------------------------------------------------------------------------------------


def levels() -> dict[str, int]:
    """File or folder of src/refold -> the number of its line in the map."""
    listing = re.search(r"## The map.*?```\n(.*?)```", TEXT, re.DOTALL)
    assert listing is not None
    names: dict[str, int] = {}
    for number, line in enumerate(li for li in listing[1].splitlines() if not li.startswith(" ")):
        listed = re.match(r"\w+/?(?:, \w+/?)*", line)
        assert listed is not None
        names |= {name.rstrip("/"): number for name in listed[0].split(", ")}
    return names


def unit(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "refold").parts[0].removesuffix(".py")


def test_the_map_has_every_file():
    found = {unit(path) for path in (ROOT / "src" / "refold").rglob("*.py")} - {"__init__"}
    assert set(levels()) == found


def test_a_file_imports_only_from_above():
    known, wrong = levels(), []
    for path in (ROOT / "src" / "refold").rglob("*.py"):
        if unit(path) == "__init__":
            continue
        for node in ast.parse(path.read_text()).body:  # not what is imported on use, or for types alone
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("refold"):
                continue
            parts = (node.module or "").split(".")[1:2]
            for name in parts or [alias.name for alias in node.names]:
                if known.get(name, 0) > known.get(unit(path), 0):
                    wrong.append(f"{path.name} imports {name}")
    assert wrong == []
