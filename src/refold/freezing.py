"""Frozen BatchNorm layers, which keep their statistics whatever mode the model is in; and taking hooks off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from refold.fold import BatchNorm

__all__ = ["FREEZING_HOOKS", "freeze_statistics", "remove_hooks", "unfreeze_statistics"]

#: In a frozen BatchNorm's ``__dict__``, the mode the user gave it, while its forward runs in evaluation.
_MODE = "_refold_mode"
#: The momentum it had when it was frozen.
_MOMENTUM = "_refold_momentum"


def _keep_statistics(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """A frozen BatchNorm normalises with its stored statistics, and keeps them, also under ``model.train()``."""
    setattr(layer, _MODE, layer.training)
    # torch.optim.swa_utils.update_bn empties the statistics, takes the momentum away and has forwards refill them.
    refilled = layer.momentum is None and layer.__dict__[_MOMENTUM] is not None
    layer.training = layer.training and refilled


def _restore_mode(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    layer.training = getattr(layer, _MODE)


#: Every hook this file puts on modules.
FREEZING_HOOKS = (_keep_statistics, _restore_mode)


def freeze_statistics(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Make every BatchNorm outside the ``keep`` paths keep its statistics, by a forward pre-hook."""
    for path, module in model.named_modules():
        inside = any(path == k or path.startswith(f"{k}.") for k in keep)
        if isinstance(module, BatchNorm) and not inside and _keep_statistics not in module._forward_pre_hooks.values():
            setattr(module, _MOMENTUM, module.momentum)
            module.register_forward_pre_hook(_keep_statistics)
            module.register_forward_hook(_restore_mode)


def unfreeze_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BatchNorm) and remove_hooks(module, *FREEZING_HOOKS):
            module.__dict__.pop(_MODE, None)
            module.__dict__.pop(_MOMENTUM, None)


def remove_hooks(module: nn.Module, *fns: Callable[..., Any]) -> bool:
    """Remove hooks by the functions they call: handles do not survive deepcopy and pickle, functions do."""
    removed = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, v in hooks.items() if v in fns]:
            del hooks[key]
            removed = True
            for flags in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)
    return removed
