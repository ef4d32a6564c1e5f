"""Whole images whose features are kept: which of them are read, and how the model is given what is known of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from refold.data import ImageSet
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.training.config import require_fixed
from refold.training.inference import Batches, autocast
from refold.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.data.loader import PlannedLoader
    from refold.data.streams import StreamLoader
    from refold.dense.cache import Key
    from refold.dense.features import Features

__all__ = ["KeptImages"]


class KeptImages:
    """What :class:`refold.training.images.ImageProblem` does otherwise with cached features.

    What draws in the backbone in training mode (DropPath, dropout) is off, as in evaluation; the head is as ever.

    Args:
        features: where they are kept.
        model: where it trains.
        train_set, val_set, preprocessing, recipe, accelerator, precision: of the problem.

    Attributes:
        model: gives the logits of images that have records.

    Raises:
        SiteError, DataError, StoreError: as :meth:`refold.dense.features.Features.prepare`.
    """

    def __init__(
        self,
        features: Features,
        model: nn.Module,
        train_set: ImageSet,
        val_set: ImageSet | None,
        preprocessing: Preprocessing,
        recipe: Recipe,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        from refold.data.streams import StreamSet
        from refold.dense.features import Seen
        from refold.dense.halves import Halves

        require_fixed(recipe)
        if isinstance(train_set, StreamSet):
            raise DataError("a stream's images are not told apart", where="features", remedy="Leave it out")
        self.features, self.model, self._targets = features, Halves(model), train_set.targets
        self._accelerator, self._shape = accelerator, (preprocessing.channels, *preprocessing.size)
        parts = [part for part in (train_set, val_set) if part is not None]
        seen = [Seen(part.paths, [preprocessing.size] * len(part), part.source_bytes) for part in parts]
        with autocast(accelerator.device, precision):
            features.prepare(
                self.model.encoder, seen[0], seen[1] if len(seen) > 1 else None, augment=recipe.augment,
                seed=recipe.seed, precision=precision, preprocessing=asdict(preprocessing), channels=train_set.channels,
            )  # fmt: skip

    def to_read(self, image_set: ImageSet) -> ImageSet:
        """The set without a place in memory for decoded images, which are read once, unless they have more views."""
        if self.features.views > 1:
            return image_set
        part = image_set.subset(range(len(image_set)))
        part.cache = "stream"
        return part

    def batches(self, loader: PlannedLoader | StreamLoader) -> Iterator[tuple[Tensor, Tensor, Sequence[Key], bool]]:
        """An epoch's images, targets, keys, and whether the images were not read, as there are records of all."""
        loader = cast("PlannedLoader", loader)  # of no stream
        keys = loader.keys
        spared = [self.features.complete(batch) for batch in keys]
        loader.spare(number for number, blank in enumerate(spared) if blank)
        read = iter(loader)
        for batch, blank in zip(keys, spared, strict=True):
            if blank:
                yield self._blank(len(batch)), self._targets[[image for image, _ in batch]], batch, True
            else:
                yield *next(read), batch, False

    def logits(self, images: Tensor, keys: Sequence[Key], blank: bool) -> Tensor:
        """Of a batch of :meth:`batches`."""
        with self.features.training(keys, blank=blank):
            return self.model(images)

    def validated(self, loader: Batches, count: int, batch_size: int) -> Batches:
        """This process's batches of ``count`` validation images; :attr:`model` may be run while one is current."""
        mine = range(self._accelerator.process_index, count, self._accelerator.num_processes)
        blank = self.features.validated(mine)
        read = iter(() if blank else loader)
        for start in range(0, len(mine), batch_size):
            numbers = mine[start : start + batch_size]
            images = self._blank(len(numbers)) if blank else next(read)[0]
            with self.features.validating(*numbers, blank=blank):
                yield images, images

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Around a step: several processes exchange gradients here, as what wraps the model for it is not called."""
        yield
        if self._accelerator.num_processes > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad = cast(Tensor, self._accelerator.reduce(parameter.grad, reduction="mean"))

    def _blank(self, count: int) -> Tensor:
        """Images of the right shape alone."""
        return torch.empty((), device=self._accelerator.device).expand(count, *self._shape)
