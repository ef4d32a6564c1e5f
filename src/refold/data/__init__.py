"""Labelled images: from folders, tables, lists and packages to normalised batches."""

from __future__ import annotations

from refold.data.dataset import Splits, load_dataset, load_images
from refold.data.images import ImageSet
from refold.data.loader import Loader
from refold.data.packages import packaged
from refold.data.splits import stratified_split

__all__ = ["ImageSet", "Loader", "Splits", "load_dataset", "load_images", "packaged", "stratified_split"]
