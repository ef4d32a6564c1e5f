"""Synthetic motions: each clip moves as its class says, seen by an independent look at its pixels."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import refold
from refold.video.decoding import open_video
from refold.video.motions import MOTIONS, View, make_motions, render, view_path

pytest.importorskip("av")
SIZE, FRAMES = 32, 6


def photograph(path, seed: int) -> str:
    """Smooth noise: structure everywhere, at no scale of its own."""
    noise = torch.rand(1, 3, 24, 30, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise, size=(240, 300), mode="bicubic").clamp(0, 1)
    Image.fromarray((255 * pixels[0].permute(1, 2, 0)).byte().numpy()).save(path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motions")
    footage = {
        split: [photograph(folder / f"{split}{i}.png", 10 * n + i) for i in range(2)]
        for n, split in enumerate(("train", "val", "test"))
    }
    root = make_motions(footage, folder / "set", clips=(20, 10, 10), frames=FRAMES, size=SIZE, seed=3)
    return folder, footage, root


def test_the_layout_is_folders_of_classes_of_equal_size_and_footage(made):
    _, footage, root = made
    told = json.loads((root / "motions.json").read_text())["clips"]
    for split, each in (("train", 2), ("val", 1), ("test", 1)):
        assert {folder.name: len(list(folder.glob("*.mp4"))) for folder in (root / split).iterdir()} == dict.fromkeys(
            MOTIONS, each
        )
        names = {path.rpartition("/")[2] for path in footage[split]}
        assert {row["footage"] for row in told if row["file"].startswith(split)} <= names
    train = Counter((row["motion"], row["footage"]) for row in told if row["file"].startswith("train"))
    assert set(train.values()) == {1}  # each class from each photograph equally often
    with open_video(str(root / told[0]["file"])) as video:
        assert video.read(range(len(video))).shape == (FRAMES, 3, SIZE, SIZE)
    splits = refold.video.load_videos(root)
    assert splits.classes == sorted(MOTIONS)


def test_the_same_seed_gives_the_same_clips(made, tmp_path):
    _, footage, root = made
    options = {"clips": (20, 10, 10), "frames": FRAMES, "size": SIZE}
    again = make_motions(footage, tmp_path / "again", seed=3, **options)
    assert (again / "motions.json").read_bytes() == (root / "motions.json").read_bytes()
    other = make_motions(footage, tmp_path / "other", seed=4, **options)
    assert (other / "motions.json").read_text() != (root / "motions.json").read_text()

    def pixels(folder):
        with open_video(str(folder / "test/pan_left/0000.mp4")) as video:
            return video.read(range(FRAMES))

    assert torch.equal(pixels(again), pixels(root))
    assert not torch.equal(pixels(other), pixels(root))


#: Class -> how points of the scene move in the picture, at (right, down) from its middle; rates a frame.
FLOWS = {
    "pan_left": lambda x, y: (2.0, 0.0),  # the camera goes left, so that things go right
    "pan_right": lambda x, y: (-2.0, 0.0),
    "pan_up": lambda x, y: (0.0, 2.0),
    "pan_down": lambda x, y: (0.0, -2.0),
    "zoom_in": lambda x, y: (0.1 * x, 0.1 * y),  # things grow
    "zoom_out": lambda x, y: (-0.1 * x, -0.1 * y),
    "turn_left": lambda x, y: (-0.06 * y, 0.06 * x),  # a camera turning counter-clockwise sees things turn clockwise
    "turn_right": lambda x, y: (0.06 * y, -0.06 * x),
    "still": lambda x, y: (0.0, 0.0),
}


def moved(frame: np.ndarray, flow) -> np.ndarray:
    """The frame with its points moved, by nearest pixels; what comes from outside is NaN."""
    side = len(frame)
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    middle = (side - 1) / 2
    dx, dy = flow(columns - middle, rows - middle)
    from_x, from_y = np.rint(columns - dx).astype(int), np.rint(rows - dy).astype(int)
    inside = (from_x >= 0) & (from_x < side) & (from_y >= 0) & (from_y < side)
    result = np.full(frame.shape, np.nan)
    result[inside] = frame[from_y[inside], from_x[inside]]
    return result


@pytest.mark.parametrize("motion", sorted(FLOWS))
@pytest.mark.parametrize(("whole", "extent"), [(False, (142, 176)), (True, (28, 34))])
def test_things_move_as_the_class_says(motion, whole, extent):
    draw = np.random.default_rng(5)
    noise = torch.rand(1, 3, 18, 22, generator=torch.Generator().manual_seed(1))
    footage = 255 * torch.nn.functional.interpolate(noise, size=extent, mode="bicubic").clamp(0, 1)
    clip = render(footage, view_path(motion, 8, extent, 64, 0.0, draw, whole), 64).float().mean(1).numpy()
    errors = {
        name: np.nanmean([(moved(a, flow) - b) ** 2 for a, b in itertools.pairwise(clip)])
        for name, flow in FLOWS.items()
    }
    assert min(errors, key=errors.get) == motion


def test_a_shaking_view_goes_nowhere_and_a_still_one_stays():
    columns = {}
    for motion in ("shake", "still", "pan_left"):
        paths = [view_path(motion, 16, (220, 220), 100, 0.0, np.random.default_rng(seed)) for seed in range(20)]
        columns[motion] = np.array([[exposure[0].x for exposure in path] for path in paths])
    ways = {motion: found[:, -1] - found[:, 0] for motion, found in columns.items()}
    assert not np.diff(columns["still"]).any()
    assert np.abs(np.diff(columns["shake"])).mean() > 5  # pixels from frame to frame
    assert abs(ways["shake"].mean()) < 10  # there and back
    assert ways["pan_left"].max() < -30  # one way only, at least 0.3 sides of 110 pixels


def test_a_motion_and_its_opposite_go_the_same_ways():
    pairs = (("pan_left", "pan_right"), ("zoom_in", "zoom_out"), ("turn_left", "turn_right"))
    for (one, other), (whole, extent) in itertools.product(pairs, ((False, (220, 300)), (True, (40, 54)))):
        forth, back = (view_path(m, 5, extent, 100, 0.0, np.random.default_rng(9), whole) for m in (one, other))
        for here, there in zip(forth, reversed(back), strict=True):
            values = [(v.x, v.y, v.side, v.angle) for v in (here[0], there[0])]
            np.testing.assert_allclose(values[0], values[1], rtol=1e-9)


def test_a_view_is_the_square_it_says():
    rows, columns = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    footage = torch.stack((columns, rows, torch.zeros_like(rows)))[None]
    (frame,) = render(footage, [[View(x=30, y=20, side=16, angle=0)]], 16)
    assert frame[0, 0].tolist() == list(range(22, 38))  # columns 22 to 37 are the 16 around 30
    assert frame[1, :, 0].tolist() == list(range(12, 28))
    (turned,) = render(footage, [[View(x=30, y=20, side=16, angle=90)]], 16)
    assert turned[1, 0].tolist() == list(range(12, 28))  # right of a camera turned clockwise is down
    assert turned[0, :, 0].tolist() == list(range(37, 21, -1))


def test_exposure_blurs_along_the_way():
    edge = torch.zeros(1, 3, 70, 70)
    edge[..., 35:] = 255
    path = [[View(x=35 + dx, y=35, side=32, angle=0) for dx in (-2, -1, 0, 1, 2)]]
    (frame,) = render(edge, path, 32)
    assert frame[0, 0, 13:19].tolist() == [0, 51, 102, 153, 204, 255]  # the edge at five places, on average


def test_whole_footage_is_a_picture_before_grey():
    (frame,) = render(torch.full((1, 3, 8, 12), 255.0), [[View(x=6, y=4, side=20, angle=0)]], 20)
    expected = torch.full((20, 20), 114)
    expected[6:14, 4:16] = 255
    assert frame[0].tolist() == expected.tolist()


@pytest.mark.parametrize("motion", sorted(MOTIONS))
def test_whole_footage_stays_in_view(motion):
    for seed, (size, extent) in enumerate(30 * [(100, (54, 54)), (100, (35, 54)), (100, (54, 44)), (16, (9, 9))]):
        footage = torch.full((1, 3, *extent), 255.0)
        path = view_path(motion, 4, extent, size, 0.5, np.random.default_rng(seed), whole=True)
        areas = (render(footage, path, 100)[:, 0].float() - 114).sum((1, 2)) / (255 - 114)
        sides = torch.tensor([np.mean([view.side for view in exposure]) for exposure in path])
        assert (areas / (extent[0] * extent[1] * (100 / sides) ** 2)).min() > 0.99


def test_square_footage_is_made_whole(tmp_path):
    """Its tilted corners reach furthest: no draw may leave it without room."""
    footage = {}
    for split in ("train", "val", "test"):
        Image.new("RGB", (90, 90), "white").save(tmp_path / f"{split}.png")
        footage[split] = [tmp_path / f"{split}.png"]
    root = make_motions(footage, tmp_path / "set", clips=(600, 10, 10), frames=2, size=16, whole=True)
    told = json.loads((root / "motions.json").read_text())
    assert told["whole"] is True
    assert len(told["clips"]) == 620


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clips": (20, 5, 10)}, "are not multiples of the 10 classes"),
        ({"size": 33}, "an even size"),
        ({"shutter": 2.0}, r"a shutter in \[0, 1\]"),
        ({"frames": 1}, "2 frames or more"),
    ],
)
def test_bad_settings_are_refused(made, tmp_path, change, message):
    _, footage, _ = made
    options = {"clips": (20, 10, 10), "frames": FRAMES, "size": SIZE} | change
    with pytest.raises(refold.DataError, match=message):
        make_motions(footage, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_footage_must_be_there_long_enough_and_in_one_split(made, tmp_path):
    _, footage, root = made
    for broken, message in (
        ({**footage, "test": []}, "test: has no footage"),
        ({**footage, "test": footage["train"]}, "is footage of both train and test"),
        ({**footage, "test": [tmp_path / "none.png"]}, "no such footage"),
        ({**footage, "test": [root / "val/still/0000.mp4"]}, "has 6 frames, fewer than a clip's 8"),
    ):
        with pytest.raises(refold.DataError, match=message):
            make_motions(broken, tmp_path / "new", clips=(10, 10, 10), frames=8, size=SIZE)
    with pytest.raises(refold.DataError, match="is there already"):
        make_motions(footage, root, clips=(10, 10, 10), frames=FRAMES, size=SIZE)


@pytest.mark.parametrize("motion", sorted(MOTIONS))
def test_no_view_leaves_the_footage(motion):
    size = 50
    for seed in range(200):
        frames, shutter = (2, 1.0) if seed % 2 else (16, 0.5)
        path = view_path(motion, frames, (110, 110), size, shutter, np.random.default_rng(seed))
        for view in itertools.chain.from_iterable(path):
            turn = np.radians(view.angle)
            corners = [
                (x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn))
                for x in (-view.side / 2, view.side / 2)
                for y in (-view.side / 2, view.side / 2)
            ]
            assert all(-1e-9 <= view.x + x <= 110 + 1e-9 and -1e-9 <= view.y + y <= 110 + 1e-9 for x, y in corners)
