"""A classifier of whole images as cached features see it: what its head is given is kept, and the head runs on that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from refold.dense.fed import Fed
from refold.errors import SiteError
from refold.state import require_state

__all__ = ["Halves", "HeadInput"]

_REMEDY = "Train without cached features"


class HeadInput(Fed):
    """Images (B, C, H, W) -> what a classifier's head is given for them, as the only map.

    Args:
        model: attached; it returns what its head returns.

    Raises:
        SiteError: it has not one head.
    """

    def __init__(self, model: nn.Module) -> None:
        head = require_state(model, "features").record().head
        if len(head) != 1 or not isinstance(dict(model.named_modules()).get(head[0]), nn.Module):
            raise SiteError(
                f"has {', '.join(head) or 'nothing'} for a head, and what one module is given is to be kept",
                where=type(model).__name__,
                remedy=_REMEDY,
            )
        super().__init__(model, head)
        self.gives = [["head", *head]]

    @property
    def head(self) -> nn.Module:
        return self.body.get_submodule(self.behind[0])

    def forward(self, images: Tensor) -> list[Tensor]:
        """The head's input.

        Raises:
            SiteError: the head is not called once, with one tensor, for what the model returns.
        """
        if self._source is not None:
            return self._source(images)
        given: list[Any] = []
        results: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            given.append(args[0].clone() if alone else None)  # the head may go on in place

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            results.append(output)

        handles = [
            self.head.register_forward_pre_hook(before, with_kwargs=True),
            self.head.register_forward_hook(after),
        ]
        try:
            output = self.body(images)
        finally:
            for handle in handles:
                handle.remove()
        if len(results) != 1 or given[0] is None or results[0] is not output:
            raise SiteError(
                "the model returns something else than what it makes of one tensor",
                where=self.behind[0],
                remedy=_REMEDY,
            )
        return given


class Halves(nn.Module):
    """Images (B, C, H, W) -> logits (B, K), the head's own part being that of ``model`` in its present mode.

    Args:
        model: as of :class:`HeadInput`.

    Attributes:
        encoder: what is in front of the head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = HeadInput(model)

    def forward(self, images: Tensor) -> Tensor:
        (given,) = self.encoder(images)
        return self.encoder.head(given)
