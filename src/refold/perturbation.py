"""Noise on what adapters add, for the consistency regularisation of PACE (arXiv 2409.17137).

Where a frozen computation gives h and an adapter adds d, the perturbed model has ``h + z * d`` with z ~ N(1, sigma^2),
one number for each sample and channel, the same at every position. The regulariser is the squared distance between
the outputs of two such forwards. Everything else that is random (dropout, drop path) must be equal in both, so the
noise comes from a generator of its own.

Deviation from the released code, on purpose: it lowers sigma linearly with depth and leaves out the first block of
a ViT, the formula has one sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from refold.errors import SiteError
from refold.hosting import hosted
from refold.state import require_state

__all__ = ["Noise", "perturbed", "require_perturbable"]


class Noise:
    """Factors from N(1, sigma^2), drawn while :meth:`drawing`.

    Args:
        sigma: standard deviation.
        device: of the model.
    """

    def __init__(self, sigma: float, device: torch.device) -> None:
        self.sigma, self.generator, self.draws = sigma, torch.Generator(device), False

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Around each forward; what runs outside one is a recomputation, whose noise nobody knows any more."""
        self.draws = True
        try:
            yield
        finally:
            self.draws = False

    def factors(self, like: Tensor, channel_dim: int) -> Tensor:
        """(B, 1, ..., C, ..., 1) for features ``like``, the first dimension being the samples.

        Raises:
            SiteError: a gradient checkpoint runs an adapter again.
        """
        if not self.draws:
            raise SiteError(
                "a gradient checkpoint runs an adapter again in the backward pass, where its noise is not known",
                where="consistency",
                remedy="Switch gradient checkpointing off (set_grad_checkpointing(False)), or consistency",
            )
        channels = like.dim() + channel_dim
        shape = [size if dim in (0, channels) else 1 for dim, size in enumerate(like.shape)]
        normal = torch.randn(shape, generator=self.generator, device=like.device)
        return (1 + self.sigma * normal).to(like.dtype)

    def __call__(self, added: Tensor, channel_dim: int) -> Tensor:
        """``added`` with noise on it."""
        return added * self.factors(added, channel_dim)

    def around(self, fn: Callable[[Tensor], Tensor], x: Tensor, *, channel_dim: int) -> Tensor:
        """``fn(x)`` with noise on what it adds to ``x``."""
        return x + self(fn(x) - x, channel_dim)


@contextmanager
def perturbed(model: nn.Module, noise: Noise) -> Iterator[None]:
    """Inside, what the adapters of ``model`` add is multiplied by ``noise``: forwards, and the backward pass too.

    Raises:
        SiteError: see :func:`require_perturbable`.
    """
    require_perturbable(model)
    slots = list(hosted(model).values())
    for slot in slots:
        slot.noise = noise
    try:
        yield
    finally:
        for slot in slots:
            slot.noise = None


def require_perturbable(model: nn.Module) -> None:
    """Raise unless all that the active adapter changes is added to activations, where noise can reach it.

    Raises:
        SiteError: the method has no adapters, or some of them replace a weight or put in tokens.
    """
    record = require_state(model, "perturb", sharded=True).record()
    remedy = "Train without consistency, or name other sites in the method's sites="
    if not record.sites:
        name = type(record.method).__name__
        raise SiteError(f"{name} has no adapters whose results could be perturbed", where="consistency", remedy=remedy)
    for site in record.sites:
        if site.owner is not None:
            raise SiteError("its adapter replaces the stored weight and adds nothing", where=site.path, remedy=remedy)
        if site.slot == "tokens":
            raise SiteError("its adapter puts in tokens and adds nothing", where=site.path, remedy=remedy)
