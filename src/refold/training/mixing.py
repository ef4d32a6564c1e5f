"""Mixup and cutmix by torchvision, drawn from torch's random state so that a seed fixes them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from refold.training.recipe import Recipe

__all__ = ["make_mixer"]


def make_mixer(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What mixes a batch with itself: ``(images, targets) -> (images, soft targets (B, K))``; None if off.

    Sources: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899. With both on, each batch draws one of the two.
    """
    if not (recipe.mixup or recipe.cutmix):
        return None
    from torchvision.transforms import v2

    mixers = []
    if recipe.mixup:
        mixers.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        mixers.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    return mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)
