"""What happens to the frames of a clip between decoder and model: the same to all of them.

Training, ``augment``:

================  ====================================================================================================
name              what it does
================  ====================================================================================================
none              what evaluation does: the shorter side resized to the model's input, the centre cut out
crop              random resized crop of 8 to 100 % of the area, aspect 3/4 to 4/3
randaugment       the same, then ``rand-m7-n4-mstd0.5-inc1``: the recipe of ST-Adapter and VideoMAE
a policy of timm  the same with another policy of RandAugment, ``rand-...``
... ``+flip``     any of these with half of the clips mirrored, such as ``crop+flip``: of Kinetics, but not where
                  direction is a label, as in Something-Something, where it is refused
================  ====================================================================================================

Evaluation resizes the shorter side to the model's input and cuts out the centre, or three crops: both ends of the
longer side and the centre.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refold.data.augmentation import keep_one_bit
from refold.data.randomness import reseed
from refold.errors import DataError
from refold.preprocessing import Preprocessing

__all__ = ["ClipAugmentation", "crops_of", "mirrors"]

_POLICY = "rand-m7-n4-mstd0.5-inc1"
_FLIP = "+flip"
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def mirrors(augment: str) -> bool:
    """Whether an augmentation of this name mirrors clips."""
    return augment.endswith(_FLIP)


class ClipAugmentation:
    """A clip (T, 3, h, w) uint8 -> (T, 3, H, W) uint8 of the model's size, a function of the clip and a seed.

    It seeds the global generators, which the transforms draw from; the caller preserves them.

    Raises:
        DataError: an unknown name.
    """

    def __init__(self, name: str, preprocessing: Preprocessing) -> None:
        from torchvision.transforms import v2

        base = name.removesuffix(_FLIP)
        self._preprocessing = preprocessing
        self._crop: Any = None
        self._flip: Any = v2.RandomHorizontalFlip() if mirrors(name) else v2.Identity()
        self._policy: Any = None
        if base != "none":
            mode = v2.InterpolationMode(preprocessing.interpolation)
            self._crop = v2.RandomResizedCrop(
                list(preprocessing.size), scale=_AREA, ratio=_ASPECT, interpolation=mode, antialias=True
            )
        if base == "randaugment" or base.startswith("rand-"):
            self._policy = _policy(_POLICY if base == "randaugment" else base, preprocessing)
        elif base not in ("none", "crop"):
            raise DataError(
                f"unknown augmentation of clips {name!r}",
                where="augment",
                remedy="Known: none, crop, randaugment and policies such as rand-m9-n2, each with or without +flip",
            )

    def __call__(self, clip: Tensor, seed: int) -> Tensor:
        """``seed`` is 0 to 2**32 - 1."""
        reseed(seed)
        clip = crops_of(clip, self._preprocessing, 1)[0] if self._crop is None else self._crop(clip)
        clip = self._flip(clip)
        if self._policy is None:
            return clip
        return torch.stack([self._change(frame, seed) for frame in clip])

    def _change(self, frame: Tensor, seed: int) -> Tensor:
        from torchvision.transforms.v2 import functional

        reseed(seed)  # the same draws for every frame
        return functional.pil_to_tensor(self._policy(functional.to_pil_image(frame)))


def crops_of(clip: Tensor, preprocessing: Preprocessing, crops: int) -> Tensor:
    """What evaluation sees of a clip: (T, 3, h, w) uint8 -> (crops, T, 3, H, W) uint8, with 1 or 3 crops."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    height, width = preprocessing.size
    scale = max(height / clip.shape[-2], width / clip.shape[-1])
    rows, columns = max(round(clip.shape[-2] * scale), height), max(round(clip.shape[-1] * scale), width)
    mode = InterpolationMode(preprocessing.interpolation)
    clip = functional.resize(clip, [rows, columns], mode, antialias=True)
    halves = (1,) if crops == 1 else (0, 1, 2)
    places = [((rows - height) * k // 2, (columns - width) * k // 2) for k in halves]
    return torch.stack([clip[..., top : top + height, left : left + width] for top, left in places])


def _policy(name: str, preprocessing: Preprocessing) -> Any:
    """timm's RandAugment with the settings of its training transform."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.transforms import str_to_pil_interp

    settings = {
        "translate_const": int(min(preprocessing.size) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in preprocessing.mean),
        "interpolation": str_to_pil_interp(preprocessing.interpolation),
    }
    try:
        policy = rand_augment_transform(name, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(f"timm does not understand the policy {name!r} ({error})", where="augment") from error
    keep_one_bit([policy])
    return policy
