"""From an image file to 8-bit pixels: one rule for every mode, one error for every broken file.

Decoding, with Pillow:

* EXIF orientation is applied; of an animation, the first frame counts.
* Palette, CMYK and other colour images become RGB, or luminance where one channel is asked for.
* Transparency of any kind is composited on white. (Dropping alpha, as ``convert("RGB")`` does, would show the
  colours that encoders happen to leave under transparent pixels.)
* 16-bit grey (modes ``I;16*`` and ``I``) is scaled by its bit depth, 65535 to 255, never by the image's own maximum:
  brightness stays comparable between images. 32-bit values beyond that range, and floats, have no known white:
  they are refused.

Resizing is Pillow's, antialiased, and equals torchvision's and timm's evaluation transforms bit for bit.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from refold.errors import DataError
from refold.preprocessing import Preprocessing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["EXTENSIONS", "MODES", "Rendering", "decode", "read_size", "render"]

MODES = {1: "L", 3: "RGB"}
"""Pillow mode by number of channels."""

EXTENSIONS = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm"}
    | {".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""Suffixes, in lower case, of the files that count as images in a folder."""

# Pixel formats only: others (EPS, PDF, WMF ...) would run an interpreter on a file that nobody vouches for.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
_LEAVE_OUT = "leave such files out with skip_bad_images=True (--skip-bad-images)"
_REMEDY = f"Repair or remove it, or {_LEAVE_OUT}"


class Rendering(NamedTuple):
    """How a decoded image becomes a uint8 array of fixed shape.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 (grey) or 3 (RGB).
        interpolation, crop, crop_fraction: as in :class:`refold.Preprocessing`.
    """

    size: tuple[int, int]
    channels: int = 3
    interpolation: str = "bicubic"
    crop: str = "squash"
    crop_fraction: float = 1.0

    @classmethod
    def of(cls, preprocessing: Preprocessing, channels: int) -> Rendering:
        """What ``preprocessing`` does before normalisation, on ``channels`` channels."""
        p = preprocessing
        return cls(p.size, channels, p.interpolation, p.crop, p.crop_fraction)


def decode(path: str, channels: int, content: bytes | None = None) -> Image.Image:
    """Read one image file as mode ``"L"`` (``channels=1``) or ``"RGB"`` (3).

    Args:
        path: the file, or where ``content`` is from.
        channels: 1 or 3.
        content: the file's bytes, if they are at hand.

    Raises:
        DataError: the file is missing, truncated, not an image, a decompression bomb, or of a pixel type without
            a known range; the message names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path if content is None else BytesIO(content), formats=_formats()) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_8_bit(image, MODES[channels])
    except DataError as error:
        raise DataError(error.reason, where=path, remedy=error.remedy) from None
    except Image.DecompressionBombError as error:
        remedy = f"Shrink it, raise PIL.Image.MAX_IMAGE_PIXELS, or {_LEAVE_OUT}"
        raise DataError(f"the image is too large to be decoded safely ({error})", where=path, remedy=remedy) from error
    except Exception as error:  # Pillow's parsers let through whatever they trip over
        raise DataError(f"the image cannot be decoded ({_first_line(error)})", where=path, remedy=_REMEDY) from error


def read_size(path: str) -> tuple[int, int]:
    """(height, width) of the image that :func:`decode` would return, from the file's header alone.

    Raises:
        DataError: the file is missing or no image that can be read; the message names it.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(path, formats=_formats()) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size
    except Exception as error:
        raise DataError(f"the image cannot be read ({_first_line(error)})", where=path, remedy=_REMEDY) from error
    return (width, height) if turned else (height, width)


def render(image: Image.Image, rendering: Rendering) -> np.ndarray:
    """Resize and cut ``image`` (mode ``L`` or ``RGB``) -> contiguous uint8 array (C, H, W)."""
    import numpy as np
    from PIL import Image

    method = Image.Resampling[rendering.interpolation.upper()]
    height, width = rendering.size
    if rendering.crop == "squash":
        image = image.resize((width, height), method)
    else:
        rows, columns = _covering(image.height, image.width, rendering)
        image = image.resize((columns, rows), method)
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _covering(height: int, width: int, rendering: Rendering) -> tuple[int, int]:
    """The smallest size of the same aspect ratio that covers ``rendering.size / crop_fraction``."""
    least_h, least_w = (int(side / rendering.crop_fraction) for side in rendering.size)
    if least_h * width >= least_w * height:
        return least_h, least_h * width // height
    return least_w * height // width, least_w


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _from_16_bit(image)
    elif image.mode == "F":
        raise DataError("32-bit float pixels have no known white", remedy="Convert the image to 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("integer pixels outside 0 to 65535 have no known white", remedy="Convert the image to 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # rounds value * 255 / 65535


@cache
def _formats() -> tuple[str, ...]:
    """Those of the accepted formats that this build of Pillow knows."""
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
