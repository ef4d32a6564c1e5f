"""Images with a mask each, as the training loop sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.data.decoding import read_size
from refold.dense.cache import Key
from refold.dense.features import Features, Seen
from refold.dense.problem import DenseProblem
from refold.preprocessing import Preprocessing
from refold.segmentation.data import MaskSet
from refold.segmentation.inference import Inference, evaluate
from refold.segmentation.loader import MaskLoader, evaluation_pairs, input_size
from refold.segmentation.losses import segmentation_loss
from refold.segmentation.metrics import PixelConfusion
from refold.segmentation.models import Segmenter
from refold.training.inference import autocast, in_evaluation
from refold.training.problem import one_of, training_order
from refold.training.progress import counting
from refold.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["SegmentationProblem", "confusion_of"]

METRICS = ("miou", "pixel_accuracy", "mean_accuracy")


class SegmentationProblem(DenseProblem):
    """See :class:`refold.training.problem.Problem`. Pixel-wise cross-entropy; mIoU chooses the best epoch.

    Args:
        model: where it trains.
        train_set, val_set: images and masks of the same classes.
        preprocessing: of the encoder; its size is the crop that is trained on.
        recipe: its ``augment`` is one of :data:`refold.segmentation.AUGMENTATIONS`.
        accelerator, precision: of the training loop.
        features: where the encoder's are kept; None computes them at every step.

    Raises:
        DataError: a setting that makes no sense here, or what :class:`MaskLoader` raises.
        SiteError, DataError, StoreError: as :meth:`refold.dense.features.Features.prepare`.
    """

    def __init__(
        self,
        model: Segmenter,
        train_set: MaskSet,
        val_set: MaskSet | None,
        preprocessing: Preprocessing,
        recipe: Recipe,
        accelerator: Accelerator,
        precision: str,
        features: Features | None = None,
    ) -> None:
        self.model, self.val_set, self.preprocessing = model, val_set, preprocessing
        self.accelerator, self.precision = accelerator, precision
        self.select = one_of(recipe, METRICS)
        order = training_order(recipe, len(train_set), accelerator)
        if features is not None:
            order["views"] = features.views
        loader = MaskLoader(train_set, preprocessing, augment=recipe.augment, workers=recipe.workers, **order)
        super().__init__(loader, train_set, val_set, train_set.classes, features)
        if features is not None:
            crops = [model.padded(*preprocessing.size)] * len(train_set)
            with autocast(accelerator.device, precision):
                features.prepare(
                    model.encoder, Seen(train_set.images, crops), None if val_set is None else self._seen(val_set),
                    augment=recipe.augment, seed=recipe.seed, precision=precision, preprocessing=asdict(preprocessing),
                )  # fmt: skip

    def _seen(self, val_set: MaskSet) -> Seen:
        """Validation images, whole, as the encoder sees them."""
        sizes = (input_size(*read_size(path), self.preprocessing) for path in val_set.images)
        return Seen(val_set.images, [self.model.padded(*size) for size in sizes])

    def loss(self, model: nn.Module, batch: tuple[Sequence[Key], tuple[Tensor, Tensor]]) -> Tensor:
        images, masks = (part.to(self.accelerator.device, non_blocking=True) for part in batch[1])
        with autocast(self.accelerator.device, self.precision), self.training(batch[0]):
            outputs = model(images)
        return segmentation_loss(outputs, masks)

    def validate(self) -> dict[str, float] | None:
        if self.val_set is None:
            return None
        found = confusion_of(
            self.model, self.val_set, self.preprocessing, self.accelerator, precision=self.precision,
            around=self.validating,
        )  # fmt: skip
        return found.metrics()

    def try_step(self, size: int) -> Tensor | list[Tensor]:
        shape = (size, self.preprocessing.channels, *self.preprocessing.size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.accelerator.device)
        with autocast(self.accelerator.device, self.precision):
            return self.model(images)


def confusion_of(
    model: nn.Module,
    mask_set: MaskSet,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    *,
    precision: str = "fp32",
    inference: Inference | None = None,
    short_side: int | None = None,
    around: Callable[[int], AbstractContextManager[Any]] | None = None,
) -> PixelConfusion:
    """Confusion over all images of a set, the same on every process; the model's mode is restored.

    ``short_side`` is as for :func:`evaluation_pairs`; the model runs in ``around(number of the image)``.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    pairs = evaluation_pairs(mask_set, preprocessing, short_side=short_side, rank=rank, world=world)
    bar = counting("images", total=len(mask_set), main=accelerator.is_main_process)
    with in_evaluation(model), autocast(accelerator.device, precision), bar as more:

        def counted() -> Iterator[tuple[Tensor, Tensor]]:
            for pair in pairs:
                yield pair
                more(world)

        found = evaluate(
            model, counted(), mask_set.classes, inference, accelerator.device,
            around=None if around is None else lambda k: around(rank + k * world),
        )  # fmt: skip
    if world > 1:
        total = accelerator.reduce(found.counts.to(accelerator.device), reduction="sum")
        assert isinstance(total, Tensor)
        found.counts = total.cpu()
    return found
