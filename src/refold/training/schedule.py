"""The optimizer and its learning rate: AdamW or SGD, and timm's cosine with linear warm-up, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from refold.training.recipe import Recipe

if TYPE_CHECKING:
    from timm.scheduler.cosine_lr import CosineLRScheduler

__all__ = ["build_optimizer", "build_schedule"]


def build_optimizer(groups: list[dict[str, Any]], name: str = "adamw") -> torch.optim.Optimizer:
    """AdamW or SGD over the groups of :func:`refold.param_groups`, each with its own ``lr`` and ``weight_decay``.

    The fused kernel updates all of an adapter's many small tensors in one call. SGD has momentum 0.9, without dampening
    or Nesterov's step: ``m <- 0.9 m + g + weight_decay w``, ``w <- w - lr m``.

    Args:
        groups: as torch's optimizers take them.
        name: ``"adamw"`` or ``"sgd"``.
    """
    fused = all(
        parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
        for group in groups
        for parameter in group["params"]
    )
    if name == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> CosineLRScheduler:
    """timm's cosine schedule counted in optimizer steps; call ``step_update(step)`` before each step.

    Before ``warmup`` steps the rate rises linearly from ``warmup_lr``; from then on, at step t of T, it is
    ``min_lr + (lr - min_lr) (1 + cos(pi t / T)) / 2``: the cosine counts from the first step of the run,
    not from the end of the warm-up, as in the recipe's sources. Each group keeps its own peak.
    """
    from timm.scheduler.cosine_lr import CosineLRScheduler

    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps_per_epoch,
        lr_min=recipe.min_lr,
        warmup_t=recipe.warmup_steps(steps_per_epoch),
        warmup_lr_init=recipe.warmup_lr,
        t_in_epochs=False,
    )
