"""Layouts of labelled videos, and what is refused before a run starts; videos that nobody opens are empty files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from clips import truncate, write_video
from refold.errors import DataError
from refold.video import VideoSet, find_videos, load_videos


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def labelled(part: VideoSet | None) -> list[tuple[str, str]]:
    """(file name, class) of every video."""
    assert part is not None
    assert part.classes is not None
    pairs = zip(part.paths, part.targets.tolist(), strict=True)
    return sorted((Path(path).name, part.classes[target]) for path, target in pairs)


def complaint(root: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_videos(root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_per_class(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{k}.mp4" for name in ("run", "walk") for k in range(10)), "run/notes.txt", "run/.x.avi")
    parts = load_videos(tmp_path, fractions=(0.5, 0.3, 0.2), seed=1)
    assert parts.classes == ["run", "walk"]
    assert parts.mirrored
    sets = [part for part in (parts.train, parts.val, parts.test) if part is not None]
    assert [len(part) for part in sets] == [10, 6, 4]
    assert [part.targets.bincount().tolist() for part in sets] == [[5, 5], [3, 3], [2, 2]]
    assert len({path for part in sets for path in part.paths}) == 20


def test_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.mp4", "train/b/2.webm", "val/a/3.avi", "test/b/4.mkv", "test/b/deep/5.MOV")
    parts = load_videos(tmp_path)
    assert labelled(parts.train) == [("1.mp4", "a"), ("2.webm", "b")]
    assert labelled(parts.val) == [("3.avi", "a")]
    assert labelled(parts.test) == [("4.mkv", "b"), ("5.MOV", "b")]


def test_folders_that_are_refused(tmp_path: Path) -> None:
    assert "no such" in complaint(tmp_path / "nowhere")
    touch(tmp_path, "a/1.mp4", "b/2.txt")
    assert "holds no video" in complaint(tmp_path)
    touch(tmp_path, "b/2.mp4", "3.mp4")
    assert "'3.mp4'" in complaint(tmp_path)
    touch(tmp_path, "sets/train/a/1.mp4", "sets/val/c/1.mp4")
    assert "'c'" in complaint(tmp_path / "sets")


# -- Kinetics -----------------------------------------------------------------------------------------------------


def kinetics(path: Path, rows: Iterable[tuple[str, str, int, int, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
        writer.writerows(rows)


def test_kinetics(tmp_path: Path) -> None:
    kinetics(
        tmp_path / "annotations/train.csv",
        [("abseiling", "-3B32lodo2M", 59, 69, "train"), ("zumba", "b_-", 0, 10, "train")],
    )
    kinetics(tmp_path / "annotations/val.csv", [("zumba", "c", 123456, 123466, "val")])
    touch(
        tmp_path,
        "train/abseiling/-3B32lodo2M_000059_000069.mp4",
        "train/b_-_000000_000010.mp4",
        "val/c_123456_123466.mkv",
    )
    parts = load_videos(tmp_path, fractions=(1.0, 0.0, 0.0))
    assert parts.classes == ["abseiling", "zumba"]
    assert labelled(parts.train) == [("-3B32lodo2M_000059_000069.mp4", "abseiling"), ("b_-_000000_000010.mp4", "zumba")]
    assert labelled(parts.val) == [("c_123456_123466.mkv", "zumba")]
    assert parts.test is None


def test_kinetics_in_one_file(tmp_path: Path) -> None:
    rows = [("a", "1", 0, 10, "train"), ("b", "2", 0, 10, "train"), ("a", "3", 0, 10, "validate")]
    kinetics(tmp_path / "k.csv", rows)
    touch(tmp_path, *(f"{k}_000000_000010.mp4" for k in (1, 2, 3)))
    parts = load_videos(tmp_path / "k.csv")
    assert (len(parts.train), labelled(parts.val)) == (2, [("3_000000_000010.mp4", "a")])


def test_videos_of_kinetics_disappear(tmp_path: Path) -> None:
    rows = [("a", "1", 0, 10, "train"), ("a", "2", 0, 10, "train"), ("b", "3", 0, 10, "train")]
    kinetics(tmp_path / "train.csv", rows)
    for name in ("1", "3"):
        write_video(tmp_path / f"{name}_000000_000010.mp4", 3)
    text = complaint(tmp_path)
    assert "1 of its 3 videos" in text
    assert "2_000000_000010" in text
    assert "train.csv, row 3" in text
    pytest.importorskip("av")
    parts = load_videos(tmp_path, skip_bad_images=True, fractions=(1.0, 0.0, 0.0))
    assert [name for name, _ in parts.skipped] == ["2_000000_000010"]
    assert len(parts.train) == 2


def test_kinetics_that_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1_000000_000010.mp4", "2_000000_000010.mp4", "x/1_000000_000010.webm")
    kinetics(tmp_path / "train.csv", [("a", "1", 0, 10, "train"), ("b", "2", 0, 10, "train")])
    assert "is there twice" in complaint(tmp_path)
    (tmp_path / "x/1_000000_000010.webm").unlink()
    kinetics(tmp_path / "val.csv", [("c", "2", 0, 10, "val")])
    assert "'c'" in complaint(tmp_path)
    kinetics(tmp_path / "val.csv", [("", "2", 0, 10, "val")])
    assert "val.csv, row 2" in complaint(tmp_path)
    kinetics(tmp_path / "val.csv", [("a", "2", 0, 10, "holdout")])
    assert "'holdout'" in complaint(tmp_path)


# -- lists --------------------------------------------------------------------------------------------------------


def test_lists(tmp_path: Path) -> None:
    touch(tmp_path, "v/1.mp4", "v/two words.mp4", "v/3.mp4")
    (tmp_path / "train.csv").write_text(f"{tmp_path}/v/1.mp4 0\nv/two words.mp4 1\n")  # as VideoMAE has them
    (tmp_path / "val.csv").write_text("v/3.mp4 1\n")
    parts = load_videos(tmp_path)
    assert parts.classes == ["0", "1"]
    assert labelled(parts.train) == [("1.mp4", "0"), ("two words.mp4", "1")]
    assert labelled(parts.val) == [("3.mp4", "1")]


def test_named_lists_lie_anywhere(tmp_path: Path) -> None:
    touch(tmp_path, "v/a/1.mp4", "v/b/2.mp4", "v/b/3.mp4")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "kinetics_train_videos.txt").write_text("a/1.mp4 0\nb/2.mp4 1\n")
    (lists / "kinetics_val_videos.txt").write_text("b/3.mp4 1\n")
    parts = load_videos(
        tmp_path / "v", train=lists / "kinetics_train_videos.txt", val=lists / "kinetics_val_videos.txt"
    )
    assert labelled(parts.train) == [("1.mp4", "0"), ("2.mp4", "1")]
    assert labelled(parts.val) == [("3.mp4", "1")]


def test_tables(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "2.mp4", "3.mp4")
    (tmp_path / "train.csv").write_text("path,label\n1.mp4,up\n2.mp4,down\n")
    (tmp_path / "test.csv").write_text("path,label\n3.mp4,up\n")
    parts = load_videos(tmp_path, fractions=(1.0, 0.0, 0.0))
    assert labelled(parts.test) == [("3.mp4", "up")]
    (tmp_path / "test.csv").write_text("path,target\n3.mp4,0.5\n")
    assert "one class each" in complaint(tmp_path)


def test_lists_that_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "2.mp4")
    (tmp_path / "train.txt").write_text("1.mp4 0\n3.mp4 1\n")
    assert "train.txt, line 2" in complaint(tmp_path)
    (tmp_path / "train.txt").write_text("1.mp4 0\n2.mp4 2\n")
    assert "1 of 3 classes have no training video, for example '1'" in complaint(tmp_path)
    (tmp_path / "train.txt").write_text("1.mp4 zero\n")
    assert "line 1" in complaint(tmp_path)


# -- Something-Something v2 ---------------------------------------------------------------------------------------


def something(root: Path, *, prefix: str = "", train: Any = None, labels: Any = None) -> None:
    entries = [
        {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
        {"id": "42326", "label": "pushing cup left", "template": "Pushing [something] from left to right"},
    ]
    content = {
        "labels": labels or {"Pushing something from left to right": "0", "Holding something": "1"},
        "train": entries if train is None else train,
        "validation": [{"id": 9, "template": "Holding [something]"}],
        "test": [{"id": "10"}],
    }
    root.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (root / f"{prefix}{name}.json").write_text(json.dumps(data))


@pytest.mark.parametrize(("folder", "prefix"), [(".", ""), ("labels", ""), (".", "something-something-v2-")])
def test_something_something(tmp_path: Path, folder: str, prefix: str) -> None:
    something(tmp_path / folder, prefix=prefix)
    touch(tmp_path, *(f"20bn-something-something-v2/{name}.webm" for name in (78687, 42326, 9, 10)))
    parts = load_videos(tmp_path, fractions=(1.0, 0.0, 0.0))
    assert parts.classes == ["Pushing something from left to right", "Holding something"]  # in the order of labels.json
    assert not parts.mirrored
    assert labelled(parts.train) == [
        ("42326.webm", "Pushing something from left to right"),
        ("78687.webm", "Holding something"),
    ]
    assert labelled(parts.val) == [("9.webm", "Holding something")]
    assert parts.test is None


def test_something_that_is_refused(tmp_path: Path) -> None:
    something(tmp_path)
    touch(tmp_path, "v/78687.webm", "v/9.webm")
    assert "'42326'" in complaint(tmp_path)
    touch(tmp_path, "v/42326.webm")
    something(tmp_path, train=[{"id": "78687", "template": "Eating [something]"}])
    assert "'Eating something' is not in labels.json" in complaint(tmp_path)
    something(tmp_path, train=[{"id": "78687", "template": "Holding [something]"}])
    assert "no training video, for example 'Pushing" in complaint(tmp_path)
    something(tmp_path, train={})
    assert "train.json" in complaint(tmp_path)
    something(tmp_path, labels={"Holding something": "0", "Pushing something from left to right": "2"})
    assert "labels.json" in complaint(tmp_path)
    something(tmp_path)
    (tmp_path / "train.json").unlink()
    assert "train.json" in complaint(tmp_path)


# -- HMDB51 -------------------------------------------------------------------------------------------------------


def hmdb(root: Path) -> None:
    for name in ("brush_hair", "cartwheel"):
        touch(root, *(f"{name}/{name}_{k}.avi" for k in range(4)))
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(exist_ok=True)
    for fold, digits in ((1, "1120"), (2, "2110"), (3, "1210")):
        for name in ("brush_hair", "cartwheel"):
            lines = (f"{name}_{k}.avi {digit} " for k, digit in enumerate(digits))  # a space follows, as published
            (lists / f"{name}_test_split{fold}.txt").write_text("\n".join(lines) + "\n")


def test_hmdb(tmp_path: Path) -> None:
    hmdb(tmp_path)
    for fold, train, test in ((1, (0, 1), 2), (2, (1, 2), 0), (3, (0, 2), 1)):
        parts = load_videos(tmp_path, fold=fold, fractions=(1.0, 0.0, 0.0))
        assert labelled(parts.train) == [(f"{n}_{k}.avi", n) for n in ("brush_hair", "cartwheel") for k in train]
        assert labelled(parts.test) == [(f"{n}_{test}.avi", n) for n in ("brush_hair", "cartwheel")]
        assert parts.val is None
    drawn = load_videos(tmp_path, fractions=(0.5, 0.5, 0.0))  # validation out of training alone
    assert [len(part or ()) for part in (drawn.train, drawn.val, drawn.test)] == [2, 2, 2]


def test_hmdb_that_is_refused(tmp_path: Path) -> None:
    hmdb(tmp_path)
    assert "fold" in complaint(tmp_path, fold=4)
    (tmp_path / "cartwheel/cartwheel_0.avi").unlink()
    assert "'cartwheel_0'" in complaint(tmp_path)
    hmdb(tmp_path)
    listed = tmp_path / "testTrainMulti_7030_splits/cartwheel_test_split1.txt"
    listed.write_text("cartwheel_0.avi 1\ncartwheel_1.avi 3\n")
    assert "line 2" in complaint(tmp_path)
    listed.write_text("cartwheel_0.avi 1\n")
    assert "no test video" in complaint(tmp_path)
    listed.unlink()
    assert "cartwheel_test_split1.txt is missing" in complaint(tmp_path)


# -- files that cannot be read, and files without labels ----------------------------------------------------------


def test_bad_videos_are_left_out_and_listed(tmp_path: Path) -> None:
    pytest.importorskip("av")
    for name in ("a", "b"):
        for k in range(3):
            write_video(tmp_path / f"{name}/{k}.mkv", 12)
    short = truncate(tmp_path / "a/0.mkv", 0.8)
    parts = load_videos(tmp_path, skip_bad_images=True, fractions=(1.0, 0.0, 0.0))
    assert len(parts.train) == 6
    ((path, reason),) = parts.skipped
    assert path == str(short)
    assert "truncated" in reason
    for k in range(3):
        (tmp_path / f"b/{k}.mkv").write_text("none")
    assert "no video of class 'b'" in complaint(tmp_path, skip_bad_images=True)


def test_videos_to_predict(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "a/b/2.avi", "a/3.jpg", "4.mkv")
    paths, skipped = find_videos([tmp_path / "4.mkv", tmp_path / "a"])
    assert [Path(path).name for path in paths] == ["4.mkv", "1.mp4", "2.avi"]
    assert not skipped
    with pytest.raises(DataError, match="no readable video"):
        find_videos(tmp_path / "a/b" / "..", skip_bad_images=True)
