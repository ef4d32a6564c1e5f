"""Cached features in a run: what a frozen backbone gives is computed in the first epochs and read in all others.

Training images have one view, or a fixed number of augmented ones, which epochs use in turn; validation images have
one. Records are in the precision of the training: bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from refold.dense.cache import CachedEncoder, Key, identify
from refold.dense.encoder import Encoder
from refold.errors import DataError

__all__ = ["MEMORY", "Features", "Seen"]

#: In place of a folder.
MEMORY = "memory"
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Seen(NamedTuple):
    """Images as an encoder sees them.

    Attributes:
        paths: of the files.
        sizes: (height, width) of each: resized, augmented and padded.
    """

    paths: list[str]
    sizes: list[tuple[int, int]]


class Features:
    """Where a run's features are, and how many views of a training image.

    Args:
        where: a folder, or ``"memory"``.
        views: of each training image.

    Attributes:
        views: as above.
        cached: what feeds the encoder, once :meth:`prepare` was called.
    """

    def __init__(self, where: str, views: int = 1) -> None:
        self.folder = None if where == MEMORY else Path(where)
        self.views = views
        self.cached: CachedEncoder | None = None
        self._training = 0  # images, which come before those of validation

    def prepare(
        self, encoder: Encoder, train: Seen, val: Seen | None, *, augment: str, seed: int, precision: str, **pixels: Any
    ) -> None:
        """Take up, or make room for, the records of all images.

        Args:
            encoder: where it trains, under the training's autocast.
            train, val: their images.
            augment: of training images.
            seed: of that augmentation.
            precision: ``"bf16"`` or ``"fp32"``.
            pixels: whatever else the images' pixels are a function of, as plain data.

        Raises:
            SiteError, DataError, StoreError: as :class:`refold.dense.cache.CachedEncoder`.
        """
        if augment == "none" and self.views > 1:
            raise DataError(
                f"{self.views} views of images that are not augmented are one and the same",
                where="views",
                remedy="Set augment, or leave views out",
            )
        paths, sizes = [*train.paths, *(val.paths if val else ())], [*train.sizes, *(val.sizes if val else ())]
        self._training = len(train.paths)
        self.cached = CachedEncoder(
            encoder,
            paths if self.folder is None else identify(paths),
            sizes,
            views=[self.views] * self._training + [1] * (len(paths) - self._training),
            pixels={"augment": augment, **({} if augment == "none" else {"seed": seed}), **pixels},
            folder=self.folder,
            dtype=_DTYPES[precision],
        )

    def training(self, keys: Sequence[Key]) -> AbstractContextManager[None]:
        """Around the forward of a batch of training images: (image, view) of each."""
        assert self.cached is not None
        return self.cached.serving(keys)

    def validating(self, number: int) -> AbstractContextManager[None]:
        """Around the forward of one validation image, from 0."""
        assert self.cached is not None
        return self.cached.serving([(self._training + number, 0)])
