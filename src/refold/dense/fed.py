"""A backbone in whose place somebody else may give what it would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["Fed"]


class Fed(nn.Module):
    """Images (B, C, H, W) -> a list of tensors (B, ...), "maps", of a backbone or of what feeds it.

    Args:
        body: the backbone itself.
        behind: paths of its modules that run behind the maps, and may train.

    Attributes:
        body, behind: as above.
        gives: what the maps are, as plain data.
    """

    gives: list[list[Any]]

    def __init__(self, body: nn.Module, behind: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.body, self.behind = body, behind
        self._source: Callable[[Tensor], list[Tensor]] | None = None

    @contextmanager
    def fed(self, source: Callable[[Tensor], list[Tensor]] | None) -> Iterator[None]:
        """Inside, the maps are ``source(images)``, and the body does not run; None is the body again."""
        before, self._source = self._source, source
        try:
            yield
        finally:
            self._source = before
