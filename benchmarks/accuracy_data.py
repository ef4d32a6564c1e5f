"""The data sets of the accuracy benchmark: two of inspection, and few-shot cut-outs and clothes from Debian packages.

``cut-outs``: the stamps of Tux Paint (``stamps.py``). Each is cut at its outline, put in the middle of a plain white
square and shown at 224 px. The class is the category folder, such as ``animals/birds``, folders in it included. Of
each category with enough images 8 are for training and 4 for validation, drawn with seed 0; the rest is test.

``fashion``: Fashion-MNIST, 28 px and grey. 1000 of its training images, 800 to train on and 200 to validate, and 2000
of its test images, drawn with seed 0.
"""

from __future__ import annotations

import gzip
import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from refold import data
from stamps import INSTALL, LICENCE, STAMPS, categories

FASHION = Path("/usr/share/datasets/fashion-mnist")
INSPECTION = {"elpv": (400, 200, 2024), "textile": (400, 200, 1400)}
#: As many images pass through training in each: 3200 to 4000.
EPOCHS = {"elpv": 8, "textile": 8, "cut-outs": 50, "fashion": 4}
CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
DRAWN = (800, 200, 2000)
SHOTS, VALIDATION, LEAST = 8, 4, 16


@dataclass(frozen=True)
class Folders:
    """Where packages put what is not installed with pip."""

    stamps: Path = STAMPS
    fashion: Path = FASHION

    def missing(self, dataset: str) -> str | None:
        """Why a data set cannot be had here; None if it can."""
        if dataset == "cut-outs" and not self.stamps.is_dir():
            return f"no Tux Paint stamps ({INSTALL})"
        if dataset == "fashion" and not self.fashion.is_dir():
            return "no Fashion-MNIST (apt-get install dataset-fashion-mnist, or --fashion FOLDER)"
        return None


@cache
def load(dataset: str, folders: Folders = Folders()) -> data.Splits:
    if dataset in INSPECTION:
        return data.load_dataset(f"packaged/{dataset}", fractions=INSPECTION[dataset])
    return cut_outs(folders.stamps) if dataset == "cut-outs" else fashion(folders.fashion)


def cut_outs(folder: Path) -> data.Splits:
    """Few-shot splits of the stamps in ``folder``; see the module's docstring."""
    found = {name: images for name, images in categories(folder).items() if len(images) >= LEAST}
    classes = sorted(found)
    paths = [path for name in classes for path in found[name]]
    pixels = np.stack([found[name][path] for name in classes for path in found[name]])
    targets = torch.tensor([k for k, name in enumerate(classes) for _ in found[name]])
    whole = data.ImageSet(paths, targets, classes=classes, licence=LICENCE, decoded=pixels)
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for k in range(len(classes)):
        rows = (targets == k).nonzero().flatten()
        drawn = rows[torch.randperm(len(rows), generator=generator)].tolist()
        ends = (0, SHOTS, SHOTS + VALIDATION, len(drawn))
        for part, start, end in zip(parts, ends, ends[1:], strict=False):
            part += drawn[start:end]
    train, val, test = (whole.subset(sorted(part)) for part in parts)
    return data.Splits(train, val, test, classes, "classify")


def fashion(folder: Path) -> data.Splits:
    """A part of Fashion-MNIST; see the module's docstring."""
    pixels = np.concatenate([_idx(folder / f"{name}-images-idx3-ubyte.gz", 16) for name in ("train", "t10k")])
    labels = np.concatenate([_idx(folder / f"{name}-labels-idx1-ubyte.gz", 8) for name in ("train", "t10k")])
    pixels = pixels.reshape(len(labels), 28, 28, 1).repeat(3, axis=3)
    train, val, test = DRAWN
    generator = torch.Generator().manual_seed(0)
    known = torch.randperm(60000, generator=generator)[: train + val]
    apart = 60000 + torch.randperm(len(labels) - 60000, generator=generator)[:test]
    rows = torch.cat((known, apart)).tolist()
    names = [f"{'train' if row < 60000 else 't10k'}/{row % 60000}" for row in rows]
    targets = torch.from_numpy(labels[rows].astype(np.int64))
    whole = data.ImageSet(names, targets, classes=CLOTHES, licence="MIT (Zalando SE)", decoded=pixels[rows])
    ends = (0, train, train + val, len(rows))
    parts = [whole.subset(list(range(start, end))) for start, end in itertools.pairwise(ends)]
    return data.Splits(*parts, CLOTHES, "classify")


def _idx(path: Path, header: int) -> np.ndarray:
    """The bytes of an IDX file."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)
