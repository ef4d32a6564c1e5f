"""What side adapters need of a forward besides their host's own call: the residual stream, and the grid of the tokens.

Hooks are module-level functions, as in :mod:`refold.hosting`; what they note is in a :class:`Wire`, which the host's
slot and the tapped module refer to. A note is overwritten by the next call and dropped when the model's forward ends,
so a gradient checkpoint around a whole branch, which runs it again, finds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.adapters import Adapter, Layout, SideAdapter, TokenAdapter
from refold.errors import SiteError
from refold.sites import Site

if TYPE_CHECKING:
    from refold.hosting import Slot

__all__ = ["TAP_HOOKS", "Wire", "enter", "leave", "map_output", "untap", "wire"]

#: In the ``__dict__`` of a tapped module, and of the model: the wires that it feeds.
_WIRES = "_refold_wires"
#: Slots that read the residual stream before their host runs.
_STREAM = frozenset({"stream", "sum", "before"})


class Wire:
    """What was seen of the present forward on behalf of one side adapter.

    Attributes:
        slot, name, site: the adapter: the host's slot, the adapter's name in the model, and its site.
        value: what was read, or computed, before the host ran.
        grid: rows and columns of the tokens.
        used: whether the host ran with the adapter.
    """

    def __init__(self, slot: Slot, name: str, site: Site) -> None:
        self.slot, self.name, self.site = slot, name, site
        self.value: Tensor | None = None
        self.grid: tuple[int, int] | None = None
        self.used = False

    @property
    def adapter(self) -> Adapter:
        found = self.slot[self.site.entry(self.name)]
        assert isinstance(found, Adapter)
        return found

    def is_active(self) -> bool:
        return self.slot.active == self.name

    def take(self) -> Tensor:
        """What was read before the host ran; only once."""
        value, self.value = self.value, None
        if value is None:
            raise SiteError(
                "the residual stream that its adapter reads was not seen in this call",
                where=self.site.path,
                remedy=f"Run {self.site.route.source if self.site.route else 'its source'} in the same call: put "
                "gradient checkpoints around whole blocks",
            )
        return value

    def layout(self) -> Layout:
        route = self.site.route
        return Layout(self.site.channel_dim, route.prefix if route else 0, self.grid, self.site.path)

    def run(self, x: Tensor) -> Tensor:
        """What the adapter adds, for features ``x``."""
        adapter = self.adapter
        assert isinstance(adapter, SideAdapter)
        with _precision(x):
            return adapter(x, self.layout())


def _precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast to the dtype of low-precision features, which full-precision adapters could not multiply."""
    kind = x.device.type
    if x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(kind):
        return torch.autocast(kind, dtype=x.dtype)
    return nullcontext()


# -- around the host ----------------------------------------------------------------------------------------------


def enter(wire: Wire, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The host's call with the adapter's tokens in it."""
    adapter = wire.adapter
    if not isinstance(adapter, TokenAdapter):
        return args, kwargs
    layout = wire.layout()
    return _map_input(args, kwargs, lambda x: adapter.insert(x, layout))


def leave(wire: Wire, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The host's output with what the adapter adds."""
    adapter, slot = wire.adapter, wire.site.slot
    if not wire.used:
        wire.used = True
    if isinstance(adapter, TokenAdapter):
        layout = wire.layout()
        return map_output(output, lambda y: adapter.remove(y, layout))
    if slot == "output":
        return map_output(output, lambda y: y + wire.run(y).to(y.dtype))
    if slot == "sum":
        stream = wire.take()
        return map_output(output, lambda y: y + wire.run(stream + y).to(y.dtype))
    if slot == "parallel":
        delta = wire.run(_first(args, kwargs))
    elif slot == "before":  # computed where the branch began
        delta = wire.take()
    else:
        delta = wire.run(wire.take())
    return map_output(output, lambda y: y + delta.to(y.dtype))


def map_output(output: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``output`` with ``fn`` applied to its first tensor, which is the features where a module returns more."""
    if isinstance(output, Tensor):
        return fn(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and type(output) is tuple:
        return (fn(output[0]), *output[1:])
    raise SiteError(f"an output of type {type(output).__name__} holds no features an adapter could add to")


def _map_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (fn(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: fn(kwargs[first])}


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


# -- taps ---------------------------------------------------------------------------------------------------------


def _wires(module: nn.Module, role: str) -> list[Wire]:
    return [wire for kind, wire in module.__dict__.get(_WIRES, ()) if kind == role and wire.is_active()]


def _read_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a module that reads the residual stream."""
    changed = False
    for found in _wires(module, "source"):
        if found.site.slot in _STREAM:
            found.value = _first(args, kwargs)
        if found.site.slot == "before":
            assert found.value is not None
            found.value = delta = found.run(found.value)
            args, kwargs = _map_input(args, kwargs, lambda x, delta=delta: x + delta.to(x.dtype))
            changed = True
    return (args, kwargs) if changed else None


def _read_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Behind the norm that reads the residual stream."""
    for found in _wires(module, "source"):
        if found.site.slot == "normed":
            found.value = output


def _read_grid(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for found in _wires(module, "grid"):
        assert found.site.route is not None
        rows = output.shape[-2] if found.site.route.grid_first else output.shape[-3]
        columns = output.shape[-1] if found.site.route.grid_first else output.shape[-2]
        found.grid = (int(rows), int(columns))


def _release(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """When the model's forward ends, also by an exception."""
    for found in _wires(model, "model"):
        found.value = None
        if isinstance(found.adapter, SideAdapter):
            found.adapter.release()


#: Every hook this file puts on modules.
TAP_HOOKS = (_read_input, _read_output, _read_grid, _release)


def wire(model: nn.Module, slot: Slot, name: str, site: Site) -> Wire:
    """A new wire for a site of the adapter ``name``, with its taps in ``model``."""
    new, route = Wire(slot, name, site), site.route
    assert route is not None
    if route.source:
        source = model.get_submodule(route.source)
        _tap(source, "source", new)
        if _read_input not in source._forward_pre_hooks.values():
            source.register_forward_pre_hook(_read_input, with_kwargs=True)
            source.register_forward_hook(_read_output)
    if route.grid:
        grid = model.get_submodule(route.grid)
        _tap(grid, "grid", new)
        if _read_grid not in grid._forward_hooks.values():
            grid.register_forward_hook(_read_grid)
    _tap(model, "model", new)
    if _release not in model._forward_hooks.values():
        model.register_forward_hook(_release, always_call=True)
    return new


def _tap(module: nn.Module, role: str, new: Wire) -> None:
    module.__dict__.setdefault(_WIRES, []).append((role, new))


def untap(module: nn.Module, name: str | None = None) -> bool:
    """Forget the wires a module feeds, those of the adapter ``name`` or all; whether none is left of some."""
    wires = module.__dict__.pop(_WIRES, None)
    left = [(role, wire) for role, wire in wires or () if name is not None and wire.name != name]
    if left:
        module.__dict__[_WIRES] = left
    return wires is not None and not left
