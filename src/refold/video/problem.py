"""Clips with a class each, as the training loop sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from refold.data.loader import Order, PlannedLoader
from refold.preprocessing import Preprocessing
from refold.training.images import ImageProblem
from refold.training.inference import Batches
from refold.training.recipe import Recipe
from refold.training.tasks import Task
from refold.video.loader import ClipLoader, ViewLoader
from refold.video.sampling import Sampling, Views
from refold.video.videos import VideoSet

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["VideoProblem", "view_batches"]


class VideoProblem(ImageProblem):
    """See :class:`refold.training.problem.Problem`: whole images, but for what is loaded.

    A validation during training sees one clip of a video, and its centre.

    Args:
        model: where it trains.
        train_set, val_set: videos of the same classes.
        preprocessing: of a frame.
        sampling: which frames make a clip.
        recipe: its ``augment`` is one of :mod:`refold.video.transforms`. Mixup and cutmix treat all frames alike.
        task: classes.
        accelerator, precision: of the training loop.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: VideoSet,
        val_set: VideoSet | None,
        preprocessing: Preprocessing,
        sampling: Sampling,
        recipe: Recipe,
        task: Task,
        accelerator: Accelerator,
        precision: str,
    ) -> None:
        self.sampling = sampling
        super().__init__(model, train_set, val_set, preprocessing, recipe, task, accelerator, precision)
        if self.mixer is not None:
            self.mixer = _over_frames(self.mixer)

    def _training(self, train_set: VideoSet, order: Order) -> PlannedLoader:
        recipe = self.recipe
        return ClipLoader(
            train_set, self.sampling, self.preprocessing, augment=recipe.augment, workers=recipe.workers, **order
        )

    def _evaluation(self, val_set: VideoSet) -> Batches:
        recipe = self.recipe
        return view_batches(
            val_set, Views(self.sampling), self.preprocessing, self.accelerator, batch_size=recipe.batch_size,
            workers=recipe.workers,
        )  # fmt: skip

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.sampling.frames, *super()._shape)


def view_batches(
    video_set: VideoSet,
    views: Views,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int = 0,
) -> Batches:
    """This process's share of the videos, every world-th from its rank on: :class:`ViewLoader`.

    ``batch_size`` counts views; a video's are never divided.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    part = video_set.subset(range(rank, len(video_set), world))
    if not len(part):
        return ()
    return ViewLoader(part, views, preprocessing, batch_size=max(batch_size // views.count, 1), workers=workers)


def _over_frames(mixer: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """A mixer of images for clips (B, T, C, H, W): their frames are its channels."""

    def mix(clips: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        images, mixed = mixer(clips.flatten(1, 2), targets)
        return images.unflatten(1, clips.shape[1:3]), mixed

    return mix
