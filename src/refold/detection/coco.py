"""COCO's JSON: images, categories and annotations in one file, beside a folder of images.

``{"images": [{"id", "file_name", "height", "width"}], "categories": [{"id", "name"}], "annotations": [{"image_id",
"category_id", "bbox": [x, y, width, height], "area", "iscrowd", "segmentation"}]}``. Ids may have gaps; labels 1, 2,
... are the categories in the order of their ids. ``area``, ``iscrowd`` and, for boxes alone, ``segmentation`` may be
absent. What is none of this is ignored.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from refold.detection.boxes import BoxSet, Object, Tally, check_sizes, finite_box
from refold.detection.masks import area_of, parse_segmentation
from refold.errors import DataError

__all__ = ["read_coco"]


def read_coco(path: str | Path, images: str | Path | None = None, *, masks: bool = False) -> BoxSet:
    """The images and objects of one COCO file; images without annotation are negatives.

    Everything is checked now: all images are there and have the size stated (their headers are read), every
    annotation is sound. Boxes that reach out of their image are clipped; those wholly outside, or without area, are
    dropped; one warning counts them. Crowd regions stay, marked as ignored.

    Args:
        path: the JSON file.
        images: folder that file names are relative to; None is the folder of the JSON file.
        masks: read ``segmentation`` too; each annotation must have one.

    Raises:
        DataError: a file that cannot be read or is malformed, with the place; an image that is missing or of another
            size than stated; an id of a category or image that is not listed, or listed twice; no annotation at all.
        MissingExtraError: ``masks``, and faster-coco-eval is not installed.
    """
    path = Path(path)
    where = str(path)
    content = _load(path)
    listed, categories, annotations = (_entries(content, key, where) for key in ("images", "categories", "annotations"))
    category_ids = _ids(categories, "categories", where)
    categories = sorted(categories, key=lambda one: one["id"])  # the same labels whatever the file's order
    category_ids.sort()
    names = [str(_value(one, "name", f"{where}, category {one['id']}")) for one in categories]
    _no_double(names, "the category name", where)
    image_ids = _ids(listed, "images", where)
    label_of = {id_: k for k, id_ in enumerate(category_ids, start=1)}
    row_of = {id_: k for k, id_ in enumerate(image_ids)}
    places = [f"{where}, image {id_}" for id_ in image_ids]
    folder = Path(images) if images is not None else path.parent
    files = [_file(folder, _value(one, "file_name", place), place) for one, place in zip(listed, places, strict=True)]
    stated = [_stated_size(one, place) for one, place in zip(listed, places, strict=True)]
    if not annotations:
        raise DataError("has no annotations", where=where, remedy="Annotate, or name another file")
    sizes = check_sizes(files, stated, [where] * len(files))
    objects: list[list[Object]] = [[] for _ in files]
    tally = Tally(where)
    for number, one in enumerate(annotations):
        place = f"{where}, annotation {one.get('id', f'at position {number}')}"
        row = _known(row_of, _value(one, "image_id", place), "image", place)
        label = _known(label_of, _value(one, "category_id", place), "category", place)
        usable = tally.usable(_object(one, label, sizes[row], masks, place), *sizes[row])
        if usable is not None:
            objects[row].append(usable)
    tally.warn()
    result = BoxSet(files, sizes, objects, classes=names, category_ids=category_ids, image_ids=image_ids, source=where)
    if not result.count():
        raise DataError("has no annotation that can be learned from", where=where)
    return result


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path)) from error
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise DataError(f"is no JSON ({error.msg})", where=where) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"is no JSON ({error})", where=str(path)) from error
    if not isinstance(content, dict):
        raise DataError(
            "is no COCO annotation file: its top level is no object",
            where=str(path),
            remedy="A file of results is a list; name the file of annotations",
        )
    return content


def _entries(content: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise DataError(f"is no COCO annotation file: {key!r} is no list of objects", where=where)
    if key != "annotations" and not entries:
        raise DataError(f"lists no {key}", where=where)
    return entries


def _value(entry: dict[str, Any], key: str, place: str) -> Any:
    if key not in entry:
        raise DataError(f"lacks {key!r}", where=place)
    return entry[key]


def _ids(entries: list[dict[str, Any]], key: str, where: str) -> list[int]:
    ids = [_value(one, "id", f"{where}, {key}[{k}]") for k, one in enumerate(entries)]
    for k, id_ in enumerate(ids):
        if not isinstance(id_, int) or isinstance(id_, bool):
            raise DataError(f"the id {id_!r} is no whole number", where=f"{where}, {key}[{k}]")
    _no_double(ids, f"in {key}, the id", where)
    return ids


def _no_double(values: list[Any], what: str, where: str) -> None:
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise DataError(f"{what} {value!r} is there {times} times", where=where)


def _known(table: dict[int, int], id_: Any, what: str, place: str) -> int:
    if not isinstance(id_, int) or id_ not in table:
        raise DataError(f"names the {what} {id_!r}, which the file does not list", where=place)
    return table[id_]


def _file(folder: Path, name: Any, place: str) -> str:
    if not isinstance(name, str) or not name or not (folder / name).is_file():
        raise DataError(
            f"there is no image {str(folder / str(name))!r}",
            where=place,
            remedy="Name the folder that file names are relative to, or remove the entry",
        )
    return str(folder / name)


def _stated_size(entry: dict[str, Any], place: str) -> tuple[int, int] | None:
    if entry.get("height") is None and entry.get("width") is None:
        return None
    height, width = entry.get("height"), entry.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        raise DataError(f"height {height!r} and width {width!r} are no whole numbers", where=place)
    return height, width


def _object(entry: dict[str, Any], label: int, size: tuple[int, int], masks: bool, place: str) -> Object:
    try:
        x, y, width, height = finite_box(_value(entry, "bbox", place))
        area = float(entry.get("area") or 0.0)
    except (TypeError, ValueError) as error:
        raise DataError(f"is malformed ({error})", where=place) from error
    rle = None
    if masks:
        try:
            rle = parse_segmentation(entry.get("segmentation"), *size)
        except ValueError as error:
            raise DataError(
                f"has no usable mask: {error}", where=place, remedy="Repair it, or train on boxes alone"
            ) from error
        area = area or float(area_of(rle))
    return Object((x, y, x + width, y + height), label, bool(entry.get("iscrowd", 0)), area or width * height, rle)
