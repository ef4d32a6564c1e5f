"""Adapters that never fold: they read features beside the backbone and add to them, or put tokens in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from refold.adapters.base import Adapter
from refold.adapters.recall import Forward
from refold.errors import SiteError

__all__ = ["Layout", "SideAdapter", "TokenAdapter"]


@dataclass(frozen=True)
class Layout:
    """How features are laid out in one call.

    Attributes:
        channel_dim: position of the channels, from the end.
        prefix: class, register and other tokens before those of the grid, in features of shape (B, N, C).
        grid: rows and columns of the tokens behind the prefix; None where nothing shows it.
        where: module path, for errors.
        rerun: of the slot "again": the host, on other features in place of those it was given.
    """

    channel_dim: int
    prefix: int = 0
    grid: tuple[int, int] | None = None
    where: str = ""
    rerun: Callable[[Tensor], Tensor] | None = None

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features as maps (B, C, H, W), and the prefix tokens (B, P, C) if there are any.

        Args:
            x: (B, P + H W, C), (B, H, W, C) or (B, C, H, W).

        Raises:
            SiteError: the grid of the tokens is not known, or does not fit.
        """
        if self.channel_dim == -3:
            return x, None
        if x.dim() == 4:
            return x.permute(0, 3, 1, 2), None
        tokens = x.shape[1] - self.prefix
        if self.grid is None or self.grid[0] * self.grid[1] != tokens:
            raise SiteError(
                f"{tokens} tokens are no grid of {self.grid}",
                where=self.where,
                remedy="Use a method that needs no grid, or pass images of one size",
            )
        patches = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return patches, x[:, : self.prefix] if self.prefix else None

    def unmaps(self, maps: Tensor, prefix: Tensor | None = None) -> Tensor:
        """Maps (B, C, H, W), and prefix tokens, in the layout of the features: the inverse of :meth:`maps`."""
        if self.channel_dim == -3:
            return maps
        if self.grid is None:
            return maps.permute(0, 2, 3, 1)
        tokens = maps.flatten(2).transpose(1, 2)
        return tokens if prefix is None else torch.cat((prefix, tokens), dim=1)

    def last(self, x: Tensor) -> Tensor:
        """With the channels as the last dimension."""
        return x if self.channel_dim == -1 else x.movedim(self.channel_dim, -1)

    def unlast(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`last`."""
        return x if self.channel_dim == -1 else x.movedim(-1, self.channel_dim)


class SideAdapter(Adapter, ABC):
    """Reads features and gives what is added to the host's output. Runs under autocast in low precision.

    Attributes:
        reruns: whether its backward pass runs the model's forward again.
        beside: whether it, and those in a row with it, give nothing to the backbone but to what the model returns.
        reads: whether it looks at more than the shape of what it is given.
    """

    reruns: bool = False
    beside: bool = False
    reads: bool = True

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout) -> Tensor | None:
        """What is added, in the shape of the host's output; None for nothing, which leaves that output's graph alone.

        Args:
            x: what the site's slot reads.
            layout: of ``x``.
        """

    def compose(self, output: Tensor, added: Tensor) -> Tensor:
        """The host's output with what :meth:`forward` gave: their sum, where the paper does not say otherwise."""
        return output + added.to(output.dtype)

    def begin(self, forward: Forward | None) -> None:
        """Called when the model's forward begins; ``forward`` is None unless some adapter ``reruns`` it."""

    def arrive(self, given: Tensor, where: str) -> None:
        """Called with the host's input, the same tensor when a gradient checkpoint runs the host again, and its path.

        It comes right before :meth:`forward`.
        """

    def release(self) -> None:
        """Forget what the adapter kept from a forward; called when the model's forward ends."""


class TokenAdapter(Adapter, ABC):
    """Has tokens that are put into the sequence a host reads and taken out of what it returns.

    Attributes:
        inside: whether the sequence holds them now, behind a host that put them in and before one that takes them out.
        carried: (B, p, C), what a host made of them, where the sequence between hosts cannot hold them.
    """

    inside: bool = False
    carried: Tensor | None = None

    @abstractmethod
    def tokens(self, batch: int) -> Tensor:
        """The tokens for each of ``batch`` images: (batch, p, C)."""

    @property
    @abstractmethod
    def count(self) -> int:
        """p."""

    def release(self) -> None:
        """Forget what was kept from a forward; called when the model's forward ends."""
        self.inside, self.carried = False, None
