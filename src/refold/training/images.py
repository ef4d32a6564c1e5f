"""Whole images with a class, labels or a number each: the problem that :func:`refold.training.fit` solves."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.training.consistency import make_consistency
from refold.training.inference import Batches, autocast, compute_logits, evaluation_loader
from refold.training.mixing import make_mixer
from refold.training.problem import LoadedProblem, training_order
from refold.training.recipe import Recipe
from refold.training.tasks import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.data import ImageSet
    from refold.data.loader import Order, PlannedLoader
    from refold.data.streams import StreamLoader
    from refold.dense.features import Features
    from refold.training.kept import KeptImages
    from refold.video import VideoSet

__all__ = ["ImageProblem", "chosen_metric"]


class ImageProblem(LoadedProblem):
    """See :class:`refold.training.problem.Problem`; the arguments are those of :func:`refold.training.fit`.

    With ``features`` a batch is what :meth:`refold.training.kept.KeptImages.batches` gives.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: ImageSet | VideoSet,
        val_set: ImageSet | VideoSet | None,
        preprocessing: Preprocessing,
        recipe: Recipe,
        task: Task,
        accelerator: Accelerator,
        precision: str,
        features: Features | None = None,
    ) -> None:
        self.model, self.val_set, self.preprocessing, self.recipe = model, val_set, preprocessing, recipe
        self.accelerator, self.precision = accelerator, precision
        self.task = task.to(accelerator.device)
        self.mixer = make_mixer(recipe, task.outputs)
        self.consistency = make_consistency(recipe, model, accelerator.device)
        order = training_order(recipe, len(train_set), accelerator)
        self.kept = None if features is None else self._keep(features, train_set, val_set)
        if features is not None:
            order["views"] = features.views
        super().__init__(self._training(train_set, order), train_set, val_set, task.classes)
        self.val_loader = None if val_set is None else self._evaluation(val_set)
        self.select = chosen_metric(recipe, task, val_set)

    def _keep(self, features: Features, train_set: Any, val_set: Any) -> KeptImages:
        from refold.training.kept import KeptImages

        return KeptImages(
            features, self.model, train_set, val_set, self.preprocessing, self.recipe, self.accelerator, self.precision
        )

    def _training(self, train_set: Any, order: Order) -> PlannedLoader | StreamLoader:
        from refold.data.streams import open_loader

        train_set = train_set if self.kept is None else self.kept.to_read(train_set)
        return open_loader(
            train_set, self.preprocessing, augment=self.recipe.augment, workers=self.recipe.workers, **order
        )

    def _evaluation(self, val_set: Any) -> Batches:
        val_set = val_set if self.kept is None else self.kept.to_read(val_set)
        return evaluation_loader(
            val_set, self.preprocessing, self.accelerator, batch_size=self.recipe.batch_size,
            workers=self.recipe.workers,
        )  # fmt: skip

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of one input of the model."""
        return (self.preprocessing.channels, *self.preprocessing.size)

    def batches(
        self, epoch: int, seed: int, start: int = 0, state: dict[str, Any] | None = None
    ) -> Iterable[tuple[Tensor, Tensor]]:
        if self.consistency is not None:
            self.consistency.start(seed)
            if state is not None:
                self.consistency.noise.generator.set_state(state["noise"])
        batches = super().batches(epoch, seed, start, state)
        return batches if self.kept is None else self.kept.batches(self.loader)

    def state(self) -> dict[str, Any]:
        state = super().state()
        return state if self.consistency is None else {**state, "noise": self.consistency.noise.generator.get_state()}

    def step(self) -> AbstractContextManager[Any]:
        if self.kept is not None:
            return self.kept.averaged()
        return super().step() if self.consistency is None else self.consistency.step()

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        images, targets = (part.to(self.accelerator.device, non_blocking=True) for part in batch[:2])
        if self.mixer is not None:
            images, targets = self.mixer(images, targets)

        def forward() -> Tensor:
            with autocast(self.accelerator.device, self.precision):
                return model(images) if self.kept is None else self.kept.logits(images, *batch[2:])

        if self.consistency is None:
            logits, again = forward(), None
        else:
            logits, again = self.consistency.passes(forward, self.accelerator.no_sync(model))
        if logits.shape[1:] != (self.task.outputs,):
            raise DataError(
                f"the model gives {list(logits.shape[1:])} outputs an image and the task needs {self.task.outputs}",
                where="classes",
                remedy=f"Build the model with num_classes={self.task.outputs}",
            )
        loss = self.task.training_loss(logits.float(), targets)
        if self.consistency is None or again is None:
            return loss
        return loss + self.consistency.penalty(logits, again)

    def validate(self) -> dict[str, float] | None:
        val_set, loader = self.val_set, self.val_loader
        if val_set is None or loader is None:
            return None
        model = self.model
        if self.kept is not None:
            model = self.kept.model
            loader = self.kept.validated(loader, len(val_set), self.recipe.batch_size)
        logits = compute_logits(model, loader, len(val_set), self.accelerator, precision=self.precision)
        loss = float(self.task.loss(logits, val_set.targets))
        return {"loss": loss, **self.task.metrics(self.task.scores(logits), val_set.targets)}

    def try_step(self, size: int) -> Tensor:
        images = torch.randn((size, *self._shape), generator=torch.Generator().manual_seed(0))
        with autocast(self.accelerator.device, self.precision):
            return self.model(images.to(self.accelerator.device))


def chosen_metric(recipe: Recipe, task: Task, val_set: ImageSet | VideoSet | None) -> str:
    """The metric that chooses the best epoch, known to be defined on the validation set.

    Raises:
        DataError: it is not.
    """
    name = recipe.select or task.select
    if val_set is not None:
        scores = task.scores(torch.zeros(len(val_set), task.outputs))
        known = ["loss", *task.metrics(scores, val_set.targets)]
        if name not in known:
            raise DataError(
                f"{name!r} is not defined on this validation set",
                where="select",
                remedy=f"Defined: {', '.join(known)}",
            )
    return name
