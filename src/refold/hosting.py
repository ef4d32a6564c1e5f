"""How adapters live in a model: as children of the leaf layers they serve, called by hooks.

No forward is replaced. The hooks are module-level functions without state of their own, so that ``deepcopy``,
pickle, torch.compile and torch.export treat them like any other code; what they need is in the host's child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refold.adapters import Adapter, ChannelAdapter, WeightAdapter
from refold.errors import SiteError
from refold.fold import KINDS, BatchNorm, Operator, fold_input, fold_output, fold_weight, input_shift, kind_of
from refold.probe import tensors_of
from refold.recompute import require_recorded
from refold.sites import Site

__all__ = [
    "SLOT",
    "Slot",
    "activate_slots",
    "adapter_parameters",
    "fold_site",
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
#: The momentum it had when it was frozen.
_MOMENTUM = "_refold_momentum"
#: In the ``__dict__`` of a module that reads adapted weights itself: the paths below it of the layers they belong to.
_SHADOWED = "_refold_shadowed"


class Slot(nn.ModuleDict):
    """The adapters of one host layer by adapter name, of which at most one is in use."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.active: str | None = None
        self.sites: dict[str, Site] = {}

    def current(self) -> tuple[Adapter, Site] | tuple[None, None]:
        if self.active is None or self.active not in self:
            return None, None
        adapter = self[self.active]
        assert isinstance(adapter, Adapter)
        return adapter, self.sites[self.active]


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
    adapter, site = slot.current()
    if adapter is None or site is None or site.owner is not None:
        return None
    if any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())):
        raise SiteError(
            "an adapter on activations cannot take a NestedTensor",
            where=site.path,
            remedy="If an nn.TransformerEncoder makes it, set its use_nested_tensor = False: real tokens stay the same",
        )
    if not isinstance(adapter, ChannelAdapter) or site.slot != "input":
        return None
    fn: Callable[[Tensor], Tensor] = adapter
    if _shifts_after(layer, adapter):
        fn = partial(adapter, with_shift=False)
    return KINDS[slot.kind].map_input(args, kwargs, fn)


def _after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    slot = _slot(layer)
    adapter, site = slot.current()
    if adapter is None or site is None or site.owner is not None:
        return None
    kind = KINDS[slot.kind]
    if isinstance(adapter, WeightAdapter):
        op, x = kind.operator(layer), args[0] if args else kwargs["input"]
        weight, bias = layer._parameters[op.weight], layer._parameters.get(op.bias)
        assert kind.run is not None
        assert weight is not None
        return output + adapter.branch(x, partial(kind.run, layer), output, weight, bias)
    assert isinstance(adapter, ChannelAdapter)
    if site.slot == "output":
        return adapter(output)
    if not _shifts_after(layer, adapter):
        return None
    op, shift = kind.operator(layer), adapter.shift()
    weight = layer._parameters[op.weight]
    assert shift is not None
    assert weight is not None
    moved = input_shift(op, weight.to(shift.dtype), shift)
    return output + moved.reshape(-1, *[1] * (-op.channel_dim - 1)).to(output.dtype)


def _shadow(owner: nn.Module, args: tuple[Any, ...]) -> None:
    """Before ``owner`` runs: the folded weights of the layers whose weights it reads, in place of the stored ones.

    An entry in ``__dict__`` wins over ``_parameters`` in attribute look-up: the forward sees the adapted weight
    while names, keys and identity of the parameter stay as they are. :func:`_unshadow` always removes it.
    """
    for path in owner.__dict__[_SHADOWED]:
        layer = owner.get_submodule(path) if path else owner
        slot = _slot(layer)
        adapter, site = slot.current()
        if adapter is None or site is None or site.owner is None:
            continue
        op = KINDS[slot.kind].operator(layer)
        weight, bias = layer._parameters[op.weight], layer._parameters.get(op.bias)
        assert weight is not None
        folded, folded_bias = fold_site(op, site, adapter, weight, bias, _as_is)
        layer.__dict__[op.weight] = folded.to(weight.dtype)
        if folded_bias is not None and folded_bias is not bias:
            layer.__dict__[op.bias] = folded_bias.to(weight.dtype)


def _unshadow(owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    layers = {path: owner.get_submodule(path) if path else owner for path in owner.__dict__[_SHADOWED]}
    shadows = {path: _drop_shadow(layer) for path, layer in layers.items()}
    for path, weight in shadows.items():
        if path and weight is not None and output is not None:  # a layer's own forward is one module's, kept whole
            require_recorded(weight, tensors_of(output), type(owner).__name__)


def _drop_shadow(layer: nn.Module) -> Tensor | None:
    """Take the folded weight away, if there is one, and return it."""
    op = KINDS[_slot(layer).kind].operator(layer)
    layer.__dict__.pop(op.bias, None)
    return layer.__dict__.pop(op.weight, None)


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def fold_site(
    op: Operator,
    site: Site,
    adapter: Adapter,
    weight: Tensor,
    bias: Tensor | None,
    cast: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a site's layer with its adapter folded in, where the layer itself holds all of it.

    Args:
        weight, bias: the layer's own.
        cast: brings the adapter's tensors to the precision of the fold; ``to_float64`` also detaches them.
    """
    if isinstance(adapter, WeightAdapter):
        return fold_weight(op, weight, bias, adapter.reparameterize)
    assert isinstance(adapter, ChannelAdapter)
    channel_map = adapter.channel_map(cast)
    # Below the adapter's own precision the fold would round more than the adapter's path over activations does.
    precise = torch.promote_types(weight.dtype, channel_map.scale.dtype)
    weight, bias = weight.to(precise), None if bias is None else bias.to(precise)
    if site.slot == "output":
        folded, bias, shift = fold_output(op, weight, bias, channel_map)
    else:
        folded, shift = fold_input(op, weight, channel_map)
    if shift is not None and site.shift is not None and site.shift.target in ("bias", "new_bias"):
        bias = shift if bias is None else bias + shift
    return folded, bias


def _keep_statistics(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """A frozen BatchNorm normalises with its stored statistics, and keeps them, also under ``model.train()``."""
    setattr(layer, _MODE, layer.training)
    # torch.optim.swa_utils.update_bn empties the statistics, takes the momentum away and has forwards refill them.
    refilled = layer.momentum is None and layer.__dict__[_MOMENTUM] is not None
    layer.training = layer.training and refilled


def _restore_mode(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    layer.training = getattr(layer, _MODE)


def host(model: nn.Module, site: Site, name: str, adapter: Adapter) -> None:
    """Put ``adapter`` on the site's layer in ``model`` under ``name``, inactive."""
    layer = model.get_submodule(site.path)
    slot = layer._modules.get(SLOT)
    if slot is None:
        slot = Slot(site.kind)
        layer.add_module(SLOT, slot)
        layer.register_forward_pre_hook(_before, with_kwargs=True)
        # First of all hooks behind the layer: what a user's hook changes is changed for a merged model as well.
        layer.register_forward_hook(_after, with_kwargs=True, prepend=True)
    assert isinstance(slot, Slot)
    if site.owner is not None:
        owner = model.get_submodule(site.owner)
        if _SHADOWED not in owner.__dict__:
            setattr(owner, _SHADOWED, ())
            owner.register_forward_pre_hook(_shadow)
            # The shadowed weight must go also when the forward raises.
            owner.register_forward_hook(_unshadow, always_call=True)
        path = site.path.removeprefix(site.owner).removeprefix(".")
        shadowed = owner.__dict__[_SHADOWED]
        setattr(owner, _SHADOWED, tuple(dict.fromkeys((*shadowed, path))))
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
        _drop_shadow(layer)  # an interrupt (Ctrl-C) inside a forward skips even hooks that are always called
        del layer._modules[SLOT]
        _remove_hook(layer, _before)
        _remove_hook(layer, _after)
    for owner in model.modules():
        if owner.__dict__.pop(_SHADOWED, None) is not None:
            _remove_hook(owner, _shadow)
            _remove_hook(owner, _unshadow)


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
        if isinstance(module, BatchNorm) and _remove_hook(module, _keep_statistics):
            _remove_hook(module, _restore_mode)
            module.__dict__.pop(_MODE, None)
            module.__dict__.pop(_MOMENTUM, None)


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
    ours = {_before, _after, _shadow, _unshadow, _keep_statistics, _restore_mode}
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
