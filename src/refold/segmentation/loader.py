"""Batches of images and masks, changed together; the same for the same seed and epoch, whatever the machine does.

================  ====================================================================================================
name              what it does
================  ====================================================================================================
none              the image squashed to the crop's size
flip              the same, and horizontal flips of half of the images
standard          the shorter side resized to 0.5 to 2 times the crop's, a random crop (padded with the mean colour and
                  unlabelled pixels where the image is smaller), horizontal flips and photometric distortion
================  ====================================================================================================

Images are resized as the model's preprocessing says; a pixel of a mask takes the label at its centre.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.utils.data import Dataset

from refold.data.loader import Order, Plan, PlannedLoader, Plans
from refold.data.normalize import Normalize
from refold.data.parallel import one_torch_thread
from refold.data.randomness import preserved, reseed
from refold.errors import DataError
from refold.preprocessing import Preprocessing
from refold.segmentation.data import MaskSet
from refold.segmentation.labels import IGNORE

__all__ = ["AUGMENTATIONS", "MaskLoader", "as_input", "evaluation_pairs", "input_size"]

#: Names that :class:`MaskLoader` takes.
AUGMENTATIONS = ("none", "flip", "standard")
_SCALES = (0.5, 2.0)


class MaskLoader(PlannedLoader):
    """Iterate over ``(images, masks)``: (B, C, H, W) float32 normalised, (B, H, W) int64, 255 where unlabelled.

    H and W are those of the preprocessing: the crop. As with :class:`refold.data.loader.Loader`, order and augmentation
    are a function of (seed, epoch, image) alone, and the global random state is left as it was.

    Args:
        mask_set: what to read.
        preprocessing: of the encoder; 1 or 3 channels.
        augment: one of :data:`AUGMENTATIONS`.
        workers: processes that read ahead; at most the CPUs there are. 0 does it in this process.
        order: as for :class:`refold.data.Loader`.

    Raises:
        DataError: an argument out of range, fewer images than a full batch with ``drop_last``; while iterating, what
            :meth:`MaskSet.read` raises.
    """

    def __init__(
        self,
        mask_set: MaskSet,
        preprocessing: Preprocessing,
        *,
        augment: str = "none",
        workers: int = 0,
        **order: Unpack[Order],
    ) -> None:
        self._normalize = Normalize(preprocessing)
        plans = Plans(count=len(mask_set), columns=1, **order)  # the column: seeds of the augmentation
        super().__init__(_Crops(mask_set, preprocessing, augment), plans, workers)

    def _finish(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, masks = batch
        return self._normalize(images), masks.long()


def evaluation_pairs(
    mask_set: MaskSet,
    preprocessing: Preprocessing,
    *,
    short_side: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once, alone: (1, C, h, w) float32 normalised, and its mask (1, H, W) int64 at full size.

    Args:
        mask_set, preprocessing: as for :class:`MaskLoader`.
        short_side: pixels that the image's shorter side is resized to, keeping its shape; None is the shorter side of
            the crop, the middle of the scales that ``standard`` trains on. 0 leaves the image's own size.
        rank, world: this process and how many there are; each takes its share.

    Raises:
        DataError: a negative side, or what :meth:`MaskSet.read` raises.
    """
    for k in range(rank, len(mask_set), world):
        image, mask = mask_set.read(k, preprocessing.channels)
        yield as_input(image, preprocessing, short_side), mask[None].long()


def as_input(image: Tensor, preprocessing: Preprocessing, short_side: int | None = None) -> Tensor:
    """An image (C, H, W) uint8, seen whole, as the model's input (1, C, h, w); see :func:`evaluation_pairs`.

    Raises:
        DataError: a negative side.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    size = input_size(image.shape[-2], image.shape[-1], preprocessing, short_side)
    with one_torch_thread():
        image = functional.resize(image, list(size), InterpolationMode(preprocessing.interpolation), antialias=True)
        return Normalize(preprocessing)(image[None])


def input_size(height: int, width: int, preprocessing: Preprocessing, short_side: int | None = None) -> tuple[int, int]:
    """(height, width) of :func:`as_input` for an image of this size.

    Raises:
        DataError: a negative side.
    """
    side = min(preprocessing.size) if short_side is None else short_side
    if side < 0:
        raise DataError(f"must be 0 or more, not {side}", where="short_side")
    if not side:
        return height, width
    longer = side * max(height, width) // min(height, width)
    return (side, longer) if height <= width else (longer, side)


class _Crops(Dataset[Any]):
    """Reads and changes one batch; in a worker process, or in this one."""

    def __init__(self, mask_set: MaskSet, preprocessing: Preprocessing, augment: str) -> None:
        self._mask_set = mask_set
        self._channels = preprocessing.channels
        self._change = _Change(augment, preprocessing)

    def __getitem__(self, plan: Plan) -> tuple[Tensor, Tensor] | DataError:
        images, masks = [], []
        with preserved():
            for index, draw in zip(*(part.tolist() for part in plan), strict=True):
                try:
                    image, mask = self._mask_set.read(index, self._channels)
                except DataError as error:  # raised by a worker, it would arrive wrapped in a traceback
                    return error
                reseed(int(draw[0] * 2**32))
                image, mask = self._change(image, mask)
                images.append(image)
                masks.append(mask)
        return torch.stack(images), torch.stack(masks)


class _Change:
    """Image (C, h, w) and mask (h, w), uint8 -> the same at the crop's size; draws from the global generator."""

    def __init__(self, name: str, preprocessing: Preprocessing) -> None:
        from torchvision.transforms import InterpolationMode, v2

        if name not in AUGMENTATIONS:
            known = ", ".join(AUGMENTATIONS)
            raise DataError(f"unknown augmentation {name!r}", where="augment", remedy=f"Known: {known}")
        self._mode = InterpolationMode(preprocessing.interpolation)
        self._size = preprocessing.size
        self._scaled = name == "standard"
        steps: list[Any] = []
        if self._scaled:
            colour = [round(255 * value) for value in preprocessing.mean]
            steps.append(v2.RandomCrop(list(self._size), pad_if_needed=True, fill=_fill(colour)))
        if name != "none":
            steps.append(v2.RandomHorizontalFlip())
        if self._scaled:
            steps.append(v2.RandomPhotometricDistort())
        self._steps = v2.Compose(steps) if steps else v2.Identity()

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        height, width = self._size
        if self._scaled:
            shorter = torch.empty(()).uniform_(*_SCALES).item() * min(self._size)
            factor = shorter / min(mask.shape)
            height, width = (max(round(side * factor), 1) for side in mask.shape)
        image = functional.resize(image, [height, width], self._mode, antialias=True)
        # torchvision's own rule for masks takes the pixel at the corner: up to half a pixel beside the image.
        mask = functional.resize(mask[None], [height, width], InterpolationMode.NEAREST_EXACT)[0]
        image, mask = self._steps(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def _fill(colour: list[int]) -> Any:
    from torchvision import tv_tensors

    return {tv_tensors.Image: colour, tv_tensors.Mask: IGNORE}
