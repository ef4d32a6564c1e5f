"""Training augmentations of uint8 batches. Each is a pure function of the images and one row of random numbers each.

================  ====================================================================================================
name              what it does
================  ====================================================================================================
none              nothing: the plain resize of the VTAB recipe
flip              horizontal and vertical flips, each of half of the images
light             random resized crop of 67 to 100 % of the area, aspect 3/4 to 4/3, and horizontal flips
randaugment       the few-shot recipe of NOAH and RepAdapter: timm's training transform (random resized crop of 8 to
                  100 %, horizontal flips) with ``rand-m9-mstd0.5-inc1``, then random erasing of 25 % of the images
a policy of timm  the same with another policy: ``rand-...``, ``augmix-...``, ``3a``, ``v0``, ``v0r``, ``original``,
                  ``originalr``
================  ====================================================================================================

The recipe's colour jitter of 0.4 is passed on, but timm applies it beside no policy except ``3a``. Posterizing keeps
at least one bit: timm's strongest level keeps none, which blackened the image and which Pillow 13 refuses.

Random crops are cut from what the image set holds: the region that evaluation sees (with a centre crop: all of the
central square), with so many more pixels that the smallest crop of ``light`` is not enlarged; for timm's policies with
twice the pixels a side, so that crops under a quarter of the area are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from refold.data.decoding import Rendering
from refold.data.randomness import preserved, reseed
from refold.errors import DataError
from refold.preprocessing import Preprocessing

__all__ = ["Augmentation", "keep_one_bit", "make_augmentation"]

FEW_SHOT_POLICY = "rand-m9-mstd0.5-inc1"
_TIMM_POLICIES = ("rand", "augmix", "3a", "v0", "v0r", "original", "originalr")


class Augmentation(ABC):
    """What a :class:`refold.data.Loader` does to a batch of uint8 images.

    Attributes:
        rendering: what the image set should deliver.
        columns: random numbers that one image needs.
        slow: worth worker processes even where images are in memory.
    """

    columns: int = 0
    slow: bool = False

    def __init__(self, rendering: Rendering) -> None:
        self.rendering = rendering

    @abstractmethod
    def __call__(self, images: Tensor, randomness: Tensor) -> Tensor:
        """(B, C, h, w) uint8 as rendered -> (B, C, H, W) uint8.

        Args:
            images: a batch; may be changed in place.
            randomness: (B, columns) float64, uniform in [0, 1).
        """

    def finish(self, images: Tensor, randomness: Tensor) -> Tensor:
        """What happens after normalisation, in place or not: (B, C, H, W) float32 -> the same shape."""
        return images


class Plain(Augmentation):
    """``none``."""

    def __call__(self, images: Tensor, randomness: Tensor) -> Tensor:
        return images


class Flip(Augmentation):
    """``flip``."""

    columns = 2

    def __call__(self, images: Tensor, randomness: Tensor) -> Tensor:
        return _flip(_flip(images, randomness[:, 0] < 0.5, -1), randomness[:, 1] < 0.5, -2)


class Light(Augmentation):
    """``light``: sides that would exceed the image are cut to it, so that every crop takes one draw."""

    columns = 5
    least_area, widest = 0.67, 4 / 3

    def __init__(self, rendering: Rendering) -> None:
        super().__init__(_enlarged(rendering, 1 / math.sqrt(self.least_area)))
        self._size = list(rendering.size)

    def __call__(self, images: Tensor, randomness: Tensor) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        mode = InterpolationMode(self.rendering.interpolation)
        rows, columns = self.rendering.size
        area = self.least_area + (1 - self.least_area) * randomness[:, 0]
        root_aspect = self.widest ** (randomness[:, 1] - 0.5)  # width / height is its square
        height = (rows * (area.sqrt() / root_aspect).clamp(max=1.0)).round().long()
        width = (columns * (area.sqrt() * root_aspect).clamp(max=1.0)).round().long()
        top = (randomness[:, 2] * (rows - height + 1)).long()
        left = (randomness[:, 3] * (columns - width + 1)).long()
        boxes = torch.stack([top, left, height, width], dim=1).tolist()
        out = images.new_empty((*images.shape[:2], *self._size))
        for k, (y, x, h, w) in enumerate(boxes):
            out[k] = functional.resized_crop(images[k], y, x, h, w, self._size, mode, antialias=True)
        return _flip(out, randomness[:, 4] < 0.5, -1)


class TimmPolicy(Augmentation):
    """``randaugment`` and timm's policies, on Pillow images one by one."""

    columns = 2
    slow = True

    def __init__(self, rendering: Rendering, policy: str, mean: tuple[float, ...]) -> None:
        from timm.data.random_erasing import RandomErasing
        from timm.data.transforms_factory import create_transform

        super().__init__(_enlarged(rendering, 2.0))
        fill = mean if len(mean) == rendering.channels else (sum(mean) / len(mean),) * rendering.channels
        try:
            self._transform: Any = create_transform(
                input_size=rendering.size,
                is_training=True,
                auto_augment=policy,
                color_jitter=0.4,
                interpolation=rendering.interpolation,
                mean=fill,
                std=fill,  # unused: with a prefetcher, timm normalises elsewhere
                use_prefetcher=True,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise DataError(f"timm does not understand the policy {policy!r} ({error})", where="augment") from error
        keep_one_bit(self._transform.transforms)
        self._erase = RandomErasing(probability=0.25, mode="pixel", device="cpu")

    def __call__(self, images: Tensor, randomness: Tensor) -> Tensor:
        from PIL import Image

        out = []
        with preserved():
            for image, seed in zip(images.permute(0, 2, 3, 1), _seeds(randomness[:, 0]), strict=True):
                reseed(seed)
                pixels = image.squeeze(-1)  # (h, w) is grey to Pillow
                out.append(self._transform(Image.fromarray(pixels.contiguous().numpy())))
        return torch.stack(out)

    def finish(self, images: Tensor, randomness: Tensor) -> Tensor:
        with preserved():
            for image, seed in zip(images, _seeds(randomness[:, 1]), strict=True):
                reseed(seed)
                self._erase(image)
        return images


def make_augmentation(name: str | None, preprocessing: Preprocessing, channels: int) -> Augmentation:
    """The augmentation ``name`` (None is ``"none"``) of images with ``channels`` channels.

    Raises:
        DataError: an unknown name.
    """
    rendering = Rendering.of(preprocessing, channels)
    presets = {"none": Plain, "flip": Flip, "light": Light}
    if name is None or name in presets:
        return presets[name or "none"](rendering)
    if name == "randaugment":
        return TimmPolicy(rendering, FEW_SHOT_POLICY, preprocessing.mean)
    if name.split("-")[0] in _TIMM_POLICIES:
        return TimmPolicy(rendering, name, preprocessing.mean)
    raise DataError(
        f"unknown augmentation {name!r}",
        where="augment",
        remedy=f"Known: {', '.join(presets)}, randaugment, and timm's policies such as rand-m7-n4-mstd0.5",
    )


def keep_one_bit(steps: Iterable[Any]) -> None:
    """Make the posterize operations of timm's policies among ``steps`` keep a bit or more."""
    from timm.data import auto_augment as timm

    for step in steps:
        if isinstance(step, timm.RandAugment | timm.AugMixAugment):
            operations = step.ops
        elif isinstance(step, timm.AutoAugment):
            operations = [operation for policy in step.policy for operation in policy]
        else:
            continue
        for operation in operations:
            if operation.aug_fn is timm.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    from timm.data.auto_augment import posterize

    return posterize(image, max(bits, 1))


def _enlarged(rendering: Rendering, factor: float) -> Rendering:
    height, width = rendering.size
    return rendering._replace(size=(math.ceil(height * factor), math.ceil(width * factor)), crop_fraction=1.0)


def _flip(images: Tensor, chosen: Tensor, dim: int) -> Tensor:
    images[chosen] = images[chosen].flip(dim)
    return images


def _seeds(uniform: Tensor) -> list[int]:
    return (uniform * 2**32).long().tolist()
