"""Bars of loops that many calls share: one at a time, and only where the caller wants them."""

from __future__ import annotations

from pathlib import Path

import pytest

from refold.training import TrainResult, evaluate, predict, train
from refold.training.progress import counting, show_count, showing
from sweep_runs import dark_and_bright, settings


@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_loop_has_a_bar_where_it_is_wanted(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with showing(wanted), counting("images", total=5) as more:
        for _ in range(3):
            more(2)  # of two processes the last has one image less
    out, err = capsys.readouterr()
    assert out == ""
    assert ("images" in err and "5/5" in err) is (wanted is True)


def test_loops_are_silent_by_themselves_and_in_other_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with counting("images", total=1) as more:
        more()
    with showing(True), counting("images", total=1, main=False) as more:
        more()
    assert capsys.readouterr() == ("", "")


def test_a_loop_inside_another_has_no_bar_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with showing(True), show_count(True, "outer", total=1) as show:
        with counting("inner", total=1) as more:
            more()
        show(1)
    err = capsys.readouterr().err
    assert "outer" in err
    assert "inner" not in err


def test_a_loop_that_fails_leaves_no_bar_and_no_wish(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), showing(True), counting("first", total=2) as more:
        more(1 // 0)
    capsys.readouterr()
    with counting("second", total=1) as more:
        more()
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    root = tmp_path_factory.mktemp("progress")
    return train(settings(dark_and_bright(root / "photos", 16), root / "run", epochs=1))


def test_scoring_and_predicting_show_how_far_they_are(trained: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    photos = Path(trained.output).parent / "photos"
    for call, images in (
        (lambda progress: evaluate(trained.output, progress=progress), 8),
        (lambda progress: predict(trained.output, photos, progress=progress), 32),
    ):
        call(None)
        assert capsys.readouterr() == ("", "")
        call(True)
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{images}/{images}" in err


def test_training_shows_how_far_the_scoring_behind_it_is(
    trained: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(Path(trained.output).parent / "photos", tmp_path / "run", epochs=1), progress=True)
    err = capsys.readouterr().err
    assert err.count("8/8") == 2  # validation and test
