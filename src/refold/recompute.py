"""Refuse a re-entrant gradient checkpoint that would compute with a stored weight instead of the adapted one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from refold.errors import SiteError

__all__ = ["require_recorded"]


def require_recorded(weight: Tensor, outputs: Iterable[Tensor], where: str) -> None:
    """Raise unless ``weight``, which a forward has just read, is in the graph of that forward's ``outputs``.

    A folded weight stands in for the stored one while its owner's forward runs. ``torch.utils.checkpoint`` inside
    that forward runs a part of it again in the backward pass, when the stored weight is back. Without re-entry torch
    itself notices, for other tensors are saved; with re-entry the adapter would get no gradient and what lies before
    it a wrong one.

    Args:
        weight: folded, any shape.
        outputs: tensors that the owner returned.
        where: module path of the owner, or its class.

    Raises:
        SiteError: a checkpoint inside the owner's forward hides the weight from autograd.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or weight.grad_fn is None:
        return
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, checkpointed = set(pending), False
    for node in pending:  # breadth first: the weight is a few operations before the output
        if node is weight.grad_fn:
            return
        checkpointed = checkpointed or isinstance(node, CheckpointFunction._backward_cls)  # type: ignore[attr-defined]
        following = {source for source, _ in node.next_functions if source is not None} - seen
        seen |= following
        pending += following
    if checkpointed:
        raise SiteError(
            "a re-entrant gradient checkpoint inside this forward would compute with unadapted weights",
            where=where,
            remedy="Checkpoint the module as a whole (a block, say) instead of a part of its forward",
        )
