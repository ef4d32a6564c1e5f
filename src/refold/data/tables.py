"""CSV files: one label, several labels, or a number for each image.

A header, then one row an image. Rows are counted as lines of the file: the header is row 1.

=============================  ========================================================================
column                         meaning
=============================  ========================================================================
path, image, file, filename    the image, relative to the CSV's folder; the first of these that is there
label                          its class
labels                         its classes, separated by ``;`` or ``|``; may be empty
target                         a number: regression
split (optional)               train, val (valid, validation) or test
none of label, labels, target  at least two other columns, all of zeros and ones: one class a column
=============================  ========================================================================

A column named by the user is read as a number if all its values are numbers and one is no integer, as several labels
if one value has a separator, else as a class.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from refold.data.images import Task
from refold.data.listing import SPLIT_NAMES, WHOLE, Label, Listing, number
from refold.errors import DataError

__all__ = ["read_pairs", "read_table"]

_PATHS = ("path", "image", "file", "filename")
_TASKS: dict[str, Task] = {"label": "classify", "labels": "multilabel", "target": "regress"}
_HELP = "Expected the columns path and one of label, labels, target"


def read_table(path: Path, target: str | None = None) -> dict[str, Listing]:
    """The splits of a CSV file (``.tsv``: separated by tabs), or one undivided listing without a split column.

    Args:
        path: the file.
        target: column of the labels, where it is none of the above or several are there.

    Raises:
        DataError: an unreadable file, or a missing, doubled or contradicting column or value, with its row.
    """
    header, rows = _read(path)
    image = next((name for name in _PATHS if name in header and name != target), None)
    if image is None:
        raise DataError("has no column of image paths", where=str(path), remedy=_HELP)
    places = [f"{path}, row {line}" for line, _ in rows]
    columns = {name: [row[k].strip() for _, row in rows] for k, name in enumerate(header)}
    paths = [_image(path.parent, name, place) for name, place in zip(columns[image], places, strict=True)]
    task, labels, classes = _labels(path, columns, places, target, ignored={image, "split"})
    whole = Listing(task, paths, labels, places, classes)
    if "split" not in columns or target == "split":
        return {WHOLE: whole}
    splits = [_split(name, place) for name, place in zip(columns["split"], places, strict=True)]
    return {s: whole.pick(i for i, here in enumerate(splits) if here == s) for s in dict.fromkeys(splits)}


def read_pairs(path: Path, form: str) -> dict[str, str]:
    """A CSV of two columns without a header: the first cell of each line -> the second.

    Args:
        path: the file.
        form: what a line should be, for errors: ``CLASS,NAME``.

    Raises:
        DataError: it cannot be read, a line has no two cells, or two lines begin alike.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read ({error})", where=str(path)) from error
    pairs: dict[str, str] = {}
    for line, row in enumerate(rows, start=1):
        if len(row) != 2 or not all(row):
            raise DataError(f"is no {form}", where=f"{path}, row {line}")
        if row[0] in pairs:
            raise DataError(f"maps {row[0]!r} twice", where=str(path))
        pairs[row[0]] = row[1]
    return pairs


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and the rows with their line numbers; all of the header's length."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the table cannot be read ({error})", where=str(path)) from error
    if len(lines) < 2:
        raise DataError("has no rows under its header", where=str(path), remedy=_HELP)
    header = [name.strip() for name in lines[0][1]]
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        raise DataError(f"the column {twice[0]!r} is there twice", where=str(path), remedy="Remove one")
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise DataError(f"has {len(row)} values for {len(header)} columns", where=f"{path}, row {line}")
    return header, lines[1:]


def _labels(
    path: Path, columns: dict[str, list[str]], places: list[str], target: str | None, ignored: set[str]
) -> tuple[Task, list[Label], list[str] | None]:
    if target is not None:
        if target not in columns:
            remedy = f"It has: {', '.join(columns)}"
            raise DataError(f"has no column {target!r}", where=str(path), remedy=remedy)
        task = _TASKS.get(target) or _guess(columns[target])
        return task, _parse(task, columns[target], places), None
    named = [name for name in _TASKS if name in columns]
    if len(named) > 1:
        raise DataError(f"has the columns {' and '.join(named)}", where=str(path), remedy="Choose one with target=")
    if named:
        task = _TASKS[named[0]]
        return task, _parse(task, columns[named[0]], places), None
    return "multilabel", *_flags(path, {k: v for k, v in columns.items() if k not in ignored}, places)


def _parse(task: Task, values: list[str], places: list[str]) -> list[Label]:
    read: dict[Task, Callable[[str, str], Label]] = {"classify": _label, "multilabel": _several, "regress": number}
    return [read[task](value, place) for value, place in zip(values, places, strict=True)]


def _guess(values: Iterable[str]) -> Task:
    values = list(values)
    if any(mark in value for value in values for mark in ";|"):
        return "multilabel"
    try:
        return "classify" if all(float(value).is_integer() for value in values) else "regress"
    except ValueError:
        return "classify"


def _flags(path: Path, columns: dict[str, list[str]], places: list[str]) -> tuple[list[Label], list[str]]:
    """Labels and class names from columns of zeros and ones."""
    if len(columns) < 2:
        raise DataError("has no column of labels", where=str(path), remedy=_HELP)
    for name, values in columns.items():
        for value, place in zip(values, places, strict=True):
            if value not in ("0", "1"):
                raise DataError(
                    f"the column {name!r} is {value!r} and not 0 or 1",
                    where=place,
                    remedy="Name the column of labels with target=, or keep only class columns",
                )
    names = list(columns)
    labels: list[Label] = [
        tuple(name for name, flag in zip(names, flags, strict=True) if flag == "1")
        for flags in zip(*columns.values(), strict=True)
    ]
    return labels, names


def _image(folder: Path, name: str, place: str) -> str:
    if not name:
        raise DataError("the image path is empty", where=place)
    if not (folder / name).is_file():
        raise DataError(f"there is no image {str(folder / name)!r}", where=place)
    return str(folder / name)


def _label(text: str, place: str) -> str:
    if not text:
        raise DataError("the label is empty", where=place, remedy="Fill in or remove the row")
    return text


def _several(text: str, place: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.replace("|", ";").split(";")] if text else []
    if not all(names):
        raise DataError(f"one of the labels {text!r} is empty", where=place)
    return tuple(dict.fromkeys(names))


def _split(text: str, place: str) -> str:
    try:
        return SPLIT_NAMES[text.lower()]
    except KeyError:
        raise DataError(f"unknown split {text!r}", where=place, remedy="Use train, val or test") from None
