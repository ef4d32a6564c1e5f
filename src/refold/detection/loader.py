"""Batches for torchvision's detectors, the same for the same seed and epoch, whatever the machine does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from refold.data.loader import Plan, Plans, as_it_is, check_shares
from refold.data.parallel import available_cpus, one_torch_thread
from refold.data.randomness import generator
from refold.detection.augmentation import BoxAugmentation
from refold.detection.boxes import BoxSet
from refold.errors import DataError

__all__ = ["BoxLoader"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


class BoxLoader:
    """Iterate over ``(images, targets)``, lists: images (3, H, W) float32 in [0, 1], and :meth:`BoxSet.target`.

    Images are decoded at every pass; sizes differ. Order and augmentation are a function of (seed, epoch, image)
    alone, and processes share the batches, as with :class:`refold.data.Loader`.

    Args:
        box_set: what to read.
        batch_size: images of a step, over all processes together; a multiple of ``world``.
        augment: one of :data:`refold.detection.augmentation.AUGMENTATIONS`; None is ``"none"``.
        shuffle: a new order every epoch, as for training.
        drop_last: leave out the images of a last batch that is not full.
        seed: of order and augmentation.
        rank, world: this process and how many there are.
        workers: processes that read ahead, at most the CPUs there are. 0 does it in this process.

    Raises:
        DataError: an argument out of range, an empty loader, or a file that cannot be decoded.
    """
