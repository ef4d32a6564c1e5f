"""Cached features in a run: what a frozen backbone gives is computed in the first epochs and read in all others.

Training images have one view, or a fixed number of augmented ones, which epochs use in turn; validation images have
one. Records are in the precision of the training: bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from refold.dense.cache import CachedEncoder, Key, digest, identify
from refold.dense.fed import Fed
from refold.errors import DataError
from refold.training.sharding import read_launch

__all__ = ["MEMORY", "Features", "Seen"]

#: In place of a folder.
MEMORY = "memory"
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Seen(NamedTuple):
    """Images as an encoder sees them.

    Attributes:
        paths: of the files.
        sizes: (height, width) of each: resized, augmented and padded.
        content: what the image at an index is made of, where it may be no file of its own.
    """

    paths: Sequence[str]
    sizes: list[tuple[int, int]]
    content: Callable[[int], bytes] | None = None

    def identify(self) -> list[str]:
        """What tells the images apart, see :func:`refold.dense.cache.identify`."""
        if self.content is None:
            return identify(self.paths)
        return [digest(self.content(k)) for k in range(len(self.paths))]


class Features:
    """Where a run's features are, and how many views of a training image.

    Args:
        where: a folder, or ``"memory"``.
        views: of each training image.

    Attributes:
        where, views: as above.
        cached: what feeds the encoder, once :meth:`prepare` was called.
    """

    def __init__(self, where: str, views: int = 1) -> None:
        self.folder = None if where == MEMORY else Path(where)
        self.where, self.views = where, views
        self.cached: CachedEncoder | None = None
        self._training = 0  # images, which come before those of validation

    def prepare(
        self, encoder: Fed, train: Seen, val: Seen | None, *, augment: str, seed: int, precision: str, **pixels: Any
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
            DataError: several views without an augmentation, or weights that are divided between processes.
            SiteError, DataError, StoreError: as :class:`refold.dense.cache.CachedEncoder`.
        """
        if augment == "none" and self.views > 1:
            raise DataError(
                f"{self.views} views of images that are not augmented are one and the same",
                where="views",
                remedy="Set augment, or leave views out",
            )
        if read_launch() is not None:
            raise DataError(
                "needs the frozen weights whole, and the launch divides them",
                where="features",
                remedy="Launch without FSDP, or train without features",
            )
        parts = [train] if val is None else [train, val]
        sizes = [size for part in parts for size in part.sizes]
        self._training = len(train.paths)
        self.cached = CachedEncoder(
            encoder,
            [name for part in parts for name in (part.paths if self.folder is None else part.identify())],
            sizes,
            views=[self.views] * self._training + [1] * (len(sizes) - self._training),
            pixels={"augment": augment, **({} if augment == "none" else {"seed": seed}), **pixels},
            folder=self.folder,
            dtype=_DTYPES[precision],
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Where they are, and their bytes, for the summary of a run."""
        assert self.cached is not None
        return {"kept": self.where, "bytes": self.cached.estimate.total}

    def training(self, keys: Sequence[Key], *, blank: bool = False) -> AbstractContextManager[None]:
        """Around the forward of a batch of training images: (image, view) of each.

        ``blank``: the pixels are not there, because :meth:`complete` says that they need not be.
        """
        assert self.cached is not None
        return self.cached.serving(keys, blank=blank)

    def validating(self, *numbers: int, blank: bool = False) -> AbstractContextManager[None]:
        """Around the forward of validation images, from 0; ``blank`` as for :meth:`training`."""
        return self.training([(self._training + number, 0) for number in numbers], blank=blank)

    def complete(self, keys: Iterable[Key]) -> bool:
        """Whether there are records of all these training images."""
        assert self.cached is not None
        return not self.cached.missing(keys)

    def validated(self, numbers: Iterable[int]) -> bool:
        """Whether there are records of all these validation images, from 0."""
        return self.complete((self._training + number, 0) for number in numbers)
