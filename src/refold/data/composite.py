"""Labelled scenes made of real parts: cut-outs with an alpha channel, pasted on photographs.

Dwibedi et al., "Cut, Paste and Learn" (arXiv 1708.01642): every pixel comes from a photograph or drawing, every label
is exact, and a seed decides all. The scenes are not natural, and results on them should be called what they are.

* An image is a square crop of a photograph with a few objects on it: each at random turned, mirrored, scaled, shifted
  in colour and placed, its alpha edge softened by less than a pixel so that no hard seam gives it away.
* Masks and boxes are those of what stays visible. An object that would be hidden beyond a limit, by the frame or by
  later ones, or would hide an earlier one that far, is drawn anew: so nothing on an image lacks its label.
* No file is used in two splits, neither cut-out nor photograph: the test split measures new objects in new places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from refold.data.coco_files import SPLITS, AnnotatedImage, DenseFolder, Instance, new_folder
from refold.data.decoding import decode
from refold.data.parallel import for_each
from refold.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["compose"]

_T = TypeVar("_T")

_SHARES = (0.60, 0.15, 0.25)  # of the cut-outs of each class and of the photographs, by split
_WITH_ALPHA = ("PNG", "WEBP", "GIF", "TIFF")  # Pillow's formats that may have an alpha channel
_OPAQUE = 128  # alpha from which on a pixel belongs to the object
_ENLARGED = 2.0  # a cut-out is never shown larger than this: it would be blurred
_SOFTENED = 0.7  # standard deviation of the edge's blur, in pixels; more would fade thin legs and stalks
_CROP = (0.4, 1.0)  # side of the crop of a photograph, as a share of the shorter side
_TRIES = 20  # poses drawn for an object before there is no room for it
_MOST_CLASSES = 254  # 0 is the background, 255 is left to "ignore"


class _Settings(NamedTuple):
    size: int
    seed: int
    objects: tuple[int, int]
    scale: tuple[float, float]
    rotation: float
    hidden: float
    jitter: float


class _Sources(NamedTuple):
    """What one split is made of: files by class, and groups of photographs."""

    cutouts: dict[str, list[str]]
    backgrounds: list[list[str]]


def compose(
    cutouts: str | Path | Mapping[str, Sequence[str | Path]],
    backgrounds: Sequence[str | Path | Sequence[str | Path]],
    output: str | Path,
    *,
    images: tuple[int, int, int] = (800, 100, 200),
    size: int = 320,
    seed: int = 0,
    objects: tuple[int, int] = (1, 5),
    scale: tuple[float, float] = (0.2, 0.5),
    rotation: float = 30.0,
    hidden: float = 0.5,
    jitter: float = 0.15,
    licence: str = "not stated",
) -> DenseFolder:
    """Write a data set of composites with boxes, instance masks and semantic masks; see :mod:`refold.data.coco_files`.

    ``sources.json`` beside it names the files that each split is made of: 60 % of the cut-outs of each class and of
    the photographs are for training, 15 % for validation, 25 % for the test, at least one each. The same arguments
    and files give the same bytes, with the same versions of Pillow and NumPy.

    Args:
        cutouts: files with an alpha channel by class, in the order of their indices; or a folder of class folders.
        backgrounds: photographs. A sequence among them holds photographs of one place, which stay in one split; each
            place is drawn as often as any other.
        output: the folder to make.
        images: how many for training, validation and test; a zero leaves the split out.
        size: height and width of the images, in pixels.
        seed: 0 or more.
        objects: the least and the most on an image (fewer where no room is left).
        scale: the least and the most of an object's longer side, as a share of ``size``; drawn evenly in its
            logarithm, and never more than twice the cut-out's own.
        rotation: degrees, the most to either side.
        hidden: share of an object's pixels that the frame and other objects may hide.
        jitter: relative change, at most, of brightness, contrast and each colour.
        licence: of the parts, for ``README.md``.

    Raises:
        DataError: arguments out of range, ``output`` exists, too few files for the splits, one file twice, a cut-out
            without alpha, or a file that is no image.
    """
    settings = _Settings(size, seed, objects, scale, rotation, hidden, jitter)
    _check(settings, images)
    by_class = _by_class(cutouts)
    groups = [[str(one)] if isinstance(one, str | Path) else [str(path) for path in one] for one in backgrounds]
    _refuse_twins([*(path for paths in by_class.values() for path in paths), *(p for group in groups for p in group)])
    used = [split for split, count in zip(SPLITS, images, strict=True) if count]
    sources = _divided(by_class, groups, used, seed)
    with new_folder(Path(output)) as folder:
        for split in used:
            _write_split(folder, split, images[SPLITS.index(split)], sources[split], settings)
        folder.write_notes(list(by_class), _readme(images, settings, licence))
        named = {split: one._asdict() for split, one in sources.items()}
        (folder.root / "sources.json").write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")
    return DenseFolder(Path(output))


# --- what it is made of ----------------------------------------------------------------------------------


def _check(settings: _Settings, images: Sequence[int]) -> None:
    """Raise DataError for the first argument out of range."""
    low, high = settings.scale
    rules = {
        "images": (len(images) == 3 and min(images) >= 0 and sum(images) > 0, "three counts, not all zero"),
        "size": (settings.size >= 16, "16 pixels or more"),
        "seed": (settings.seed >= 0, "0 or more"),
        "objects": (0 <= settings.objects[0] <= settings.objects[1] <= 200, "the least and the most, at most 200"),
        "scale": (0 < low <= high <= 2, "the least and the most, above 0 and at most 2"),
        "rotation": (0 <= settings.rotation <= 180, "0 to 180 degrees"),
        "hidden": (0 <= settings.hidden < 1, "a share below 1"),
        "jitter": (0 <= settings.jitter < 1, "a share below 1"),
    }
    for name, (holds, range_) in rules.items():
        if not holds:
            value = images if name == "images" else getattr(settings, name)
            raise DataError(f"{value!r} is out of range: must be {range_}", where=name)


def _by_class(cutouts: str | Path | Mapping[str, Sequence[str | Path]]) -> dict[str, list[str]]:
    if isinstance(cutouts, str | Path):
        if not Path(cutouts).is_dir():
            raise DataError("there is no such folder of cut-outs", where=str(cutouts))
        folders = sorted(path for path in Path(cutouts).iterdir() if path.is_dir() and path.name[0] != ".")
        suffixes = {f".{name.lower()}" for name in _WITH_ALPHA}
        cutouts = {
            folder.name: sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
            for folder in folders
        }
    if not 0 < len(cutouts) <= _MOST_CLASSES:
        raise DataError(f"{len(cutouts)} classes of cut-outs: must be 1 to {_MOST_CLASSES}", where="cutouts")
    return {name: [str(path) for path in paths] for name, paths in cutouts.items()}


def _refuse_twins(paths: Sequence[str]) -> None:
    """One picture under two names could be learned in one split and tested in another."""
    seen: dict[bytes, str] = {}
    for path in paths:
        try:
            content = hashlib.sha256(Path(path).read_bytes()).digest()
        except OSError as error:
            raise DataError(f"the file cannot be read ({error.strerror})", where=path) from error
        twin = seen.setdefault(content, path)
        if twin is not path:
            raise DataError(f"is the same picture as {twin}", where=path, remedy="List it once")


def _divided(
    by_class: Mapping[str, list[str]], groups: list[list[str]], splits: Sequence[str], seed: int
) -> dict[str, _Sources]:
    rng = np.random.default_rng((seed, len(SPLITS)))  # images take (seed, 0 to 2, number)
    cutouts = {name: _parts(paths, splits, rng, f"class {name!r}", "cut-outs") for name, paths in by_class.items()}
    places = _parts([group for group in groups if group], splits, rng, "backgrounds", "places")
    return {
        split: _Sources({name: sorted(parts[split]) for name, parts in cutouts.items()}, places[split])
        for split in splits
    }


def _parts(
    items: Sequence[_T], splits: Sequence[str], rng: np.random.Generator, where: str, what: str
) -> dict[str, list[_T]]:
    """``items`` at random in disjoint parts, by split; the first gets what rounding leaves."""
    if len(items) < len(splits):
        reason = f"{len(items)} {what} cannot be held apart in {len(splits)} splits"
        raise DataError(reason, where=where, remedy="Give more, or fewer splits")
    shares = np.array([_SHARES[SPLITS.index(split)] for split in splits])
    counts = np.maximum(1, np.round(len(items) * shares / shares.sum())).astype(int)
    counts[0] = len(items) - counts[1:].sum()
    order = rng.permutation(len(items))
    ends = np.cumsum([0, *counts])
    parts = {split: [items[k] for k in order[a:b]] for split, a, b in zip(splits, ends, ends[1:], strict=False)}
    assert counts[0] > 0
    assert sorted(ends) == list(ends)  # stretches of one permutation, one after the other: disjoint
    return parts


def _readme(images: Sequence[int], settings: _Settings, licence: str) -> str:
    counts = ", ".join(f"{count} {split}" for count, split in zip(images, SPLITS, strict=True))
    return f"""# Composites

Made, not photographed: cut-outs pasted on photographs by `refold.data.composite.compose`, {counts}.
The splits share no cut-out and no photograph; `sources.json` names the files.

Licence of the parts, and so of these images: {licence}.

Settings: {json.dumps(settings._asdict())}
"""


# --- images ----------------------------------------------------------------------------------------------


def _write_split(folder: DenseFolder, split: str, count: int, sources: _Sources, settings: _Settings) -> None:
    from PIL import Image

    folder.images(split).mkdir(parents=True)
    folder.masks(split).mkdir(parents=True)
    studio = _Studio(sources, settings)
    done: dict[int, AnnotatedImage] = {}
    class_of = np.zeros(256, np.uint8)

    def make(i: int) -> None:
        rng = np.random.default_rng((settings.seed, SPLITS.index(split), i))
        scene, owner, labels = studio.scene(rng)
        name = f"{i:06}"
        scene.save(folder.images(split) / f"{name}.jpg", quality=92)
        lookup = class_of.copy()
        lookup[1 : len(labels) + 1] = labels
        Image.fromarray(lookup[owner]).save(folder.masks(split) / f"{name}.png")
        objects = [Instance.of_mask(label, owner == number) for number, label in enumerate(labels, start=1)]
        done[i] = AnnotatedImage(f"{name}.jpg", settings.size, settings.size, objects)

    for_each(make, count, f"composing {split}")
    folder.write_annotations(split, list(sources.cutouts), [done[i] for i in range(count)])


class _Studio:
    """Draws scenes from the sources of one split; what it has decoded it keeps, at the size that is needed."""

    def __init__(self, sources: _Sources, settings: _Settings) -> None:
        self.settings = settings
        self.classes = list(sources.cutouts.values())
        self.places = sources.backgrounds
        self.kept: dict[str, Image.Image] = {}

    def scene(self, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, list[int]]:
        """An image, the number of the object seen at each pixel (0 is none), and the objects' labels."""
        s = self.settings
        scene = self._background(rng)
        owner = np.zeros((s.size, s.size), np.uint8)
        labels, whole = [], [0]  # pixels of each object were nothing hidden; 0 for the background
        for _ in range(int(rng.integers(s.objects[0], s.objects[1] + 1))):
            label = int(rng.integers(len(self.classes))) + 1
            files = self.classes[label - 1]
            cutout = self._cutout(files[rng.integers(len(files))])
            for _ in range(_TRIES):
                image, corner = self._posed(cutout, rng)
                here, pixels = _placed(image, corner, s.size)
                left = np.bincount(owner[~here], minlength=len(whole))  # of the earlier objects
                left[0] = 0
                if here.sum() >= max(1, (1 - s.hidden) * pixels) and (left >= (1 - s.hidden) * np.array(whole)).all():
                    scene.paste(image, corner, image.getchannel("A"))
                    labels.append(label)
                    whole.append(pixels)
                    owner[here] = len(labels)
                    break
        return scene, owner, labels

    def _background(self, rng: np.random.Generator) -> Image.Image:
        from PIL import Image

        place = self.places[rng.integers(len(self.places))]
        path = place[rng.integers(len(place))]
        photograph = self.kept.get(path)
        if photograph is None:
            photograph = decode(path, 3)
            shrink = int(min(photograph.size) * _CROP[0] / self.settings.size)
            photograph = self.kept[path] = photograph.reduce(shrink) if shrink > 1 else photograph
        width, height = photograph.size
        side = min(width, height) * rng.uniform(*_CROP)
        x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
        size = (self.settings.size, self.settings.size)
        crop = photograph.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
        return _recoloured(_mirrored(crop, rng), rng, self.settings.jitter)

    def _cutout(self, path: str) -> Image.Image:
        """The cut-out (RGBA), cut at its outline and no larger than it is ever shown."""
        if path not in self.kept:
            image = _opened(path)
            most = max(1, round(self.settings.scale[1] * self.settings.size))
            image.thumbnail((most, most))
            self.kept[path] = image
        return self.kept[path]

    def _posed(self, cutout: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int]]:
        """The cut-out scaled, turned and coloured, and where its left upper corner comes."""
        from PIL import Image, ImageChops, ImageFilter, ImageOps

        s = self.settings
        longer = s.size * float(np.exp(rng.uniform(*np.log(s.scale))))
        factor = min(longer / max(cutout.size), _ENLARGED)
        width, height = (max(1, round(side * factor)) for side in cutout.size)
        image = _mirrored(cutout.resize((width, height), Image.Resampling.BICUBIC), rng)
        image = ImageOps.expand(image, 2, (0, 0, 0, 0))  # so that the edge of the file is softened too
        image = image.rotate(rng.uniform(-s.rotation, s.rotation), Image.Resampling.BICUBIC, expand=True)
        image = _recoloured(image, rng, s.jitter)
        alpha = image.getchannel("A")
        # Inwards only: outside of the outline lie colours that nobody was meant to see.
        image.putalpha(ImageChops.darker(alpha, alpha.filter(ImageFilter.GaussianBlur(_SOFTENED))))
        x, y = rng.uniform(0, s.size, 2)
        return image, (round(x - image.width / 2), round(y - image.height / 2))


def _opened(path: str) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path, formats=_WITH_ALPHA) as file:
            transparent = file.has_transparency_data
            image = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"the cut-out cannot be decoded ({error})", where=path, remedy="Repair or remove it") from error
    box = image.getchannel("A").point([255 * (alpha >= _OPAQUE) for alpha in range(256)]).getbbox()
    if not transparent or box is None:
        reason = "has no alpha channel, so nothing is cut out" if not transparent else "is transparent everywhere"
        raise DataError(reason, where=path, remedy="Remove it from the cut-outs")
    return image.crop(box)


def _placed(image: Image.Image, corner: tuple[int, int], size: int) -> tuple[np.ndarray, int]:
    """Which pixels of the scene (size, size) the object takes, and how many it has with those outside."""
    mask = np.asarray(image.getchannel("A")) >= _OPAQUE
    scene = np.zeros((size, size), bool)
    left, top = corner
    seen = mask[max(0, -top) : max(0, size - top), max(0, -left) : max(0, size - left)]
    y, x = max(0, top), max(0, left)
    scene[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    return scene, int(mask.sum())


def _mirrored(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    from PIL import Image

    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _recoloured(image: Image.Image, rng: np.random.Generator, jitter: float) -> Image.Image:
    """Contrast about mid-grey, brightness, and each colour a little by itself; alpha stays."""
    contrast, brightness, *colours = 1 + rng.uniform(-jitter, jitter, 5) * [1, 1, 0.5, 0.5, 0.5]
    levels = np.arange(256)
    table: list[Any] = []
    for colour in colours:
        table += np.clip(np.round(((levels - 128) * contrast + 128) * brightness * colour), 0, 255).astype(int).tolist()
    return image.point(table + levels.tolist() if image.mode == "RGBA" else table)
