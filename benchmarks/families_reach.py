"""What a method could reach in a backbone: its affine layers, and the blocks that should hold each role."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

import refold
from refold.survey import head_paths

__all__ = ["affine_layers", "head_of", "roles_complete"]


def head_of(model: nn.Module) -> tuple[str, ...]:
    try:
        return head_paths(model)
    except refold.RefoldError:
        return ()


def is_norm(module: nn.Module) -> bool:
    """A normalisation with an affine weight, from whatever library: a vector weight and a telling class name."""
    weight = module._parameters.get("weight")
    named = any("Norm" in cls.__name__ for cls in type(module).__mro__)
    return named and weight is not None and weight.dim() == 1


def _multiplies(module: nn.Module) -> bool:
    """A layer with a matrix or kernel of its own, whatever its class: those that refold does not know count too."""
    if isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention, nn.RNNBase)):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and not isinstance(module, nn.Embedding)


def affine_layers(model: nn.Module, head: tuple[str, ...], *, norms: bool) -> dict[str, int]:
    """Path of every affine layer outside the head -> number of its own weights (biases not counted)."""
    found, seen = {}, set()
    for path, module in model.named_modules():
        if any(path == h or path.startswith(f"{h}.") for h in head):
            continue
        if not (_multiplies(module) or (norms and is_norm(module))):
            continue
        own = [p for n, p in module._parameters.items() if p is not None and "weight" in n]
        if hasattr(module, "parametrizations"):  # then the weight is held below
            own += list(module.parametrizations.parameters())  # type: ignore[union-attr,operator]
        own = [p for p in own if id(p) not in seen]
        seen.update(map(id, own))
        found[path] = sum(p.numel() for p in own)
    return found


def roles_complete(model: nn.Module, roles: dict[str, str]) -> bool | None:
    """Whether every module of a block's class holds every role; a block is the smallest module that holds them all.

    None where the adapters were not placed by roles.
    """
    wanted = set(roles.values()) - {""}
    if len(wanted) < 2:
        return None

    def held(path: str) -> set[str]:
        return {role for site, role in roles.items() if role and site.startswith(f"{path}." if path else "")}

    full = [path for path, _ in model.named_modules() if held(path) == wanted]
    blocks = [p for p in full if not any(q != p and q.startswith(f"{p}." if p else "") for q in full)]
    classes = {type(model.get_submodule(p)) for p in blocks}
    return all(held(p) == wanted for p, m in model.named_modules() if type(m) in classes and p not in full)
