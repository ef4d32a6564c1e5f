"""Every kind of image file, against values worked out by hand; every kind of broken one."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from refold import DataError, Preprocessing
from refold.data.decoding import Rendering, decode, render


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pixels(path: Path, channels: int = 3) -> np.ndarray:
    return np.asarray(decode(str(path), channels))


def stored(path: Path) -> tuple[str, int, dict]:
    """Mode, number of frames and metadata of a file, as Pillow sees them."""
    with Image.open(path) as image:
        return image.mode, getattr(image, "n_frames", 1), image.info


def luminance(rgb: np.ndarray) -> np.ndarray:
    return (rgb.astype(np.float64) @ [0.299, 0.587, 0.114]).round()


# -- modes ------------------------------------------------------------------------------------------------------


def test_rgb_is_unchanged_and_becomes_luminance(tmp_path):
    image = noise(5, 7, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), image)
    grey = pixels(tmp_path / "a.png", channels=1)
    assert grey.shape == (5, 7)
    assert np.abs(grey - luminance(image)).max() <= 1


def test_grey_is_repeated_or_kept(tmp_path):
    image = noise(5, 7)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), np.stack([image] * 3, axis=-1))
    assert np.array_equal(pixels(tmp_path / "a.png", channels=1), image)


def test_bilevel_is_black_and_white(tmp_path):
    image = noise(8, 8) > 127
    Image.fromarray(image).save(tmp_path / "a.png")
    assert stored(tmp_path / "a.png")[0] == "1"
    assert np.array_equal(pixels(tmp_path / "a.png", 1), image * np.uint8(255))


def test_palette(tmp_path):
    image = Image.fromarray(noise(6, 6) % 4)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    image.save(tmp_path / "a.png")
    assert stored(tmp_path / "a.png")[0] == "P"
    colours = np.arange(10, 130, 10, dtype=np.uint8).reshape(4, 3)
    assert np.array_equal(pixels(tmp_path / "a.png"), colours[noise(6, 6) % 4])


@pytest.mark.parametrize("transparency", [bytes([255, 0]), 1], ids=["table", "index"])
def test_palette_with_transparency_lies_on_white(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert np.array_equal(pixels(tmp_path / "a.png"), [[[10, 20, 30], [255, 255, 255]]])


def test_alpha_lies_on_white(tmp_path):
    Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    expected = [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]  # 0.2 * colour + 0.8 * white
    assert np.array_equal(pixels(tmp_path / "a.png"), expected)


def test_grey_alpha_lies_on_white(tmp_path):
    image = Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 51)])
    image.save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png", 1).item() == 224  # 0.2 * 100 + 0.8 * 255


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_colour_key_lies_on_white(tmp_path, mode):
    colour = 7 if mode == "L" else (7, 7, 7)
    Image.new(mode, (2, 2), colour).save(tmp_path / "a.png", transparency=colour)
    assert "transparency" in stored(tmp_path / "a.png")[2]
    assert (pixels(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_by_its_depth(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    assert stored(path)[0] == "I;16"
    expected = np.array([[0, 0, 1, 1, 128, 255]], dtype=np.uint8)  # round(v * 255 / 65535)
    assert np.array_equal(pixels(path, 1), expected)
    assert np.array_equal(pixels(path, 3), np.stack([expected] * 3, axis=-1))


def test_dark_16_bit_image_is_not_stretched(tmp_path):
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png", 1) == 1).all()


def test_big_endian_and_32_bit_integers_within_16_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 257, 65535))
    assert pixels(tmp_path / "a.pgm", 1).tolist() == [[1, 255]]
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif", 1).tolist() == [[0, 255]]


def test_cmyk(tmp_path):
    cmyk = Image.merge("CMYK", [Image.new("L", (1, 1), v) for v in (255, 0, 0, 0)])
    cmyk.save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif").tolist() == [[[0, 255, 255]]]
    cmyk.resize((16, 16)).save(tmp_path / "a.jpg")  # Adobe's inverted CMYK
    assert np.abs(pixels(tmp_path / "a.jpg").astype(int) - [0, 255, 255]).max() < 8


def test_lab(tmp_path):
    Image.new("LAB", (1, 1), (255, 128, 128)).save(tmp_path / "a.tif")
    assert stored(tmp_path / "a.tif")[0] == "LAB"
    assert (pixels(tmp_path / "a.tif") >= 254).all()


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation(tmp_path, orientation, turned):
    image = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), turned(image))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"a{suffix}"
    lossless = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **lossless)
    assert stored(path)[1] == 3
    assert (pixels(path) == [255, 0, 0]).all()


# -- refusals ---------------------------------------------------------------------------------------------------


def complaint(path: Path, channels: int = 3) -> str:
    with pytest.raises(DataError) as caught:
        decode(str(path), channels)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_truncated_files(tmp_path):
    for suffix in (".png", ".jpg", ".bmp", ".tif", ".webp", ".gif"):
        whole = io.BytesIO()
        Image.fromarray(noise(64, 64, 3)).save(whole, {".jpg": "jpeg", ".tif": "tiff"}.get(suffix, suffix[1:]))
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        assert "skip_bad_images" in complaint(path)


def test_damaged_png(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(whole, "png")
    content = bytearray(whole.getvalue())
    content[60:90] = os.urandom(30)
    (tmp_path / "a.png").write_bytes(content)
    assert "cannot be decoded" in complaint(tmp_path / "a.png")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_no_image(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert "cannot be decoded" in complaint(tmp_path / "a.png")


def test_missing_file(tmp_path):
    assert "No such file" in complaint(tmp_path / "gone.png")


def test_formats_that_would_run_an_interpreter_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert "cannot identify image file" in complaint(tmp_path / "a.png")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    message = complaint(tmp_path / "a.png")
    assert "too large" in message
    assert "MAX_IMAGE_PIXELS" in message


def test_bomb_in_a_text_chunk(tmp_path, monkeypatch):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 200_000, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    assert "cannot be decoded" in complaint(tmp_path / "a.png")


def test_values_without_a_known_white(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "f.tif")
    assert "float" in complaint(tmp_path / "f.tif")
    for k, value in enumerate((-1, 65536)):
        Image.fromarray(np.array([[0, value]], dtype=np.int32)).save(tmp_path / f"{k}.tif")
        assert "0 to 65535" in complaint(tmp_path / f"{k}.tif")


# -- resizing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(("height", "width"), [(70, 45), (45, 70), (31, 31), (200, 61)])
@pytest.mark.parametrize(("crop", "fraction"), [("center", 0.875), ("center", 1.0), ("center", 0.9), ("squash", 1.0)])
def test_equals_timms_evaluation_transform(height, width, interpolation, crop, fraction):
    from timm.data.transforms_factory import create_transform

    image = Image.fromarray(noise(height, width, 3))
    reference = create_transform(
        (3, 32, 32), interpolation=interpolation, crop_mode=crop, crop_pct=fraction, use_prefetcher=True
    )(image)
    preprocessing = Preprocessing(size=(32, 32), interpolation=interpolation, crop=crop, crop_fraction=fraction)
    mine = render(image, Rendering.of(preprocessing, channels=3))
    assert torch.equal(torch.from_numpy(mine), reference)  # type: ignore[arg-type]


def test_rectangular_targets_are_covered_and_cut_at_the_centre():
    image = Image.fromarray(noise(40, 100))
    wide = render(image, Rendering((20, 40), 1, "nearest", "center"))
    assert wide.shape == (1, 20, 40)
    expected = np.asarray(image.resize((50, 20), Image.Resampling.NEAREST))[:, 5:45]
    assert np.array_equal(wide[0], expected)
    tall = render(image, Rendering((40, 20), 1, "nearest", "center"))
    assert np.array_equal(tall[0], np.asarray(image)[:, 40:60])


def test_rendered_arrays_are_contiguous():
    assert render(Image.fromarray(noise(9, 8, 3)), Rendering((4, 5))).flags["C_CONTIGUOUS"]
    assert render(Image.fromarray(noise(9, 8)), Rendering((4, 5), 1)).shape == (1, 4, 5)
