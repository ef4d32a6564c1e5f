"""What adapters behind the blocks of a backbone add, block by block, for tests against a formula."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import refold
from refold.hosting import hosted
from zoo import images, relative

__all__ = ["check_added", "numbers"]

#: Families whose features have their channels first.
_FIRST = ("resnet", "convnext")

Values = dict[str, np.ndarray]


def numbers(model: nn.Module) -> dict[str, Values]:
    """Path of a host -> the tensors of its adapter."""
    slots = {path: slot["default"] for path, slot in hosted(model).items()}
    return {p: {n: v.detach().double().numpy().copy() for n, v in a.state_dict().items()} for p, a in slots.items()}


def check_added(
    model: nn.Module, family: str, formula: Callable[[np.ndarray, Values, tuple[int, int]], np.ndarray]
) -> None:
    """Assert that every block with an adapter returns its own output plus ``formula(tokens, values, grid)``.

    Args:
        model: adapted; afterwards it is not.
        family: of the zoo.
        formula: given the block's own output as (B, N, C), the adapter's tensors, and rows and columns of the positions
            behind prefix tokens; gives what is added, (B, N, C).
    """
    values, seen = numbers(model), {}
    for path in values:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.__setitem__(path, (args[0].detach(), output.detach()))
        )
    model(images(model))
    refold.detach(model)
    for path, (given, adapted) in seen.items():
        with torch.no_grad():
            plain: Tensor = model.get_submodule(path)(given)
        first = family in _FIRST
        features = plain.movedim(1, -1) if first else plain
        grid = (features.shape[1], features.shape[2]) if features.dim() == 4 else (2, 2)
        added = torch.from_numpy(formula(features.flatten(1, -2).numpy(), values[path], grid)).view(features.shape)
        assert relative(adapted, plain + (added.movedim(-1, 1) if first else added)) < 1e-12
        assert relative(adapted, plain) > 1e-3
