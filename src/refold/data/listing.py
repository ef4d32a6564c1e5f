"""What a source of data says, before any image is opened: paths and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refold.data.images import Task
from refold.errors import DataError

__all__ = ["SPLIT_NAMES", "WHOLE", "Label", "Listing", "class_names", "encode", "number"]

Label = str | float | tuple[str, ...]

#: Accepted spellings, in folders and columns, of the three splits.
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
#: Key of a listing whose source knows no splits.
WHOLE = "all"


@dataclass(frozen=True)
class Listing:
    """One split of one source.

    Attributes:
        task: what the labels are: one ``str`` (classify), a tuple of ``str`` (multilabel) or a ``float`` (regress).
        paths: image files, not opened yet.
        labels: one for each path.
        places: where each was named, for messages: a folder, or a file and its row.
        classes: names fixed by the source, in order; None where the labels themselves are all there is.
    """

    task: Task
    paths: list[str]
    labels: list[Label]
    places: list[str]
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, indices: Iterable[int]) -> Listing:
        """The entries at ``indices``."""
        chosen = list(indices)
        paths, labels, places = ([part[i] for i in chosen] for part in (self.paths, self.labels, self.places))
        return replace(self, paths=paths, labels=labels, places=places)


def class_names(train: Listing, others: Iterable[Listing]) -> list[str] | None:
    """The classes of all splits, None for a regression.

    Names come sorted from the training split. Where a source fixes them (columns of zeros and ones, class indices in
    lists) they stay in its order, and indices run to the largest of all splits.

    Raises:
        DataError: a split has another task, other fixed classes, or a class that training lacks.
    """
    others = list(others)
    for other in others:
        if other.task != train.task:
            raise DataError(f"is a {other.task} split and training a {train.task} split", where=_source(other))
        if (other.classes is None) != (train.classes is None):
            raise DataError("names its classes in another way than training does", where=_source(other))
    if train.task == "regress":
        return None
    if train.classes is not None:
        longest = max((listing.classes or [] for listing in (train, *others)), key=len)
        for other in (train, *others):
            indices = train.task == "classify"  # of lists: the largest of a split need not be the largest of all
            if other.classes != (longest[: len(other.classes or [])] if indices else train.classes):
                raise DataError("has other classes than the other splits", where=_source(other))
        return longest
    names = sorted({name for label in train.labels for name in _names(label)})
    known = set(names)
    for other in others:
        for label, place in zip(other.labels, other.places, strict=True):
            for name in _names(label):
                if name not in known:
                    raise DataError(
                        f"the class {name!r} is missing from training",
                        where=place,
                        remedy="Add training images of it, or drop it here",
                    )
    return names


def encode(listing: Listing, classes: list[str] | None) -> Tensor:
    """Targets: (N,) int64 class indices, (N, K) float32 zeros and ones, or (N,) float32 numbers."""
    if classes is None:
        return torch.tensor(listing.labels, dtype=torch.float32)
    index = {name: k for k, name in enumerate(classes)}
    if listing.task == "classify":
        return torch.tensor([index[label] for label in listing.labels], dtype=torch.long)  # type: ignore[index]
    targets = torch.zeros(len(listing), len(classes))
    for row, label in enumerate(listing.labels):
        targets[row, [index[name] for name in _names(label)]] = 1.0
    return targets


def number(text: str, place: str) -> float:
    """``text`` as a finite number.

    Raises:
        DataError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"the target {text!r} is no number", where=place) from None
    if not math.isfinite(value):
        raise DataError(f"the target {text!r} is not finite", where=place, remedy="Fill in or remove the row")
    return value


def _names(label: Label) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (str(label),)


def _source(listing: Listing) -> str:
    return listing.places[0] if listing.places else "an empty split"
