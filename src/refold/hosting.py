"""How adapters live in a model: as children of the leaf layers they serve, called by hooks.

No forward is replaced. The hooks are module-level functions without state of their own, so that ``deepcopy``,
pickle, torch.compile and torch.export treat them like any other code; what they need is in the host's child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from refold.adapters import Adapter, ChannelAdapter, WeightAdapter
from refold.fold import KINDS, BatchNorm, kind_of, replaces_weight
from refold.sites import Site

__all__ = [
    "SLOT",
    "Slot",
    "activate_slots",
    "adapter_parameters",
    "freeze_statistics",
    "hooks_left",
    "host",
    "hosted",
    "is_free_name",
    "silenced",
    "unfreeze_statistics",
    "unhost",
]

#: Name of the child that holds a layer's adapters; state-dict keys read ``<layer>.refold.<adapter>.<parameter>``.
SLOT = "refold"
#: In a frozen BatchNorm's ``__dict__``, the mode the user gave it, while its forward runs in evaluation.
_MODE = "_refold_mode"


class Slot(nn.ModuleDict):
    """The adapters of one host layer by adapter name, of which at most one is in use."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.active: str | None = None
        self.sites: dict[str, Site] = {}

    def current(self) -> Adapter | None:
        adapter = self[self.active] if self.active is not None and self.active in self else None
        assert adapter is None or isinstance(adapter, Adapter)
        return adapter


def is_free_name(name: str) -> bool:
    """Whether an adapter may be called ``name``: an identifier that no slot has as an attribute of its own."""
    return name.isidentifier() and not hasattr(Slot("linear"), name)


def _slot(layer: nn.Module) -> Slot:
    slot = layer._modules[SLOT]
    assert isinstance(slot, Slot)
    return slot


def _shifts_after(layer: nn.Module, adapter: ChannelAdapter) -> bool:
    """Zeros padded around the mapped input are not shifted, a folded shift is: add it after such a layer."""
    kind = kind_of(layer)
    return kind is not None and kind.operator(layer).pads_zeros and adapter.shift() is not None


def _before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    slot = _slot(layer)
    adapter = slot.current()
    kind = KINDS[slot.kind]
    if isinstance(adapter, ChannelAdapter):
        fn: Callable[[Tensor], Tensor] = adapter
        if _shifts_after(layer, adapter):
            fn = partial(adapter, with_shift=False)
        return kind.map_input(args, kwargs, fn)
    if isinstance(adapter, WeightAdapter) and replaces_weight(layer):
        op = kind.operator(layer)
        frozen = layer._parameters[op.weight]
        assert frozen is not None
        weight, bias = adapter.reparameterize(frozen, layer._parameters.get(op.bias))
        # An entry in __dict__ wins over _parameters in attribute look-up: the forward sees the adapted weight
        # while names, keys and identity of the parameter stay as they are. `_after` always removes it.
        layer.__dict__[op.weight] = weight
        if bias is not None:
            layer.__dict__[op.bias] = bias
    return None


def _after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    slot = _slot(layer)
    adapter = slot.current()
    kind = KINDS[slot.kind]
    if isinstance(adapter, ChannelAdapter) and _shifts_after(layer, adapter):
        op, shift = kind.operator(layer), adapter.shift()
        weight = layer._parameters[op.weight]
        assert shift is not None
        assert weight is not None
        moved = weight.flatten(2).sum(-1).to(shift.dtype).unflatten(0, (op.groups, -1)) @ shift.view(op.groups, -1, 1)
        return output + moved.reshape(-1, *[1] * (-op.channel_dim - 1)).to(output.dtype)
    if isinstance(adapter, WeightAdapter):
        if not replaces_weight(layer):
            assert kind.run is not None
            x = args[0] if args else kwargs["input"]
            return output + adapter.branch(x, partial(kind.run, layer))
        op = kind.operator(layer)
        layer.__dict__.pop(op.weight, None)
        layer.__dict__.pop(op.bias, None)
    return None


def _keep_statistics(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """A frozen BatchNorm normalises with its stored statistics, and keeps them, also under ``model.train()``."""
    setattr(layer, _MODE, layer.training)
    layer.training = False


def _restore_mode(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    layer.training = getattr(layer, _MODE)


def host(layer: nn.Module, site: Site, name: str, adapter: Adapter) -> None:
    """Put ``adapter`` on ``layer`` under ``name``, inactive."""
    slot = layer._modules.get(SLOT)
    if slot is None:
        slot = Slot(site.kind)
        layer.add_module(SLOT, slot)
        layer.register_forward_pre_hook(_before, with_kwargs=True)
        layer.register_forward_hook(_after, with_kwargs=True)
    assert isinstance(slot, Slot)
    if isinstance(adapter, WeightAdapter) and replaces_weight(layer):
        # The shadowed weight must go also when the forward raises. Only here: torch traces such hooks less well.
        key = next(k for k, fn in layer._forward_hooks.items() if fn is _after)
        layer._forward_hooks_always_called[key] = True
    slot[name] = adapter
    slot.sites[name] = site
    adapter.train(layer.training)


def hosted(model: nn.Module) -> dict[str, Slot]:
    """Host path -> slot."""
    return {p: m._modules[SLOT] for p, m in model.named_modules() if isinstance(m._modules.get(SLOT), Slot)}  # type: ignore[misc]


def unhost(model: nn.Module) -> None:
    """Remove every slot and hook of refold from its layers."""
    for path in hosted(model):
        layer = model.get_submodule(path)
        kind = KINDS[_slot(layer).kind]
        del layer._modules[SLOT]
        _remove_hook(layer, _before)
        _remove_hook(layer, _after)
        # An interrupt (Ctrl-C) inside a forward skips even hooks that are always called.
        layer.__dict__.pop(kind.operator(layer).weight, None)
        layer.__dict__.pop(kind.operator(layer).bias, None)


def freeze_statistics(model: nn.Module, keep: tuple[str, ...] = ()) -> None:
    """Make every BatchNorm outside the ``keep`` paths keep its statistics, by a forward pre-hook."""
    for path, module in model.named_modules():
        inside = any(path == k or path.startswith(f"{k}.") for k in keep)
        if isinstance(module, BatchNorm) and not inside and _keep_statistics not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_keep_statistics)
            module.register_forward_hook(_restore_mode)


def unfreeze_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, BatchNorm) and _remove_hook(module, _keep_statistics):
            _remove_hook(module, _restore_mode)
            module.__dict__.pop(_MODE, None)


def _remove_hook(module: nn.Module, fn: Callable[..., Any]) -> bool:
    """Remove a hook by the function it calls: handles do not survive deepcopy and pickle, functions do."""
    removed = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [k for k, v in hooks.items() if v is fn]:
            del hooks[key]
            removed = True
            for flags in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                flags.pop(key, None)
    return removed


def hooks_left(model: nn.Module) -> int:
    """Number of refold's hooks left in the model; 0 after merge and detach."""
    ours = {_before, _after, _keep_statistics, _restore_mode}
    return sum(
        fn in ours
        for m in model.modules()
        for hooks in (m._forward_pre_hooks, m._forward_hooks)
        for fn in hooks.values()
    )


def adapter_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that are refold's, not the backbone's."""
    return {id(p) for slot in hosted(model).values() for p in slot.parameters()}


def activate_slots(model: nn.Module, name: str | None) -> None:
    """Use the adapters called ``name`` everywhere (None: no adapter); only they train."""
    for slot in hosted(model).values():
        slot.active = name if name is not None and name in slot else None
        for key, adapter in slot.items():
            adapter.requires_grad_(key == name)


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """No adapter in the path inside."""
    before = [(slot, slot.active) for slot in hosted(model).values()]
    for slot, _ in before:
        slot.active = None
    try:
        yield
    finally:
        for slot, active in before:
            slot.active = active
