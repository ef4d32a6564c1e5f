"""The data sets of the accuracy benchmark: two of inspection, and few-shot cut-outs from a Debian package.

``cut-outs``: the stamps of Tux Paint (``stamps.py``). Each is cut at its outline, put in the middle of a plain white
square and shown at 224 px. The class is the category folder, such as ``animals/birds``, folders in it included. Of
each category with enough images 8 are for training and 4 for validation, drawn with seed 0; the rest is test.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

from refold import data
from stamps import INSTALL, LICENCE, STAMPS, categories

MISSING = f"cut-outs skipped: no Tux Paint stamps ({INSTALL})"
INSPECTION = {"elpv": (400, 200, 2024), "textile": (400, 200, 1400)}
#: As many images pass through training in each: 3200 to 4000.
EPOCHS = {"elpv": 8, "textile": 8, "cut-outs": 50}
SHOTS, VALIDATION, LEAST = 8, 4, 16


@cache
def load(dataset: str, stamps: Path = STAMPS) -> data.Splits:
    if dataset in INSPECTION:
        return data.load_dataset(f"packaged/{dataset}", fractions=INSPECTION[dataset])
    return cut_outs(stamps)


def available(dataset: str, stamps: Path) -> bool:
    return dataset in INSPECTION or stamps.is_dir()


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
