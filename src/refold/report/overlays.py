"""Predictions and truths drawn on the images they belong to: masks, boxes, contact sheets.

A class has one colour everywhere. Small images are enlarged before anything is drawn, so that lines and names stay
sharp. Names never cover each other: where there is no room a box goes without, and the legend tells its class.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from refold.errors import DataError
from refold.report.figures import blank_figure, drawing_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import ImageFont

__all__ = ["Labels", "class_colours", "contact_sheet", "paint", "palette"]

Labels: TypeAlias = Tensor | Mapping[str, Tensor]
"""A semantic mask (H, W) of class indices, or objects as torchvision's detectors give them: ``boxes`` (N, 4) as x0,
y0, x1, y1 in pixels, ``labels`` (N,), and optionally ``scores`` (N,) and ``masks`` (N, H, W) or (N, 1, H, W)."""

Colour: TypeAlias = tuple[int, int, int]

# Sasha Trubetskoy's list of simple, distinct colours, in an order that keeps the first ones far apart on photographs.
_COLOURS = bytes.fromhex(
    "e6194b 3cb44b ffe119 4363d8 f58231 42d4f4 f032e6 bfef45 911eb4 fabed4 469990 dcbeff 9a6324 fffac8 800000 aaffc3 "
    "808000 ffd8b1 000075"
)
_IGNORED = (0, 0, 0)
_LEAST_SIDE = 480  # shorter side of what is drawn on, in pixels
_LARGEST = 8  # most a tiny image is enlarged
_CELL = 2.4  # inches of a panel of the sheet
_MARGINS = 0.6  # inches of the titles above and the legend below


def palette(count: int) -> list[Colour]:
    """``count`` RGB colours (0 to 255) that can be told apart; the first ones do not depend on ``count``."""
    red, green, blue = _COLOURS[::3], _COLOURS[1::3], _COLOURS[2::3]
    colours = list(zip(red, green, blue, strict=True))[:count]
    for k in range(count - len(colours)):  # further hues by the golden ratio: no two alike, however many
        r, g, b = colorsys.hsv_to_rgb(k * 0.618034 % 1, 0.75, (0.9, 0.65)[k % 2])
        colours.append((round(255 * r), round(255 * g), round(255 * b)))
    return colours


def paint(
    image: Tensor,
    labels: Labels,
    classes: Sequence[str],
    *,
    alpha: float = 0.5,
    threshold: float = 0.5,
    background: int | None = 0,
    ignore_index: int = 255,
    names: bool = True,
) -> Tensor:
    """Draw labels on an image.

    Args:
        image: (3, H, W) or (1, H, W), uint8, or floats from 0 to 1.
        labels: a semantic mask or objects; see :data:`Labels`.
        classes: names by class index.
        alpha: how much of a mask's colour covers the image.
        threshold: objects with a lower score are left out.
        background: the class that is not drawn; None draws all.
        ignore_index: value of a semantic mask that is no class; drawn black.
        names: whether to write class names, and scores where there are any.

    Returns:
        (3, H', W') uint8: the picture, enlarged by a whole number where the shorter side is below 480 pixels.

    Raises:
        DataError: an image or labels of another form, a mask of another size than the image, a label beyond the
            classes.
    """
    picture, factor = _canvas(image)
    look = _Look(classes, class_colours(len(classes), background), alpha, names)
    if isinstance(labels, Tensor):
        mask = _checked_mask(labels, image, len(classes), ignore_index)
        return _paint_mask(picture, mask, factor, look, ignore_index)
    return _paint_objects(picture, _checked_objects(labels, image, len(classes), threshold), factor, look)


def contact_sheet(
    images: Sequence[Tensor],
    classes: Sequence[str],
    *,
    truths: Sequence[Labels] = (),
    predictions: Sequence[Labels] = (),
    threshold: float = 0.5,
    background: int | None = 0,
    columns: int = 6,
) -> Figure:
    """Images with their truths and predictions side by side, and a legend of the classes that occur.

    Args:
        images: each (3, H, W) or (1, H, W), uint8, or floats from 0 to 1.
        classes: names by class index.
        truths: labels of each image, or none at all.
        predictions: likewise.
        threshold: predicted objects with a lower score are left out.
        background: the class that is not drawn; None draws all.
        columns: panels side by side, at most.

    Raises:
        DataError: no image, another number of truths or predictions than of images, or what :func:`paint` refuses.
    """
    given = {"truth": truths, "prediction": predictions}
    for name, labels in given.items():
        if labels and len(labels) != len(images):
            raise DataError(f"{len(labels)} for {len(images)} images", where=f"{name}s")
    if not images:
        raise DataError("no image to draw", where="images")
    panels = ["image", *(name for name, labels in given.items() if labels)]
    beside = min(len(images), max(1, columns // len(panels)))
    rows = -(-len(images) // beside)
    occurring: set[int] = set()
    with drawing_style():
        height = max(image.shape[-2] / image.shape[-1] for image in images) * _CELL
        figure = blank_figure(beside * len(panels) * _CELL, rows * height + _MARGINS)
        cells: Any = figure.subplots(rows, beside * len(panels), squeeze=False)
        for axes in cells.flat:
            axes.set_axis_off()
        for k, image in enumerate(images):
            row, start = k // beside, k % beside * len(panels)
            for panel, axes in zip(panels, cells[row, start : start + len(panels)], strict=True):
                picture = _canvas(image)[0]
                if panel != "image":
                    labels = given[panel][k]
                    options = {"threshold": threshold, "background": background}
                    # The legend names the classes of masks; names on boxes tell them apart where they overlap.
                    picture = paint(image, labels, classes, names=not isinstance(labels, Tensor), **options)
                    occurring |= _present(labels, threshold, background)
                axes.imshow(picture.permute(1, 2, 0).numpy())
                if row == 0 and len(panels) > 1:
                    labels = given[panel][k] if panel in given else {}
                    scored = not isinstance(labels, Tensor) and "scores" in labels
                    axes.set_title(f"{panel}, score ≥ {threshold:.2f}" if scored else panel, loc="left")
        _legend(figure, [k for k in sorted(occurring) if k < len(classes)], classes, background)
        return figure


# --- what is given --------------------------------------------------------------------------------------


def _canvas(image: Tensor) -> tuple[Tensor, int]:
    """The image as (3, H', W') uint8, enlarged by a whole number, and that number."""
    if image.ndim != 3 or image.shape[0] not in (1, 3) or not (image.is_floating_point() or image.dtype == torch.uint8):
        form = f"{tuple(image.shape)} {image.dtype}"
        raise DataError(f"{form} is no image: must be (3, H, W) or (1, H, W), uint8 or floats from 0 to 1")
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    factor = min(_LARGEST, -(-_LEAST_SIDE // min(pixels.shape[1:])))
    if factor > 1:
        large = torch.nn.functional.interpolate(pixels[None].float(), scale_factor=factor, mode="bicubic")[0]
        pixels = large.clamp(0, 255).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).contiguous(), factor


def class_colours(count: int, background: int | None) -> list[Colour | None]:
    """RGB (0 to 255) by class index, as :func:`paint` has them; None for the background."""
    drawn = iter(palette(count))
    return [None if k == background else next(drawn) for k in range(count)]


def _checked_mask(mask: Tensor, image: Tensor, count: int, ignore_index: int) -> Tensor:
    if mask.shape != image.shape[-2:] or mask.is_floating_point():
        form = f"{tuple(mask.shape)} {mask.dtype}"
        raise DataError(f"{form} is no mask of class indices for an image of {tuple(image.shape[-2:])}", where="mask")
    mask = mask.detach().cpu().long()
    _check_labels(mask[mask != ignore_index], count)
    return mask


class _Objects(NamedTuple):
    """On the CPU, the lowest score first."""

    boxes: Tensor
    labels: list[int]
    scores: list[float] | None
    masks: Tensor | None


def _checked_objects(objects: Mapping[str, Tensor], image: Tensor, count: int, threshold: float) -> _Objects:
    missing = [name for name in ("boxes", "labels") if name not in objects]
    if missing:
        raise DataError(f"the objects have no {' and no '.join(missing)}", where="labels")
    parts = {name: objects[name].detach().cpu() for name in ("boxes", "labels", "scores", "masks") if name in objects}
    number = len(parts["labels"])
    for name, tensor in parts.items():
        if len(tensor) != number:
            raise DataError(f"{len(tensor)} {name} for {number} labels", where=name)
    _check_labels(parts["labels"], count)
    scores = parts.get("scores")
    if scores is not None:
        order = scores.argsort(stable=True)
        order = order[scores[order] >= threshold]
        parts = {name: tensor[order] for name, tensor in parts.items()}
    masks = parts.get("masks")
    if masks is not None:
        masks = masks[:, 0] if masks.ndim == 4 else masks
        if masks.shape[1:] != image.shape[-2:]:
            raise DataError(f"{tuple(masks.shape[1:])} for an image of {tuple(image.shape[-2:])}", where="masks")
        masks = masks >= 0.5 if masks.is_floating_point() else masks.bool()
    kept = None if scores is None else parts["scores"].tolist()
    return _Objects(parts["boxes"].float().reshape(-1, 4), parts["labels"].tolist(), kept, masks)


def _check_labels(labels: Tensor, count: int) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= count):
        worst = int(labels.max() if labels.max() >= count else labels.min())
        raise DataError(f"label {worst} is beyond the {count} classes", where="labels")


def _present(labels: Labels, threshold: float, background: int | None) -> set[int]:
    """The class indices that are drawn."""
    if isinstance(labels, Tensor):
        return set(labels.unique().tolist()) - {background}
    found = labels["labels"]
    return set((found[labels["scores"] >= threshold] if "scores" in labels else found).tolist()) - {background}


# --- drawing ---------------------------------------------------------------------------------------------


class _Look(NamedTuple):
    classes: Sequence[str]
    colours: Sequence[Colour | None]
    alpha: float
    names: bool


def _paint_mask(picture: Tensor, mask: Tensor, factor: int, look: _Look, ignore_index: int) -> Tensor:
    found: list[int] = mask.unique().tolist()
    colours = {k: look.colours[k] for k in found if k != ignore_index}
    drawn = {k: colour for k, colour in colours.items() if colour is not None}
    regions = {k: mask == k for k in drawn}
    if (mask == ignore_index).any():
        drawn[ignore_index], regions[ignore_index] = _IGNORED, mask == ignore_index
    picture = _filled(picture, list(regions.values()), [drawn[k] for k in drawn], factor, look.alpha)
    if not look.names:
        return picture
    tags = [
        _Tag(look.classes[k], drawn[k], [_inside(regions[k], factor)], centred=True) for k in drawn if k != ignore_index
    ]
    return _tagged(picture, tags)


def _paint_objects(picture: Tensor, objects: _Objects, factor: int, look: _Look) -> Tensor:
    from torchvision.utils import draw_bounding_boxes

    shades = [look.colours[label] or _IGNORED for label in objects.labels]
    if objects.masks is not None:
        picture = _filled(picture, list(objects.masks), shades, factor, look.alpha)
    boxes = objects.boxes * factor
    sound = [k for k, (x0, y0, x1, y1) in enumerate(boxes.tolist()) if x1 > x0 and y1 > y0]  # others cannot be drawn
    if not sound:
        return picture
    width = max(2, round(min(picture.shape[1:]) / 240))
    picture = draw_bounding_boxes(picture, boxes[sound], colors=[shades[k] for k in sound], width=width)
    if not look.names:
        return picture
    several = len(look.classes) - look.colours.count(None) > 1
    tags = []
    for k in reversed(sound):  # the surest find room first
        words = [look.classes[objects.labels[k]]] if several else []
        words += [] if objects.scores is None else [f"{objects.scores[k]:.2f}"]
        x0, y0, x1, y1 = boxes[k].tolist()
        if words:  # at the left upper corner above the box, below it, at its right end, inside of it
            tags.append(
                _Tag(" ".join(words), shades[k], [(x0, y0, 0, 1), (x0, y1, 0, 0), (x1, y0, 1, 1), (x0, y0, 0, 0)])
            )
    return _tagged(picture, tags)


def _filled(picture: Tensor, masks: Sequence[Tensor], colours: Sequence[Any], factor: int, alpha: float) -> Tensor:
    """Masks (H, W) of the image as it was, drawn with an outline in full colour, so that neighbours stay apart."""
    from torchvision.utils import draw_segmentation_masks

    for mask, colour in zip(masks, colours, strict=True):  # one by one: the later lies on top, none is mixed
        if mask.any():
            large = mask.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            inner = -torch.nn.functional.max_pool2d(-large[None].float(), 5, 1, 2)[0] > 0.5
            picture = draw_segmentation_masks(picture, inner, alpha, [colour])
            picture = draw_segmentation_masks(picture, large & ~inner, 1.0, [colour])
    return picture


def _inside(region: Tensor, factor: int) -> tuple[float, float, float, float]:
    """The region's pixel nearest to its middle, as an anchor of a tag's own middle."""
    places = region.nonzero().float()
    y, x = places[(places - places.mean(0)).square().sum(1).argmin()].tolist()
    return (x + 0.5) * factor, (y + 0.5) * factor, 0.5, 0.5


class _Tag(NamedTuple):
    """Words and where they may go: a point, and which part of the tag (0 to 1 from left and top) lies on it."""

    text: str
    colour: Colour
    anchors: list[tuple[float, float, float, float]]
    centred: bool = False


def _tagged(picture: Tensor, tags: Iterable[_Tag]) -> Tensor:
    """Write each tag at the first of its places that is free; none where none is."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import pil_to_tensor

    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(image)
    font = _font(max(12, round(min(image.size) / 30)))
    taken: list[tuple[float, float, float, float]] = []
    for tag in tags:
        left, top, right, bottom = draw.textbbox((0, 0), tag.text, font=font)
        width, height = right - left + 8, bottom - top + 6
        for x, y, across, down in tag.anchors:
            x0 = min(max(0, x - across * width), max(0, image.width - width))
            y0 = y - down * height
            if tag.centred:
                y0 = min(max(0, y0), max(0, image.height - height))
            box = (x0, y0, x0 + width, y0 + height)
            if y0 < 0 or box[3] > image.height or any(_overlap(box, other) for other in taken):
                continue
            taken.append(box)
            draw.rectangle(box, fill=tag.colour)
            light = sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), tag.colour, strict=True)) > 140
            draw.text((x0 + 4 - left, y0 + 3 - top), tag.text, fill="black" if light else "white", font=font)
            break
    return pil_to_tensor(image)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _legend(figure: Figure, present: Sequence[int], classes: Sequence[str], background: int | None) -> None:
    from matplotlib.patches import Patch

    colours = class_colours(len(classes), background)
    patches = [Patch(facecolor=f"#{bytes(colours[k] or _IGNORED).hex()}", label=classes[k]) for k in present]
    if patches:
        across = max(1, int(figure.get_figwidth() / 1.3))
        figure.legend(handles=patches, loc="outside lower left", ncols=min(len(patches), across))
