"""How adapters live in a model: as children of the leaf layers they serve, called by hooks.

No forward is replaced. The hooks are module-level functions without state of their own, so that ``deepcopy``,
pickle, torch.compile and torch.export treat them like any other code; what they need is in the host's child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold import sides
from refold.adapters import Adapter, Call, ChannelAdapter, WeightAdapter
from refold.errors import SiteError
from refold.fold import KINDS, Operator, fold_input, fold_output, fold_weight, input_shift, kind_of
from refold.freezing import FREEZING_HOOKS, remove_hooks
from refold.probe import tensors_of
from refold.recompute import require_recorded
from refold.sites import Site
from refold.turns import Turn
from refold.wires import Wire

if TYPE_CHECKING:
    from refold.perturbation import Noise

__all__ = [
    "KEEP_WEIGHT",
    "NO_WEIGHT",
    "REATTACH",
    "SLOT",
    "Slot",
    "activate_slots",
    "adapter_parameters",
    "adapters_of",
    "fold_site",
    "hooks_left",
    "host",
    "hosted",
    "is_free_name",
    "nearest_parameter",
    "silenced",
    "unhost",
    "unused",
]

#: Name of the child that holds a layer's adapters; state-dict keys read ``<layer>.refold.<adapter>.<parameter>``.
SLOT = "refold"
#: Why a layer that had a weight when the adapter was attached may have none, and what helps.
NO_WEIGHT = "its weight is no parameter of its own any more: it was pruned or parametrized after the attach"
KEEP_WEIGHT = "Make that permanent (prune.remove, parametrize.remove_parametrizations), or do it before the attach"
#: What helps where layers changed under an adapter.
REATTACH = "Change the model first and attach then; refold.detach takes off what is left"
#: In the ``__dict__`` of a module that reads adapted weights itself: the paths below it of the layers they belong to.
_SHADOWED = "_refold_shadowed"
#: And the thread that does.
_TURN = "_refold_turn"


class Slot(nn.ModuleDict):
    """The adapters of one host by entry, see :meth:`Site.entry`; those of at most one name are in use.

    Attributes:
        active: the name in use.
        sites: name -> its sites here, in the order in which they act.
        wires: entry -> what a side adapter needs besides the host's call.
        noise: multiplies what the adapters add; None outside :func:`refold.perturbation.perturbed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: str | None = None
        self.sites: dict[str, list[Site]] = {}
        self.wires: dict[str, Wire] = {}
        self.noise: Noise | None = None

    def current(self) -> list[tuple[Adapter, Site]]:
        """The adapters in use, in the order in which they act."""
        if self.active is None:
            return []
        return [(self.at(site, self.active), site) for site in self.sites.get(self.active, ())]

    def at(self, site: Site, name: str) -> Adapter:
        """The adapter called ``name`` at ``site``."""
        adapter = self[site.entry(name)]
        assert isinstance(adapter, Adapter)
        return adapter

    def wire(self, site: Site) -> Wire | None:
        assert self.active is not None
        return self.wires.get(site.entry(self.active))


def is_free_name(name: str) -> bool:
    """Whether an adapter may be called ``name``: an identifier that no slot has as an attribute of its own."""
    return name.isidentifier() and not hasattr(Slot(), name)


def _slot(layer: nn.Module) -> Slot:
    slot = layer._modules[SLOT]
    assert isinstance(slot, Slot)
    return slot


def _shifts_after(layer: nn.Module, adapter: ChannelAdapter) -> bool:
    """Zeros padded around the mapped input are not shifted, a folded shift is: add it after such a layer."""
    kind = kind_of(layer)
    return kind is not None and kind.operator(layer).pads_zeros and adapter.shift() is not None


def _before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    slot, changed = _slot(layer), False
    for adapter, site in slot.current():
        if site.owner is not None:
            continue
        if any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values())):
            raise SiteError(
                "an adapter on activations cannot take a NestedTensor",
                where=site.path,
                remedy="If an nn.TransformerEncoder makes it, set its use_nested_tensor = False: real tokens stay "
                "the same",
            )
        wire = slot.wire(site)
        if wire is not None:
            args, kwargs = sides.enter(wire, layer, args, kwargs)
        elif isinstance(adapter, ChannelAdapter) and site.slot == "input":
            fn: Callable[[Tensor], Tensor] = adapter
            if _shifts_after(layer, adapter):
                fn = partial(adapter, with_shift=False)
            if slot.noise is not None:
                fn = partial(slot.noise.around, fn, channel_dim=site.channel_dim)
            args, kwargs = KINDS[site.kind].map_input(args, kwargs, fn)
        else:
            continue
        changed = True
    return (args, kwargs) if changed else None


def _after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    slot = _slot(layer)
    weight: Callable[[], tuple[Tensor, Tensor | None]] | None = (
        None  # the adapted one, where a weight map acts here as well
    )
    for adapter, site in slot.current():
        wire = slot.wire(site)
        if wire is not None:
            output = sides.leave(wire, layer, args, kwargs, output)
            continue
        kind = KINDS[site.kind]
        op = kind.operator(layer)
        if isinstance(adapter, WeightAdapter):
            frozen, bias = _stored(layer, op, site), layer._parameters.get(op.bias)
            weight = partial(fold_weight, op, frozen, bias, adapter.reparameterize)
            if site.owner is None:
                x = args[0] if args else kwargs["input"]
                assert kind.run is not None
                added = adapter.branch(Call(x, partial(kind.run, layer), output, frozen, bias))
                output = output + (added if slot.noise is None else slot.noise(added, op.channel_dim))
            continue
        if site.owner is not None:
            continue
        assert isinstance(adapter, ChannelAdapter)
        if site.slot == "output":
            noise = slot.noise
            output = adapter(output) if noise is None else noise.around(adapter, output, channel_dim=op.channel_dim)
        elif _shifts_after(layer, adapter):
            shift = adapter.shift()
            present = weight()[0] if weight is not None else _stored(layer, op, site)
            assert shift is not None
            moved = input_shift(op, present.to(shift.dtype), shift).reshape(-1, *[1] * (-op.channel_dim - 1))
            if slot.noise is not None:
                moved = moved * slot.noise.factors(output, op.channel_dim)
            output = output + moved.to(output.dtype)
    return output


def _shadow(owner: nn.Module, args: tuple[Any, ...]) -> None:
    """Before ``owner`` runs: the folded weights of the layers whose weights it reads, in place of the stored ones.

    An entry in ``__dict__`` wins over ``_parameters`` in attribute look-up: the forward sees the adapted weight
    while names, keys and identity of the parameter stay as they are. :func:`_unshadow` always removes it.
    """
    owner.__dict__[_TURN].begin()
    for path in owner.__dict__[_SHADOWED]:
        layer = owner.get_submodule(path) if path else owner
        _drop_shadow(layer)  # one that an interrupt (Ctrl-C) left would be folded into
        for adapter, site in _slot(layer).current():
            if site.owner is None:
                continue
            op = KINDS[site.kind].operator(layer)
            stored, stored_bias = _stored(layer, op, site), layer._parameters.get(op.bias)
            weight, bias = layer.__dict__.get(op.weight, stored), layer.__dict__.get(op.bias, stored_bias)
            folded, folded_bias = fold_site(op, site, adapter, weight, bias, _as_is)
            layer.__dict__[op.weight] = folded.to(stored.dtype)
            if folded_bias is not None and folded_bias is not stored_bias:
                layer.__dict__[op.bias] = folded_bias.to(stored.dtype)


def _unshadow(owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not owner.__dict__[_TURN].end():
        return
    layers = {path: owner.get_submodule(path) if path else owner for path in owner.__dict__[_SHADOWED]}
    shadows = {path: _drop_shadow(layer) for path, layer in layers.items()}
    for path, weight in shadows.items():
        if path and weight is not None and output is not None:  # a layer's own forward is one module's, kept whole
            require_recorded(weight, tensors_of(output), type(owner).__name__)


def _drop_shadow(layer: nn.Module) -> Tensor | None:
    """Take the folded weight away, if there is one, and return it."""
    kind = kind_of(layer)
    if kind is None:
        return None
    op = kind.operator(layer)
    layer.__dict__.pop(op.bias, None)
    return layer.__dict__.pop(op.weight, None)


def _stored(layer: nn.Module, op: Operator, site: Site) -> nn.Parameter:
    weight = layer._parameters.get(op.weight)
    if weight is None:
        raise SiteError(NO_WEIGHT, where=site.path, remedy=KEEP_WEIGHT)
    return weight


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


def host(model: nn.Module, site: Site, name: str, adapter: Adapter) -> None:
    """Put ``adapter`` on the site's host in ``model`` under ``name``, inactive."""
    layer = model.get_submodule(site.path)
    slot = layer._modules.get(SLOT)
    if slot is None:
        slot = Slot()
        layer.add_module(SLOT, slot)
        layer.register_forward_pre_hook(_before, with_kwargs=True)
        # First of all hooks behind the layer: what a user's hook changes is changed for a merged model as well.
        layer.register_forward_hook(_after, with_kwargs=True, prepend=True)
    assert isinstance(slot, Slot)
    if site.owner is not None:
        owner = model.get_submodule(site.owner)
        if _SHADOWED not in owner.__dict__:
            setattr(owner, _SHADOWED, ())
            setattr(owner, _TURN, Turn(site.owner))
            owner.register_forward_pre_hook(_shadow)
            # The shadowed weight must go also when the forward raises.
            owner.register_forward_hook(_unshadow, always_call=True)
        path = site.path.removeprefix(site.owner).removeprefix(".")
        shadowed = owner.__dict__[_SHADOWED]
        setattr(owner, _SHADOWED, tuple(dict.fromkeys((*shadowed, path))))
    slot[site.entry(name)] = adapter
    slot.sites.setdefault(name, []).append(site)
    if site.route is not None:
        slot.wires[site.entry(name)] = sides.wire(model, slot, name, site)
    adapter.train(layer.training)


def hosted(model: nn.Module) -> dict[str, Slot]:
    """Host path -> slot."""
    return {p: m._modules[SLOT] for p, m in model.named_modules() if isinstance(m._modules.get(SLOT), Slot)}  # type: ignore[misc]


def nearest_parameter(model: nn.Module, path: str) -> nn.Parameter:
    """A parameter of the module at ``path``, or of the nearest one around it."""
    while (found := next(model.get_submodule(path).parameters(), None)) is None:
        path = path.rpartition(".")[0]
    return found


def adapters_of(model: nn.Module, sites: Iterable[Site], name: str) -> dict[str, Adapter]:
    """Site key -> the adapter called ``name`` there.

    Raises:
        SiteError: a host was replaced, removed or copied inside the model since; its adapter went with it.
    """
    slots = {path: slot for path, slot in hosted(model).items() if name in slot.sites}
    found = {site.key: slots[site.path].at(site, name) for site in sites if site.path in slots}
    missing = next((site.path for site in sites if site.path not in slots), None)
    added = next(iter(slots.keys() - {site.path for site in sites}), None)
    if missing is not None or added is not None:
        verb = "replaced or removed" if missing is not None else "added with a copy of its adapter"
        raise SiteError(
            f"a layer was {verb} after adapter {name!r} was attached",
            where=missing if missing is not None else added,
            remedy=REATTACH,
        )
    return found


def unhost(model: nn.Module, name: str | None = None) -> None:
    """Remove the adapter called ``name``, or every slot and hook of refold, from its hosts."""
    for path, slot in hosted(model).items():
        layer = model.get_submodule(path)
        _drop_shadow(layer)  # an interrupt (Ctrl-C) inside a forward skips even hooks that are always called
        for key in [key for key in slot.sites if name in (None, key)]:
            for site in slot.sites.pop(key):
                del slot[site.entry(key)]
                slot.wires.pop(site.entry(key), None)
        if not slot.sites:
            del layer._modules[SLOT]
            remove_hooks(layer, _before, _after)
    for module in model.modules():
        if sides.untap(module, name):
            remove_hooks(module, *sides.TAP_HOOKS)
        if name is None and module.__dict__.pop(_SHADOWED, None) is not None:
            del module.__dict__[_TURN]
            remove_hooks(module, _shadow, _unshadow)


def hooks_left(model: nn.Module) -> int:
    """Number of refold's hooks left in the model; 0 after merge and detach."""
    ours = {_before, _after, _shadow, _unshadow, *FREEZING_HOOKS, *sides.TAP_HOOKS}
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
        slot.active = name if name in slot.sites else None
        for key in slot.sites:
            for site in slot.sites[key]:
                slot.at(site, key).requires_grad_(key == name)


def unused(model: nn.Module, name: str) -> list[str]:
    """Paths of the hosts that never ran with the side adapter called ``name``."""
    wires = ((path, wire) for path, slot in hosted(model).items() for wire in slot.wires.values())
    return [path for path, wire in wires if wire.name == name and not wire.used]


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
