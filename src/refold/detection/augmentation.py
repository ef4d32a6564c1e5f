"""Augmentations of an image together with its boxes and masks, by torchvision's transforms v2.

===========  ==========================================================================================================
name         what it does
===========  ==========================================================================================================
none         nothing
hflip        horizontal flips of half of the images: COCO's plain recipe
flip         flips both ways: for photographs from above and microscopes
light        ``hflip``, scale jitter by 0.8 to 1.25, and photometric distortion of half of the images
lsj          ``hflip`` and large scale jitter by 0.1 to 2 (arXiv 2012.07177): for long training
===========  ==========================================================================================================

Scale jitter enlarges or shrinks the image and cuts it from, or puts it on grey within, its own size at a random place:
the model resizes all images to one size afterwards, so that a plain change of size would have no effect. What is left
of an object that a cut goes through stays an object, as long as it has a pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refold.data.randomness import preserved, reseed
from refold.errors import DataError

__all__ = ["AUGMENTATIONS", "BoxAugmentation"]

AUGMENTATIONS = ("none", "hflip", "flip", "light", "lsj")

_JITTER = {"light": (0.8, 1.25), "lsj": (0.1, 2.0)}
_GREY = 114  # of what an image does not cover; close to what normalisation makes zero
_LEAST_SIDE = 1.0  # pixels


class BoxAugmentation:
    """One of :data:`AUGMENTATIONS`; a function of image, target and seed alone.

    Raises:
        DataError: an unknown name.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name or "none"
        if self.name not in AUGMENTATIONS:
            known = f"Known: {', '.join(AUGMENTATIONS)}"
            raise DataError(f"unknown augmentation {name!r}", where="augment", remedy=known)

    def __call__(self, image: Tensor, target: dict[str, Tensor], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            image: (3, H, W) uint8.
            target: as :meth:`BoxSet.target`.
            seed: 0 to 2**32 - 1.

        Returns:
            image and target of the same form; objects that are no longer there are left out.
        """
        if self.name == "none":
            return image, target
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        height, width = image.shape[-2:]
        sample: dict[str, Any] = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
        }
        if "masks" in target:
            sample["masks"] = tv_tensors.Mask(target["masks"])
        with preserved():
            reseed(seed)
            sample = v2.Compose(self._steps(height, width))(sample)
        boxes = sample["boxes"].as_subclass(Tensor)
        kept = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE).all(dim=1)
        if "masks" in target:
            masks = sample["masks"].as_subclass(Tensor)
            kept &= masks.flatten(1).any(dim=1).bool()  # any() of uint8 is uint8
            sample["masks"] = masks[kept]
        target = {**target, "boxes": boxes[kept], "labels": target["labels"][kept]}
        if "masks" in target:
            target["masks"] = sample["masks"]
        return sample["image"].as_subclass(Tensor), target

    def _steps(self, height: int, width: int) -> list[Any]:
        """The transforms of one image; draws from the global generator."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        steps: list[Any] = [v2.RandomHorizontalFlip()]
        if self.name == "flip":
            steps.append(v2.RandomVerticalFlip())
        if self.name in _JITTER:
            low, high = _JITTER[self.name]
            # Not v2.ScaleJitter, which takes the height of an image for its width.
            scale = low + (high - low) * float(torch.rand(()))
            steps += [
                v2.Resize((max(1, round(height * scale)), max(1, round(width * scale)))),
                v2.RandomCrop((height, width), pad_if_needed=True, fill={tv_tensors.Image: _GREY, "others": 0}),
                v2.ClampBoundingBoxes(),
            ]
        if self.name == "light":
            steps.append(v2.RandomPhotometricDistort())
        return steps
