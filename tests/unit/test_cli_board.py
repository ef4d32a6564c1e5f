"""Where many trainings stand, on a terminal and in a log."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from commands import run
from refold.cli.board import board
from refold.report.grids import Grid
from sweep_runs import dark_and_bright


@dataclass(frozen=True)
class Standing:
    name: str
    status: str
    epochs: int = 0
    planned: int = 10


def grid(rows: Sequence[Standing]) -> Grid:
    cells = tuple((row.name, row.status) for row in rows)
    return Grid(f"{len(rows)} trainings", ("name", "state"), cells, 1)


def line(one: Standing) -> str:
    return f"{one.name}: {one.status}"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refold.cli.board.console", Console(force_terminal=True, width=120))


def test_a_log_has_a_line_for_each_that_ended_and_nothing_twice() -> None:
    out = io.StringIO()
    with redirect_stdout(out), board(grid, line) as tell:
        tell(Standing("a", "finished", 10))
        tell(Standing("b", "waiting"))
        tell(Standing("a", "finished", 10))
        tell(Standing("b", "running", 3))
        tell(Standing("b", "stopped", 3))
        tell(Standing("b", "running", 4))
        tell(Standing("b", "failed", 4))
    assert out.getvalue().splitlines() == ["a: finished", "b: stopped", "b: failed"]


@pytest.mark.usefixtures("terminal")
def test_a_terminal_has_a_bar_of_all_epochs_and_the_table() -> None:
    """Epochs that were done before are on the bar; what failed is not waited for."""
    out = io.StringIO()
    with redirect_stdout(out), board(grid, line) as tell:
        tell(Standing("a", "finished", 10))
        tell(Standing("b", "waiting", 4))
        tell(Standing("c", "waiting"))
        tell(Standing("b", "running", 5))
        tell(Standing("c", "failed", 2))
    last = out.getvalue()[out.getvalue().rindex("epochs") :]
    assert "17/22" in last
    assert "3 trainings" in last
    assert "failed" in last


@pytest.mark.usefixtures("terminal")
def test_a_sweep_shows_every_trial_from_the_start(tmp_path: Path) -> None:
    dark_and_bright(tmp_path / "photos", 12)
    done = run(
        *("sweep", "photos", "--model", "timm/test_vit", "--random-weights", "--image-size", "32", "--epochs", "2"),
        *("--batch-size", "4", "--split", "8", "8", "8", "--grid", "lr=1e-4,1e-2", "-o", "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Trials: 2 waiting" in done.stdout or "Trials: 1 running, 1 waiting" in done.stdout
    assert "4/4" in done.stdout
    assert "Trials: 2 finished" in done.stdout
