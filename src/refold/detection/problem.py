"""Images with boxes, and perhaps masks, as the training loop sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refold.dense.cache import Key
from refold.dense.features import Features, Seen
from refold.dense.problem import DenseProblem
from refold.detection.boxes import BoxSet
from refold.detection.evaluation import average_precision, to_results
from refold.detection.loader import BoxLoader
from refold.detection.models import Detector
from refold.errors import DataError
from refold.training.inference import autocast, in_evaluation
from refold.training.problem import one_of, training_order
from refold.training.progress import counting
from refold.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DetectionProblem", "detect"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
METRICS = ("ap", "ap50", "ap75")


class DetectionProblem(DenseProblem):
    """See :class:`refold.training.problem.Problem`. The detector's own losses; AP chooses the best epoch.

    AP is that of masks where the detector has them, else of boxes; ``box_ap`` and ``mask_ap`` stand beside.

    Args:
        model: of :func:`refold.detection.build_detector`.
        train_set, val_set: annotated images of the same classes; with masks, where the detector has them.
        recipe: its ``augment`` is one of :data:`refold.detection.augmentation.AUGMENTATIONS`.
        accelerator, precision: of the training loop.
        features: where the encoder's are kept; None computes them at every step.

    Raises:
        DataError: a setting that makes no sense here, or what :class:`BoxLoader` raises.
        SiteError, DataError, StoreError: as :meth:`refold.dense.features.Features.prepare`.
    """

    def __init__(
        self,
        model: Detector,
        train_set: BoxSet,
        val_set: BoxSet | None,
        recipe: Recipe,
        accelerator: Accelerator,
        precision: str,
        features: Features | None = None,
    ) -> None:
        self.model, self.train_set, self.val_set = model, train_set, val_set
        self.accelerator, self.precision, self.workers = accelerator, precision, recipe.workers
        self.select = one_of(recipe, METRICS)
        order = training_order(recipe, len(train_set), accelerator)
        if features is not None:
            order["views"] = features.views
        loader = BoxLoader(train_set, augment=recipe.augment, workers=recipe.workers, **order)
        super().__init__(loader, train_set, val_set, train_set.classes, features)
        if features is not None:
            train = Seen(train_set.paths, _seen_sizes(model, train_set.sizes, accelerator.device))
            if recipe.batch_size > accelerator.num_processes:
                _require_one_size(train)
            val = None
            if val_set is not None:
                val = Seen(val_set.paths, _seen_sizes(model, val_set.sizes, accelerator.device))
            with autocast(accelerator.device, precision):
                features.prepare(
                    model.encoder, train, val, augment=recipe.augment, seed=recipe.seed, precision=precision,
                    normalised=[list(model.transform.image_mean), list(model.transform.image_std)],
                )  # fmt: skip

    def loss(self, model: Any, batch: tuple[Sequence[Key], Batch]) -> Tensor:
        device, (keys, (images, targets)) = self.accelerator.device, batch
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for target in targets]
        with autocast(device, self.precision), self.training(keys):
            losses = model(images, targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def validate(self) -> dict[str, float] | None:
        if self.val_set is None:
            return None
        rows = detect(
            self.model, self.val_set, self.accelerator, precision=self.precision, workers=self.workers,
            around=self.validating,
        )  # fmt: skip
        return metrics_of(self.model, self.val_set, rows)[0]

    def try_step(self, size: int) -> list[Tensor]:
        """The backbone alone: attention is nowhere else, and the heads need targets."""
        height, width = self.train_set.sizes[0]
        images = torch.rand(size, 3, height, width, generator=torch.Generator().manual_seed(0))
        batch, _ = self.model.transform(list(images.to(self.accelerator.device)), None)
        with autocast(self.accelerator.device, self.precision):
            return self.model.encoder(batch.tensors)


def _seen_sizes(model: Detector, sizes: Sequence[tuple[int, int]], device: torch.device) -> list[tuple[int, int]]:
    """(height, width) at which the encoder sees images of these sizes, alone in their batch."""
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    with in_evaluation(model.transform):
        for size in sizes:
            if size not in seen:
                batch, _ = model.transform([torch.zeros(3, *size, device=device)])
                seen[size] = (batch.tensors.shape[-2], batch.tensors.shape[-1])
    return [seen[size] for size in sizes]


def _require_one_size(train: Seen) -> None:
    """Raise :class:`DataError` where images of a batch are padded to the largest of them."""
    for path, size in zip(train.paths, train.sizes, strict=True):
        if size != train.sizes[0]:
            raise DataError(
                f"it is seen at {size}, {train.paths[0]} at {train.sizes[0]}: padded to one size in a batch, their "
                "features are other ones with every batch",
                where=path,
                remedy="Use batch_size 1, bring the images to one shape, or leave features out",
            )


@torch.no_grad()
def detect(
    model: Detector,
    box_set: BoxSet,
    accelerator: Accelerator,
    *,
    precision: str = "fp32",
    workers: int = 0,
    around: Callable[[int], AbstractContextManager[Any]] | None = None,
) -> list[dict[str, Any]]:
    """Detections on all images of a set as rows of a COCO results file, the same on every process.

    Each image is seen alone, so that no other one's size changes how it is padded; the model runs in ``around(number
    of the image)``.
    """
    from accelerate.utils import gather_object

    rank, world = accelerator.process_index, accelerator.num_processes
    share = range(rank, len(box_set), world)
    rows: list[dict[str, Any]] = []
    if len(share):
        loader = BoxLoader(box_set.subset(share), batch_size=1, workers=workers)
        bar = counting("images", total=len(box_set), main=accelerator.is_main_process)
        with in_evaluation(model), autocast(accelerator.device, precision), bar as more:
            for k, (images, _) in zip(share, loader, strict=True):
                with nullcontext() if around is None else around(k):
                    (found,) = model([image.to(accelerator.device) for image in images])
                found = {name: value.float().cpu() for name, value in found.items()}
                rows += to_results([{**found, "labels": found["labels"].long()}], [k], box_set)
                more(world)
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
