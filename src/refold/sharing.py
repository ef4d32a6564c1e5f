"""Which layers hold parameters that another module uses too, by name or by memory."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

__all__ = ["shared_parameters"]


def shared_parameters(model: nn.Module) -> dict[str, str]:
    """Layer path -> why it cannot be folded: another module uses the same parameter, or the same memory.

    One module under several paths is no such case: its hooks run wherever it is called, and its fold changes all.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    spans: dict[int, list[tuple[str, range]]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key, span = _memory(parameter)
        spans[key].append((name.rpartition(".")[0], span))
    reasons = {}
    for found in spans.values():
        for path, span in found if len(found) > 1 else ():
            others = {
                other
                for other, s in found
                if modules[other] is not modules[path] and max(s.start, span.start) < min(s.stop, span.stop)
            }
            if others:
                reasons[path] = f"its weight is shared with {', '.join(sorted(others))}: folding would change both"
    return reasons


def _memory(parameter: nn.Parameter) -> tuple[int, range]:
    """Where a parameter lies: an identity of its storage, and the part of it, in elements, between its ends."""
    if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided or not parameter.data_ptr():
        return id(parameter), range(1)
    length = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    first = parameter.storage_offset()
    return parameter.untyped_storage().data_ptr(), range(first, first + length)
