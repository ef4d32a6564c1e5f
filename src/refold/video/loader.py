"""Batches of clips, the same for the same seed and epoch, whatever the machine does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset

from refold.data.loader import Order, Plan, PlannedLoader, Plans
from refold.data.normalize import Normalize
from refold.data.randomness import preserved
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.video.sampling import Sampling, Views
from refold.video.transforms import ClipAugmentation, crops_of
from refold.video.videos import VideoSet

__all__ = ["ClipLoader", "ViewLoader"]


class _Loader(PlannedLoader):
    """Normalises what ``clips`` reads."""

    def __init__(
        self, clips: _Clips, video_set: VideoSet, preprocessing: Preprocessing, workers: int, order: Order
    ) -> None:
        self._targets, self._normalize = video_set.targets, Normalize(preprocessing)
        plans = Plans(count=len(video_set), columns=2, **order)  # the columns: seeds of sampling and augmentation
        super().__init__(clips, plans, workers)

    def _finish(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        clips, indices = batch
        return self._normalize(clips), self._targets[indices]


class ClipLoader(_Loader):
    """For training: ``(clips, targets)``, one clip a video, (B, T, 3, H, W) float32 normalised.

    Videos are decoded at every pass. Frames and augmentation are a function of (seed, epoch, video) alone, and
    processes share the batches, as with :class:`refold.data.Loader`.

    Args:
        video_set: what to read.
        sampling: which frames make a clip.
        preprocessing: of a frame; 3 channels.
        augment: see :mod:`refold.video.transforms`; None is ``"none"``.
        workers: processes that read ahead, at most the CPUs there are. 0 does it in this process.
        order: as for :class:`refold.data.Loader`.

    Raises:
        DataError: an argument out of range, an empty loader, or, while iterating, a file that cannot be decoded.
    """

    def __init__(
        self,
        video_set: VideoSet,
        sampling: Sampling,
        preprocessing: Preprocessing,
        *,
        augment: str | None = None,
        workers: int = 0,
        **order: Unpack[Order],
    ) -> None:
        change = ClipAugmentation(augment or "none", preprocessing)
        clips = _TrainingClips(video_set, sampling, change)
        super().__init__(clips, video_set, preprocessing, workers, order)


class ViewLoader(_Loader):
    """For evaluation: the views of each video, one after the other, (B * views, T, 3, H, W), and the targets (B,).

    Args:
        video_set, preprocessing, workers: as for :class:`ClipLoader`.
        views: how each video is seen; the crops of a clip follow each other.
        batch_size: videos at a time.

    Raises:
        DataError: as :class:`ClipLoader`.
    """

    def __init__(
        self,
        video_set: VideoSet,
        views: Views,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        workers: int = 0,
    ) -> None:
        clips = _ViewedClips(video_set, views, preprocessing)
        super().__init__(clips, video_set, preprocessing, workers, {"batch_size": batch_size})


class _Clips(Dataset[Any], ABC):
    """Reads one batch; in a worker process, or in this one."""

    def __init__(self, video_set: VideoSet) -> None:
        self._video_set = video_set

    def __getitem__(self, plan: Plan) -> tuple[Tensor, Tensor] | DataError:
        seeds = (plan[1] * 2**32).long().tolist()
        try:
            with preserved():
                views = [self._read(index, *two) for index, two in zip(plan[0].tolist(), seeds, strict=True)]
        except DataError as error:  # raised by a worker, it would arrive wrapped in a traceback
            return error
        return torch.cat(views), plan[0]

    @abstractmethod
    def _read(self, index: int, sampling_seed: int, change_seed: int) -> Tensor:
        """The views of a video, (views, T, 3, H, W) uint8."""


class _TrainingClips(_Clips):
    def __init__(self, video_set: VideoSet, sampling: Sampling, change: ClipAugmentation) -> None:
        super().__init__(video_set)
        self._sampling, self._change = sampling, change

    def _read(self, index: int, sampling_seed: int, change_seed: int) -> Tensor:
        source = torch.Generator().manual_seed(sampling_seed)
        (clip,) = self._video_set.clips(index, lambda clock: [self._sampling.random(clock, source)])
        return self._change(clip, change_seed)[None]


class _ViewedClips(_Clips):
    def __init__(self, video_set: VideoSet, views: Views, preprocessing: Preprocessing) -> None:
        super().__init__(video_set)
        self._views, self._preprocessing = views, preprocessing

    def _read(self, index: int, sampling_seed: int, change_seed: int) -> Tensor:
        clips = self._video_set.clips(index, self._views.choose)
        return torch.cat([crops_of(clip, self._preprocessing, self._views.crops) for clip in clips])
