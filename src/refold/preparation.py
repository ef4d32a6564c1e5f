"""What attach decides before it changes a model: the checks, the plan, and fresh adapters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from refold import hosting
from refold.adapters import Adapter
from refold.errors import SiteError
from refold.fold import BatchNorm
from refold.methods import Method, Plan
from refold.methods.inplace import LinearProbe
from refold.probe import Example
from refold.state import is_compiled_wrapper, require_whole, state_of
from refold.survey import Survey, head_paths

__all__ = ["Prepared", "build_adapters", "parameters_under", "prepare", "require_room"]


@dataclass(frozen=True)
class Prepared:
    """Everything ``attach`` decides before it changes the model."""

    name: str
    method: Method
    plan: Plan
    head: tuple[str, ...]
    owned: tuple[str, ...]
    trainable: tuple[str, ...]
    example: Example


def prepare(
    model: nn.Module,
    method: Method,
    *,
    name: str,
    example: Any,
    trainable: Iterable[str] | None,
    allow_new_bias: bool,
    strict: bool,
) -> Prepared:
    """The checks and the plan of :func:`refold.attach`; the model stays as it is."""
    if not isinstance(method, Method):
        raise SiteError(f"expected a method such as refold.RepAdapter(), got {type(method).__name__}", where="attach")
    require_room(model, name)
    if isinstance(trainable, str):
        trainable = (trainable,)
    head = head_paths(model) if trainable is None else tuple(trainable)
    head_parameters = parameters_under(model, head)
    with hosting.silenced(model):
        survey = Survey(model, example, head=head, allow_new_bias=allow_new_bias)
        plan = method.plan(survey)
    _require_apart(plan)
    elsewhere = trainable is not None and not head  # what trains is around this backbone
    _check(model, method, plan, head_parameters, strict, elsewhere)
    names = tuple(dict.fromkeys((*plan.trained, *head_parameters)))
    owned = names + _moving_statistics(model, plan, head)
    return Prepared(name, method, plan, head, owned, names, survey.example.map(lambda t: t.detach().cpu()))


def _require_apart(plan: Plan) -> None:
    """Raise :class:`SiteError` where two sites are one place: the second adapter would take the first one's."""
    keys = [site.key for site in plan.sites]
    for site in plan.sites:
        if keys.count(site.key) > 1:
            raise SiteError("two adapters would go to this one place", where=site.path, remedy="Choose other sites")


def build_adapters(model: nn.Module, prepared: Prepared, device: torch.device | None = None) -> dict[str, Adapter]:
    """Site key -> fresh adapter, beside its host (or on ``device``) and never below float32; shared ones are one.

    Updates of a trained adapter would round away in bfloat16.
    """
    adapters = {}
    for site in prepared.plan.sites:
        if site.shares is not None:
            adapters[site.key] = adapters[site.shares]
            continue
        weight = hosting.nearest_parameter(model, site.path)
        floating = weight.dtype if weight.is_floating_point() else torch.float32
        dtype = torch.promote_types(floating, torch.float32)
        adapters[site.key] = prepared.method.build(site, device or weight.device, dtype)
    for part, method in enumerate(prepared.method.parts()):
        method.link({site.of_part(0).key: adapters[site.key] for site in prepared.plan.sites if site.part == part})
    return adapters


def require_room(model: nn.Module, name: str) -> None:
    """Raise :class:`SiteError` unless ``model``, in its present state, can take one more adapter called ``name``."""
    if not isinstance(model, nn.Module):
        raise SiteError(f"expected a torch module, got {type(model).__name__}", where="attach")
    if is_compiled_wrapper(model):
        raise SiteError(
            "the model is a compiled wrapper, which would go on running the old code",
            where=type(model).__name__,
            remedy="Attach to the module itself, then compile it",
        )
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if is_lazy(tensor) or tensor.device.type == "meta"]
    if empty:
        raise SiteError(
            "it has no values yet (lazy, or on device meta), so nothing could be probed or adapted",
            where=empty[0],
            remedy="Load the weights first: call the model once, or model.to_empty(device=...), then load_state_dict",
        )
    require_whole(model, "attach")
    state = state_of(model)
    if state is not None and state.merged is not None:
        raise SiteError(f"adapter {state.merged!r} is merged", where="attach", remedy="Call refold.unmerge first")
    if state is not None and name in state.records:
        raise SiteError(f"an adapter named {name!r} is attached already", remedy="Choose another name= or detach first")
    if not hosting.is_free_name(name):
        raise SiteError(
            f"{name!r} cannot be an adapter's name: it is no identifier, or torch uses it for modules",
            where="name",
            remedy="Use letters, digits and _, for example 'task_a'",
        )
    # What a part and the whole remember of each other's adapters would not agree.
    parts = [path for path, module in model.named_modules() if path and state_of(module) is not None]
    if parts or (state is None and hosting.hosted(model)):
        raise SiteError(
            "adapters are attached to a part of this model" if parts else "adapters are attached to the whole of it",
            where=parts[0] if parts else type(model).__name__,
            remedy="Detach there first, then attach once, with sites= where only a part is meant",
        )


def parameters_under(model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """Names of the parameters that ``paths``, of modules or parameters, mean; the adapters' own left out.

    Raises:
        SiteError: a path means none.
    """
    adapters = hosting.adapter_parameters(model)
    names = [n for n, p in model.named_parameters() if id(p) not in adapters]
    found: list[str] = []
    for path in paths:
        inside = [n for n in names if n == path or n.startswith(f"{path}.")]
        if not inside:
            raise SiteError("no module or parameter of this name has parameters", where=path, remedy="Check trainable=")
        found += inside
    return tuple(dict.fromkeys(found))


def _check(
    model: nn.Module, method: Method, plan: Plan, trained: tuple[str, ...], strict: bool, elsewhere: bool
) -> None:
    if not (plan.sites or plan.trained or trained or (elsewhere and isinstance(method, LinearProbe))):
        reasons = "; ".join(f"{s.path}: {s.reason}" for s in plan.skipped[:3])
        raise SiteError(
            f"{type(method).__name__} finds nothing to train" + (f" ({reasons})" if reasons else ""),
            where=type(model).__name__,
            remedy="Name layers in sites=, or parameters in trainable=",
        )
    if method.mergeable and plan.skipped and not plan.sites and not plan.trained:
        first = plan.skipped[0]
        raise SiteError(f"no layer is usable; {first.path}: {first.reason}", where=type(model).__name__)
    if strict and plan.skipped:
        first = plan.skipped[0]
        raise SiteError(
            f"{first.reason} (and {len(plan.skipped) - 1} more layers left out)",
            where=first.path,
            remedy="Use strict=False to adapt the rest",
        )


def _moving_statistics(model: nn.Module, plan: Plan, head: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the BatchNorm buffers that training will change."""
    names = []
    for path, module in model.named_modules():
        in_head = any(path == h or path.startswith(f"{h}.") for h in head)
        if isinstance(module, BatchNorm) and (plan.trains_statistics or in_head):
            names += [f"{path}.{leaf}" if path else leaf for leaf, b in module._buffers.items() if b is not None]
    return tuple(names)
