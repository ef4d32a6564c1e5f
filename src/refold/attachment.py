"""attach, detach, activate, disabled: putting named adapters on a model and taking them off, exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from refold import hosting
from refold.errors import SiteError
from refold.freezing import freeze_statistics, unfreeze_statistics
from refold.junctions import require_unseen
from refold.methods import Method
from refold.preparation import Prepared, build_adapters, parameters_under, prepare
from refold.probe import forward, preserved, tensor_name
from refold.state import (
    Record,
    State,
    drop_compiled,
    get_tensor,
    is_compiled_wrapper,
    require_state,
    set_tensor,
    state_of,
    store_state,
)
from refold.survey import head_paths

__all__ = [
    "activate",
    "attach",
    "attached_part",
    "detach",
    "disabled",
    "head_paths",
    "is_attached",
    "param_groups",
    "put_in_use",
    "trainable_parameters",
]


def attach(
    model: nn.Module,
    method: Method,
    *,
    name: str = "default",
    example: Any = None,
    trainable: Iterable[str] | None = None,
    allow_new_bias: bool = False,
    strict: bool = False,
) -> nn.Module:
    """Put a method's adapters on ``model``, in place, and freeze everything but them and the head.

    Frozen BatchNorm layers keep their statistics also in training mode.

    Args:
        model: any backbone.
        method: what to attach, for example ``RepAdapter(rank=8)``.
        name: a name for this adapter; a model can carry several, of which one is active.
        example: an input for the probing forward (a tensor, a tuple of arguments or a dict of keywords); None
            takes a random image in the size the model says it wants.
        trainable: module paths or parameter names that train besides the adapter; None means the head.
        allow_new_bias: permission to create biases when merging, where a shift has no other place.
        strict: refuse, instead of reporting in ``explain``, when the method leaves out layers it wanted.

    Returns:
        ``model`` itself.

    Raises:
        SiteError: no usable site, an unknown head or path, a taken name, a merged or compiled model. The model is
            then as it was.
    """
    return install(
        model,
        prepare(
            model,
            method,
            name=name,
            example=example,
            trainable=trainable,
            allow_new_bias=allow_new_bias,
            strict=strict,
        ),
    )


def install(model: nn.Module, prepared: Prepared) -> nn.Module:
    """The part of :func:`attach` that changes the model."""
    adapters = build_adapters(model, prepared)
    drop_compiled()
    state = state_of(model)
    if state is not None:
        _require_hosted(model, state, state.active)
    else:
        state = State(prepared.example, {n: p.requires_grad for n, p in model.named_parameters()})
        store_state(model, state)
    for key in prepared.owned:
        if key not in state.base:
            # No attached adapter owns this tensor, so it has its original value whichever of them is active.
            value = get_tensor(model, key)
            assert value is not None
            state.base[key] = value.detach().cpu().clone()
    plan = prepared.plan
    state.records[prepared.name] = Record(
        prepared.method,
        plan.sites,
        plan.skipped,
        prepared.head,
        prepared.owned,
        prepared.trainable,
        plan.trains_statistics,
    )
    for site in plan.sites:
        hosting.host(model, site, prepared.name, adapters[site.key])
    previous = state.active
    activate(model, prepared.name)
    _prove(model, state, prepared, previous)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.grad = None  # left over from before: memory, and an old optimizer would still apply it
    return model


def _prove(model: nn.Module, state: State, prepared: Prepared, previous: str | None) -> None:
    """Run the example through the side adapters, whose places no fold proves; take them off again if it fails.

    Raises:
        SiteError: the forward fails with them, or one of them is not in its path.
    """
    if all(site.route is None for site in prepared.plan.sites):
        return
    device = next(model.parameters()).device
    try:
        with preserved(model), torch.no_grad():
            forward(model, prepared.example.map(lambda t: t.to(device)))
        idle = hosting.unused(model, prepared.name)
        if idle:
            raise SiteError("its adapter was not in the path of a forward", where=idle[0], remedy="Choose other sites")
        require_unseen(model, prepared.plan.sites, prepared.example.map(lambda t: t.to(device)))
    except SiteError as error:
        put_in_use(model, state, previous)
        hosting.unhost(model, prepared.name)
        del state.records[prepared.name]
        if not state.records:
            detach(model)
        reason = f"{type(prepared.method).__name__} does not work in this backbone: {error.reason}"
        raise SiteError(reason, where=error.where, remedy=error.remedy) from error


def activate(model: nn.Module, name: str) -> None:
    """Make the adapter called ``name`` the one in use: its sites, its head, its statistics; it alone trains.

    Raises:
        SiteError: unknown name, a layer with an adapter was replaced since, or the model is merged (use
            :func:`refold.switch`).
    """
    state = require_state(model, "activate")
    if state.merged is not None:
        raise SiteError(f"adapter {state.merged!r} is merged", where="activate", remedy="Use refold.switch")
    for key in (state.active, name):
        _require_hosted(model, state, key)
    put_in_use(model, state, name)


def put_in_use(model: nn.Module, state: State, name: str | None) -> None:
    """What :func:`activate` does; None leaves the backbone alone, frozen."""
    record = None if name is None else state.record(name)
    exchange_owned(model, state, name)
    state.active = name
    hosting.activate_slots(model, name)
    trained = set(record.trainable) if record else set()
    adapters = hosting.adapter_parameters(model)
    for key, parameter in model.named_parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(key in trained and parameter.is_floating_point())
    hooks = hosting.hooks_left(model)
    unfreeze_statistics(model)
    if record is not None and not record.trains_statistics:
        freeze_statistics(model, keep=record.head)
    if hosting.hooks_left(model) != hooks:
        drop_compiled()


def _require_hosted(model: nn.Module, state: State, name: str | None) -> None:
    """Raise :class:`SiteError` if a layer that belongs to the adapter called ``name`` was replaced or removed since."""
    if name is None:
        return
    record = state.record(name)
    hosting.adapters_of(model, record.sites, name)
    gone = next((key for key in record.owned if get_tensor(model, key) is None), None)
    if gone is not None:
        raise SiteError(
            f"its layer was replaced or removed after adapter {name!r} was attached",
            where=gone,
            remedy=hosting.REATTACH,
        )


def exchange_owned(model: nn.Module, state: State, name: str | None) -> None:
    """Park the outgoing adapter's values of the backbone's tensors and bring in those of ``name``."""
    outgoing = state.active or state.merged
    if outgoing == name and name is not None and not state.records[name].values:
        return
    if outgoing is not None:
        old = state.records[outgoing]
        old.values = {}
        for key in old.owned:
            tensor = get_tensor(model, key)
            if tensor is None:  # its layer was replaced: the new one stays
                continue
            # A head of another size cannot share the backbone's parameter: it is kept as the object it is.
            same = tensor.shape == state.base[key].shape
            old.values[key] = tensor.detach().clone() if same else tensor
            set_tensor(model, key, state.base[key])
    if name is not None:
        new = state.records[name]
        for key, value in new.values.items():
            set_tensor(model, key, value)
        new.values = {}


def detach(model: nn.Module) -> nn.Module:
    """Take every adapter off: the untouched backbone back, bit for bit, head included. Returns ``model``.

    Layers that were replaced while it was attached stay as they are.

    Raises:
        SiteError: nothing is attached.
        MergeError: the model is merged and its base weights were not kept, or were changed since.
    """
    state = require_state(model, "detach")
    if state.merged is not None:
        from refold.merging import unmerge

        unmerge(model)
    put_in_use(model, state, None)
    hosting.unhost(model)
    drop_compiled()
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(key, parameter.requires_grad))
    store_state(model, None)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is the untouched backbone with its own head; outside, adapted again.

    The head's values are exchanged in place: compute what you compare with (a teacher's output, say) before the
    forward whose backward follows, or torch reports that a tensor needed for the gradient was modified.

    Raises:
        SiteError: nothing is attached, or the model is merged.
    """
    state = require_state(model, "disable")
    if state.merged is not None:
        raise SiteError(f"adapter {state.merged!r} is merged", where="disabled", remedy="Call refold.unmerge first")
    name = state.active
    _require_hosted(model, state, name)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    put_in_use(model, state, None)
    try:
        yield model
    finally:
        put_in_use(model, state, name)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(key, parameter.requires_grad))


def is_attached(model: nn.Module) -> bool:
    """Whether adapters are in the model's path: attached and not merged."""
    state = state_of(model)
    return state is not None and state.merged is None


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that trains: the active adapter, its head, what it trains in place."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def param_groups(
    model: nn.Module, lr: float = 1e-3, head_lr: float | None = None, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: adapter and head apart, no weight decay on biases and norms.

    Args:
        model: adapters are attached to it, or to one part of it: of a dense model, to its backbone. What trains
            outside that part belongs to the head.
        lr: learning rate of the adapter and of what trains in place.
        head_lr: learning rate of the head; None means ``lr``.
        weight_decay: for parameters of two or more dimensions.

    Raises:
        SiteError: nothing is attached, adapters are on several parts, or a layer with one was replaced since.
    """
    part = attached_part(model)
    backbone = model.get_submodule(part)
    state = require_state(backbone, "make parameter groups", sharded=True)
    record = state.record()
    _require_hosted(backbone, state, state.active)
    inside = [tensor_name(part, name) for name, _ in backbone.named_parameters()]
    in_head = {tensor_name(part, name) for name in (parameters_under(backbone, record.head) if record.head else ())}
    body = set(inside) - in_head
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for key, parameter in trainable_parameters(model).items():
        groups.setdefault((key not in body, parameter.dim() > 1), []).append(parameter)
    rate = {True: lr if head_lr is None else head_lr, False: lr}
    return [
        {"params": parameters, "lr": rate[is_head], "weight_decay": weight_decay if decays else 0.0}
        for (is_head, decays), parameters in groups.items()
    ]


def attached_part(model: nn.Module) -> str:
    """Path of the module that adapters are attached to; "" for the model itself, also where there are none.

    Raises:
        SiteError: there are several.
    """
    if is_compiled_wrapper(model):
        return ""
    found = [path for path, module in model.named_modules() if state_of(module) is not None]
    if len(found) > 1:
        raise SiteError(f"adapters are attached to {found[0]!r} as well", where=found[1], remedy="Name one of them")
    return found[0] if found else ""
