"""Images with boxes, and perhaps masks, as the training loop sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refold.detection.boxes import BoxSet
from refold.detection.evaluation import average_precision, to_results
from refold.detection.loader import BoxLoader
from refold.detection.models import Detector
from refold.training.config import Recipe
from refold.training.inference import autocast, in_evaluation
from refold.training.problem import LoadedProblem, one_of, training_order

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DetectionProblem", "detect"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
METRICS = ("ap", "ap50", "ap75")


class DetectionProblem(LoadedProblem):
    """See :class:`refold.training.problem.Problem`. The detector's own losses; AP chooses the best epoch.

    AP is that of masks where the detector has them, else of boxes; ``box_ap`` and ``mask_ap`` stand beside.

    Args:
        model: of :func:`refold.detection.build_detector`.
        train_set, val_set: annotated images of the same classes; with masks, where the detector has them.
        recipe: its ``augment`` is one of :data:`refold.detection.augmentation.AUGMENTATIONS`.
        accelerator, precision: of the training loop.

    Raises:
        DataError: a setting that makes no sense here, or what :class:`BoxLoader` raises.
    """

    def __init__(
        self,
        model: Detector,
        train_set: BoxSet,
        val_set: BoxSet | None,
        recipe: Recipe,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        self.model, self.train_set, self.val_set = model, train_set, val_set
        self.accelerator, self.precision, self.workers = accelerator, precision, recipe.workers
        self.select = one_of(recipe, METRICS)
        order = training_order(recipe, len(train_set), accelerator)
        loader = BoxLoader(train_set, augment=recipe.augment, workers=recipe.workers, **order)
        super().__init__(loader, train_set, val_set, train_set.classes)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        device = self.accelerator.device
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in batch[1]]
        with autocast(device, self.precision):
            losses = model(images, targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def validate(self) -> dict[str, float] | None:
        if self.val_set is None:
            return None
        rows = detect(self.model, self.val_set, self.accelerator, precision=self.precision, workers=self.workers)
        return metrics_of(self.model, self.val_set, rows)[0]

    def try_step(self, size: int) -> list[Tensor]:
        """The backbone alone: attention is nowhere else, and the heads need targets."""
        height, width = self.train_set.sizes[0]
        images = torch.rand(size, 3, height, width, generator=torch.Generator().manual_seed(0))
        transform: Any = self.model.transform
        batch, _ = transform(list(images.to(self.accelerator.device)), None)
        with autocast(self.accelerator.device, self.precision):
            return self.model.encoder(batch.tensors)


@torch.no_grad()
def detect(
    model: Detector,
    box_set: BoxSet,
    accelerator: Accelerator,
    *,
    batch_size: int = 1,
    precision: str = "fp32",
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Detections on all images of a set as rows of a COCO results file, the same on every process."""
    from accelerate.utils import gather_object

    rank, world = accelerator.process_index, accelerator.num_processes
    share = range(rank, len(box_set), world)
    rows: list[dict[str, Any]] = []
    if len(share):
        loader = BoxLoader(box_set.subset(share), batch_size=batch_size, workers=workers)
        indices = iter(share)
        with in_evaluation(model), autocast(accelerator.device, precision):
            for images, _ in loader:
                found = model([image.to(accelerator.device) for image in images])
                here = [next(indices) for _ in images]
                found = [{name: value.float().cpu() for name, value in one.items()} for one in found]
                rows += to_results([{**one, "labels": one["labels"].long()} for one in found], here, box_set)
    return gather_object(rows) if world > 1 else rows


def metrics_of(
    model: Detector, box_set: BoxSet, rows: list[dict[str, Any]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics, and the table of classes, of the masks where the detector has them, else of the boxes.

    ``box_ap`` (and ``mask_ap``) are there as well. All are 0 on a set where nothing could be found.
    """
    boxes = average_precision(box_set, rows, "bbox")
    named = {"box_ap": boxes.metrics.get("ap", 0.0)}
    chosen = boxes
    if model.has_masks:
        chosen = average_precision(box_set, rows, "segm")
        named["mask_ap"] = chosen.metrics.get("ap", 0.0)
    return {**dict.fromkeys(METRICS, 0.0), **chosen.metrics, **named}, chosen.per_class
