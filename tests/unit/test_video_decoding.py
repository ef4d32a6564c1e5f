"""Which frames are taken, and that they are the frames of the file: every frame of these videos says its number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clips import coloured, numbers, seeded, truncate, write_video
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.video import Sampling, VideoSet, Views, open_video
from refold.video.sampling import Clock
from refold.video.transforms import ClipAugmentation, crops_of

pytest.importorskip("av")

#: Container, codec, and what is peculiar about it.
FORMATS = [
    ("a.mp4", "libx264", "yuv420p"),  # frames are not in the order of their decoding
    ("a.mkv", "libx264", "yuv420p"),  # does not know its number of frames
    ("a.webm", "libvpx", "yuv420p"),  # the same, times rounded to milliseconds
    ("a.avi", "mpeg4", "yuv420p"),  # indexed by times of decoding
    ("a.h264", "libx264", "yuv420p"),  # no times at all, cannot seek
    ("odd.mkv", "ffv1", "bgr0"),
    ("ten.mkv", "ffv1", "yuv420p10le"),
    ("grey.mkv", "ffv1", "gray"),
]


def even(count: int, rate: int = 30) -> Clock:
    """The clock of a video of a constant rate."""
    return Clock(np.arange(count), count, Fraction(rate))


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "codec", "pixels"), FORMATS)
def test_every_frame_is_found_by_its_number(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    path = write_video(tmp_path / name, 30, codec=codec, pixels=pixels)
    with open_video(str(path)) as video:
        assert len(video) == 30
        video.check()
        assert numbers(video.read(range(30))) == list(range(30))
        for wanted in ([17], [29, 0, 8, 8], [3, 4, 21], [28, 29]):  # later than the last, and earlier
            frames = video.read(wanted)
            assert numbers(frames) == wanted
    assert frames.shape == (2, 3, 48, 64)
    assert frames.dtype == torch.uint8


def test_only_what_is_needed_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 40, gop=10)
    with open_video(str(path)) as video:
        decoded = []
        numbered = video._numbered
        monkeypatch.setattr(video, "_numbered", lambda frames: numbered(decoded.append(f.pts) or f for f in frames))
        assert numbers(video.read([32])) == [32]
        assert len(decoded) <= 3  # from frame 30 on
        decoded.clear()
        assert numbers(video.read([1, 3, 35])) == [1, 3, 35]
        assert len(decoded) <= 4 + 6


def test_times_of_decoding_are_not_taken_for_those_of_showing(tmp_path: Path) -> None:
    """As in box.mp4 of OpenCV's documentation: a stream with B-frames, and a container with one time a packet."""
    import av

    right, wrong = write_video(tmp_path / "right.mp4", 30, gop=10), tmp_path / "wrong.mp4"
    with av.open(str(right)) as source, av.open(str(wrong), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux() if packet.size]
        first = min(packet.dts or 0 for packet in packets)
        assert any((packet.pts or 0) > (packet.dts or 0) - first for packet in packets)
        for packet in packets:
            packet.pts = packet.dts = (packet.dts or 0) - first
            packet.stream = stream
            target.mux(packet)
    with av.open(str(wrong)) as container:
        shown = [frame.pts for frame in container.decode(video=0)]
    assert shown != sorted(shown)  # what the file says of its frames
    for wanted in ([17], [29, 0, 8, 8], [3, 4, 21], list(range(30))):
        with open_video(str(wrong)) as video:
            assert len(video) == 30
            assert numbers(video.read(wanted)) == wanted
            video.check()
    assert np.array_equal(video.clock.starts, np.arange(30))
    assert float(video.clock.second) == pytest.approx(30, rel=0.05)


def test_a_rotated_video_is_upright(tmp_path: Path) -> None:
    def corner(number: int, size: tuple[int, int]) -> np.ndarray:
        pixels = np.zeros((*size, 3), np.uint8)
        pixels[: size[0] // 2, : size[1] // 2] = 250  # the upper left quarter of what is stored
        return pixels

    path = write_video(tmp_path / "a.mp4", 4, picture=corner, rotation=90)
    with open_video(str(path)) as video:
        frame = video.read([2])[0].float().mean(0)
    assert frame.shape == (64, 48)
    bright = [(y, x) for y in (0, 1) for x in (0, 1) if frame[y * 32 :, x * 24 :][:32, :24].mean() > 200]
    assert bright == [(1, 0)]  # turned by 90 degrees against the clock


def test_frames_of_other_sizes_are_scaled_to_the_first(tmp_path: Path) -> None:
    first = write_video(tmp_path / "a.h264", 5, codec="libx264")
    second = write_video(tmp_path / "b.h264", 5, codec="libx264", size=(96, 128))
    joined = tmp_path / "c.h264"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    with open_video(str(joined)) as video:
        frames = video.read(range(10))
    assert frames.shape == (10, 3, 48, 64)
    assert numbers(frames) == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx")])
def test_truncated_videos_are_refused(tmp_path: Path, name: str, codec: str, share: float) -> None:
    options = {"movflags": "faststart"} if name.endswith("mp4") else None  # the index comes before the frames
    path = write_video(tmp_path / name, 40, codec=codec, options=options)
    short = truncate(path, share)
    with pytest.raises(DataError, match=short.name) as caught, open_video(str(short)) as video:
        video.check()
    assert "skip_bad_images" in str(caught.value)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    index_last = truncate(write_video(tmp_path / "a.mp4"), 0.9)
    for path in (text, empty, index_last, tmp_path / "missing.mp4"):
        with pytest.raises(DataError, match=path.name), open_video(str(path)):
            pass


# -- times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rates_are_sampled_by_time(tmp_path: Path, name: str) -> None:
    times = [*range(0, 1000, 100), *range(1000, 2000, 50)]  # 10 frames in the first second, 20 in the next
    path = write_video(tmp_path / name, 30, rate=20, times=times)  # 20: how long the last one is shown
    with open_video(str(path)) as video:
        clock = video.clock
        # Moments 250, 750, 1250 and 1750 ms: the middles of four quarters.
        assert numbers(video.read(Sampling("uniform", 4).even(clock))) == [2, 7, 15, 25]
        # 6/30 of a second apart, in the middle of the video: 600, 800, 1000 and 1200 ms.
        assert numbers(video.read(Sampling("dense", 4, 6).even(clock))) == [6, 8, 10, 14]
        assert numbers(video.read(Sampling("strided", 4, 6).even(clock))) == [3, 9, 15, 21]


def test_rounded_times_of_a_constant_rate_are_even(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 16)
    with open_video(str(path)) as video:
        assert video._times.tolist()[:4] == [0, 33, 67, 100]
        assert (video.clock.end, video.clock.second) == (16, 30)
        assert Sampling("uniform", 8).even(video.clock) == [1, 3, 5, 7, 9, 11, 13, 15]


def test_rates_other_than_thirty(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 40, rate=15)
    with open_video(str(path)) as video:
        # 8/30 of a second are 4 frames of this video; strided counts frames.
        assert Sampling("dense", 4, 8).even(video.clock) == [12, 16, 20, 24]
        assert Sampling("strided", 4, 8).even(video.clock) == [4, 12, 20, 28]


# -- sampling -----------------------------------------------------------------------------------------------------


def test_uniform_takes_the_middle_of_segments() -> None:
    # mmaction and VideoMAE: int(tick / 2 + tick * x) with tick = N / T
    for count in (8, 9, 37, 300):
        tick = count / 8
        assert Sampling("uniform", 8).even(even(count)) == [int(tick / 2 + tick * k) for k in range(8)]
    assert [Sampling("uniform", 2).even(even(16), c, 2) for c in (0, 1)] == [[2, 10], [6, 14]]


def test_uniform_draws_one_frame_of_each_segment() -> None:
    source, drawn = seeded(0), []
    for _ in range(200):
        frames = Sampling("uniform", 4).random(even(20), source)
        assert [frame // 5 for frame in frames] == [0, 1, 2, 3]
        drawn.append(frames)
    assert {frame for frames in drawn for frame in frames} == set(range(20))


@pytest.mark.parametrize("kind", ["dense", "strided"])
def test_windows(kind: str) -> None:
    sampling = Sampling(kind, 8, 4)
    # 100 frames leave 68 places for a window of 32 to begin after the first.
    assert sampling.even(even(100)) == [34 + 4 * k for k in range(8)]
    starts = [sampling.even(even(100), c, 5)[0] for c in range(5)]
    assert starts == [0, 17, 34, 51, 68]
    source = seeded(0)
    drawn = [sampling.random(even(100), source) for _ in range(2000)]
    assert all(np.diff(frames).tolist() == [4] * 7 for frames in drawn)
    assert {frames[0] for frames in drawn} >= set(range(68))
    assert max(frames[0] for frames in drawn) <= 68


def test_short_videos() -> None:
    assert Sampling("uniform", 8).even(even(3)) == [0, 0, 0, 1, 1, 2, 2, 2]  # int((k + 1/2) 3/8)
    for kind in ("dense", "strided"):
        sampling = Sampling(kind, 4, 4)
        assert sampling.even(even(10)) == [0, 4, 8, 9]  # the last frame, once more
        assert sampling.even(even(10), 2, 3) == [0, 4, 8, 9]
        assert sampling.random(even(10), seeded(3)) == [0, 4, 8, 9]
        assert sampling.even(even(1)) == [0] * 4
    assert Sampling("uniform", 4).random(even(1), seeded(0)) == [0] * 4


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    videos = VideoSet([write_video(tmp_path / "a.mp4", 1)], torch.tensor([0]))
    clips = videos.clips(0, Views(Sampling("dense", 8), clips=2).choose)
    assert clips.shape == (2, 8, 3, 48, 64)


def test_sampling_refuses() -> None:
    refused: list[dict[str, Any]] = [
        {"kind": "sparse"},
        {"frames": 0},
        {"stride": 0},
        {"frames": True},
        {"frames": 10**9},
    ]
    for bad in refused:
        with pytest.raises(DataError):
            Sampling(**bad)
    for bad in ({"clips": 0}, {"crops": 2}, {"clips": 10**9}):
        with pytest.raises(DataError):
            Views(Sampling(), **bad)


# -- transforms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "crop", "crop+flip", "randaugment", "rand-m9-n3-mstd0.5+flip"])
def test_equal_frames_stay_equal(name: str) -> None:
    frame = torch.randint(256, (3, 50, 70), dtype=torch.uint8)
    change = ClipAugmentation(name, Preprocessing(size=(32, 32)))
    results = []
    for seed in range(12):
        clip = change(frame.expand(4, -1, -1, -1), seed)
        assert clip.shape == (4, 3, 32, 32)
        assert clip.dtype == torch.uint8
        assert all(torch.equal(clip[0], other) for other in clip)
        assert torch.equal(clip, change(frame.expand(4, -1, -1, -1), seed))
        results.append(clip[0])
    assert name == "none" or any(not torch.equal(results[0], other) for other in results)


def test_flips_are_asked_for() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(2, 3, 32, 32)
    for name, seen in (("crop", {1}), ("crop+flip", {-1, 1}), ("none+flip", {-1, 1})):
        change = ClipAugmentation(name, Preprocessing(size=(32, 32)))
        clips = [change(ramp, seed).float() for seed in range(20)]
        assert {int((clip[..., -1] - clip[..., 0]).mean().sign()) for clip in clips} == seen
    with pytest.raises(DataError, match="augment"):
        ClipAugmentation("flip", Preprocessing())


def test_evaluation_crops() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(2, 3, 32, 64)
    prep = Preprocessing(size=(32, 32))
    left, centre, right = crops_of(ramp, prep, 3)
    assert [part[0, 0, 0, 0].item() for part in (left, centre, right)] == [0, 16, 32]
    assert torch.equal(crops_of(ramp, prep, 1)[0], centre)
    upright = crops_of(ramp.transpose(-1, -2), prep, 3)
    assert [part[0, 0, 0, 0].item() for part in upright] == [0, 16, 32]
    assert crops_of(ramp, Preprocessing(size=(16, 16)), 3).shape == (3, 2, 3, 16, 16)


def test_pictures_of_videos(tmp_path: Path) -> None:
    videos = VideoSet([write_video(tmp_path / "a.mp4", 8, picture=coloured(250))], torch.tensor([0]))
    (picture,) = videos.read([0], (64, 64))
    assert picture.shape == (3, 64, 64)
    assert picture[0].float().mean() > 200
