"""Tiny originals of VTAB-1k's sets, whose pictures say their own labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from refold.data import ImageSet
from refold.protocols import TASKS, find_tasks, prepare
from refold.protocols.vtab import load_task
from refold.protocols.vtab_originals import ORIGINALS

__all__ = ["Expected", "cycle", "levels", "linked", "prepared", "say_their_labels"]


class Expected:
    """Sets that hold less than the true ones: their numbers are put into the tables."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def __call__(self, name: str, tested: int, classes: int | None = None, **counts: int) -> None:
        task, original = TASKS[name], ORIGINALS[name]
        self.patch.setitem(TASKS, name, replace(task, test=tested, classes=classes or task.classes))
        self.patch.setitem(ORIGINALS, name, replace(original, counts=counts))


def prepared(root: Path, name: str, **options) -> tuple[ImageSet, ImageSet, ImageSet]:
    """train800, val200 and test as ``refold vtab`` reads them; the first two are apart and together the 1000."""
    prepare(root, [name], **options)
    search, final = load_task(TASKS[name], find_tasks(root, [name])[name])
    assert search.val is not None
    assert final.test is not None
    assert (len(search.train), len(search.val), len(final.test)) == (800, 200, TASKS[name].test)
    assert final.train.paths == search.train.paths + search.val.paths
    parts = [{Path(path).resolve() for path in part.paths} for part in (search.train, search.val, final.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 1000 + TASKS[name].test
    return search.train, search.val, final.test


def linked(folder: Path, labels: list[int], names: list[str]) -> None:
    """A picture for each label, of that colour, at each name."""
    first: dict[int, Path] = {}
    for label, name in zip(labels, names, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if label in first:
            path.hardlink_to(first[label])
        else:
            Image.new("RGB", (2, 2), (label % 256, label // 256, 7)).save(path, "PNG")  # whatever the suffix says
            first[label] = path


def say_their_labels(*parts: ImageSet) -> None:
    for part in parts:
        for path, target in zip(part.paths, part.targets.tolist(), strict=True):
            with Image.open(path) as image:
                low, high, _ = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
            assert low + 256 * high == target, path


def cycle(count: int, classes: int) -> list[int]:
    return [k % classes for k in range(count)]


def levels(labels: list[int], *shape: int) -> np.ndarray:
    return np.broadcast_to(np.array(labels, np.uint8).reshape(-1, *[1] * len(shape)), (len(labels), *shape))
