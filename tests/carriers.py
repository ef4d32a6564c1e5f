"""What the tests of adapters in a row share: features at both ends, and gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import refold
from zoo import images, perturb

__all__ = ["attached", "checkpointed_gradients", "gradients", "numbers", "same_gradients", "watch"]


def attached(model: nn.Module, method: refold.Method) -> nn.Module:
    """In float64, at evaluation, away from the start."""
    torch.manual_seed(0)
    refold.attach(model.double().eval(), method)
    perturb(refold.trainable_parameters(model), 0.2)
    return model


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy().copy() for name, value in module.state_dict().items()}


def watch(model: nn.Module, first: str, last: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the module ``first``, and what leaves ``last`` with the adapters on it."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(first).register_forward_pre_hook(lambda module, args: seen.update(entering=args[0])),
        model.get_submodule(last).register_forward_hook(lambda module, args, output: seen.update(leaving=output)),
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen["entering"], seen["leaving"]


def gradients(model: nn.Module, *outputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack([output.double().pow(2).sum() for output in outputs]).sum().backward()
    return {n: p.grad.clone() for n, p in refold.trainable_parameters(model).items() if p.grad is not None}


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def checkpointed_gradients(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of two forwards before one backward, without and with the model's own checkpoints around blocks."""
    x, other = images(model), images(model, seed=1)
    plain = gradients(model, model(x), model(other))
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    return plain, gradients(model, model(x), model(other))
