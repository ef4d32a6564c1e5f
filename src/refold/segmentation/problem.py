"""Images with a mask each, as the training loop sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from refold.preprocessing import Preprocessing
from refold.segmentation.data import MaskSet
from refold.segmentation.inference import Inference, evaluate
from refold.segmentation.loader import MaskLoader, evaluation_pairs
from refold.segmentation.losses import segmentation_loss
from refold.segmentation.metrics import PixelConfusion
from refold.training.config import Recipe
from refold.training.inference import autocast, in_evaluation
from refold.training.problem import LoadedProblem, one_of, training_order

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["SegmentationProblem", "confusion_of"]

METRICS = ("miou", "pixel_accuracy", "mean_accuracy")


class SegmentationProblem(LoadedProblem):
    """See :class:`refold.training.problem.Problem`. Pixel-wise cross-entropy; mIoU chooses the best epoch.

    Args:
        model: a :class:`refold.segmentation.Segmenter`.
        train_set, val_set: images and masks of the same classes.
        preprocessing: of the encoder; its size is the crop that is trained on.
        recipe: its ``augment`` is one of :data:`refold.segmentation.AUGMENTATIONS`.
        accelerator, precision: of the training loop.

    Raises:
        DataError: a setting that makes no sense here, or what :class:`MaskLoader` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: MaskSet,
        val_set: MaskSet | None,
        preprocessing: Preprocessing,
        recipe: Recipe,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        self.model, self.val_set, self.preprocessing = model, val_set, preprocessing
        self.accelerator, self.precision = accelerator, precision
        self.select = one_of(recipe, METRICS)
        order = training_order(recipe, len(train_set), accelerator)
        loader = MaskLoader(train_set, preprocessing, augment=recipe.augment, workers=recipe.workers, **order)
        super().__init__(loader, train_set, val_set, train_set.classes)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, masks = (part.to(self.accelerator.device, non_blocking=True) for part in batch)
        with autocast(self.accelerator.device, self.precision):
            outputs = model(images)
        return segmentation_loss(outputs, masks)

    def validate(self) -> dict[str, float] | None:
        if self.val_set is None:
            return None
        found = confusion_of(self.model, self.val_set, self.preprocessing, self.accelerator, precision=self.precision)
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
) -> PixelConfusion:
    """Confusion over all images of a set, the same on every process; the model's mode is restored.

    ``short_side`` is as for :func:`evaluation_pairs`.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    pairs = evaluation_pairs(mask_set, preprocessing, short_side=short_side, rank=rank, world=world)
    with in_evaluation(model), autocast(accelerator.device, precision):
        found = evaluate(model, pairs, mask_set.classes, inference, accelerator.device)
    if world > 1:
        total = accelerator.reduce(found.counts.to(accelerator.device), reduction="sum")
        assert isinstance(total, Tensor)
        found.counts = total.cpu()
    return found
