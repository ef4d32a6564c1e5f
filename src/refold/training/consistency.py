"""PACE's consistency regularisation (arXiv 2409.17137): two noisy passes of one batch, whose outputs should agree.

    loss = l(f_1(x), y) + lambda mean_b ||f_1(x_b) - f_2(x_b)||^2

f_1 and f_2 differ in the noise on what the adapters add, see :mod:`refold.perturbation`, and in nothing else: dropout
and drop path draw the same masks in both. It costs two passes a step, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refold.perturbation import Noise, perturbed, require_perturbable
from refold.training.recipe import Recipe

__all__ = ["Consistency", "make_consistency"]

_OTHER = 0x9E3779B9


@dataclass(frozen=True)
class Consistency:
    """The regulariser of one run.

    Attributes:
        weight: lambda.
        noise: on what the adapters of ``model`` add.
        model: attached.
    """

    weight: float
    noise: Noise
    model: nn.Module

    def start(self, seed: int) -> None:
        """Begin an epoch, whose noise is a function of ``seed``."""
        # Not ``seed`` itself: dropout's random numbers come from a generator that began with it.
        self.noise.generator.manual_seed(seed ^ _OTHER)

    def step(self) -> AbstractContextManager[None]:
        """Around a training step, the backward pass included."""
        return perturbed(self.model, self.noise)

    def passes(
        self, forward: Callable[[], Tensor], first_alone: AbstractContextManager[object]
    ) -> tuple[Tensor, Tensor]:
        """The outputs of both passes.

        Args:
            forward: one pass.
            first_alone: around the first pass, so that several processes exchange gradients once, for both.
        """
        device = self.noise.generator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), first_alone, self.noise.drawing():
            first = forward()
        with self.noise.drawing():
            return first, forward()

    def penalty(self, first: Tensor, second: Tensor) -> Tensor:
        """What is added to the loss, for outputs (B, K)."""
        return self.weight * (first.float() - second.float()).square().sum(1).mean()


def make_consistency(recipe: Recipe, model: nn.Module, device: torch.device) -> Consistency | None:
    """The recipe's regulariser, None where it is off.

    Raises:
        SiteError: noise cannot reach what the model's adapters do.
    """
    if not recipe.consistency:
        return None
    require_perturbable(model)
    return Consistency(recipe.consistency, Noise(recipe.consistency_noise, device), model)
