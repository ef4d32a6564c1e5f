"""What side adapters need of a forward besides their host's own call: the residual stream, and the grid of the tokens.

Hooks are module-level functions, as in :mod:`refold.hosting`; what they note is in a :class:`refold.wires.Wire`, which
the host's slot and the tapped module refer to. A note is overwritten by the next call and dropped when the model's
forward ends, so a gradient checkpoint around a whole branch, which runs it again, finds its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from refold.adapters import SideAdapter, TokenAdapter
from refold.adapters.recall import Forward
from refold.errors import SiteError
from refold.positions import Insertion, cover, spread, uncover
from refold.probe import tensors_of
from refold.sites import Site
from refold.wires import Wire

if TYPE_CHECKING:
    from refold.hosting import Slot

__all__ = ["TAP_HOOKS", "enter", "leave", "map_output", "untap", "wire"]

#: In the ``__dict__`` of a tapped module, and of the model: the wires that it feeds.
_WIRES = "_refold_wires"
#: Slots that read the residual stream before their host runs.
_STREAM = frozenset({"stream", "sum", "before", "tokens"})


# -- around the host ----------------------------------------------------------------------------------------------


def enter(
    wire: Wire, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The host's call with the adapter's tokens in it."""
    adapter, route = wire.adapter, wire.site.route
    if not isinstance(adapter, TokenAdapter):
        return args, kwargs
    assert route is not None
    x, new = _first(args, kwargs), None
    if route.source:
        new = _behind_norm(wire, adapter, route.span)
        new = new.repeat_interleave(x.shape[0] // new.shape[0], dim=0)  # every window has those of its image
    elif route.span in ("", "first"):
        new = adapter.tokens(x.shape[0])
        adapter.inside = route.span != ""
    insertion = Insertion(x.shape[1] - (adapter.count if new is None else 0), route.prefix, adapter.count)
    uncover(wire.covered)  # an interrupt (Ctrl-C) inside a forward skips even hooks that are always called
    wire.covered += cover((host.get_submodule(path) for path in route.positions), insertion)
    if len(args) + len(kwargs) > 1:
        args, kwargs = (*args[:1], *spread(args[1:], insertion)), spread(kwargs, insertion)
    if new is None:
        return args, kwargs
    parts = (x[:, : route.prefix], new.to(x.dtype), x[:, route.prefix :])
    return _map_input(args, kwargs, lambda _: torch.cat(parts, dim=1))


def _behind_norm(wire: Wire, adapter: TokenAdapter, span: str) -> Tensor:
    """The tokens (B, p, C) as the norm gives them whose result was cut into windows, with no place for them in it."""
    x, norm = wire.take(), wire.norm
    if span in ("", "first"):
        tokens = adapter.tokens(x.shape[0])
    else:
        tokens, adapter.carried = adapter.carried, None
    if tokens is None:
        raise SiteError(
            "the prompts that the block before made were not seen in this call",
            where=wire.site.path,
            remedy="Put gradient checkpoints around whole stages, or use deep=True",
        )
    wire.stream = tokens if span in ("first", "inside") else None
    assert norm is not None
    wires = norm.__dict__.pop(_WIRES)  # of this call nobody else is to know
    try:
        return norm(tokens.to(x.dtype))
    finally:
        norm.__dict__[_WIRES] = wires


def _leave_tokens(wire: Wire, adapter: TokenAdapter, output: Any) -> Any:
    """The host's output without the tokens, unless they stay in the sequence."""
    route = wire.site.route
    assert route is not None
    if not route.source and route.span in ("first", "inside"):
        return output
    adapter.inside = False
    first, last = route.prefix, route.prefix + adapter.count
    stream, wire.stream = wire.stream, None

    def without(y: Tensor) -> Tensor:
        if stream is not None:  # the mean over the windows of an image goes on to the next host
            adapter.carried = stream + y[:, first:last].unflatten(0, (stream.shape[0], -1)).mean(1)
        return torch.cat((y[:, :first], y[:, last:]), 1)

    return map_output(output, without)


def leave(wire: Wire, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The host's output with what the adapter adds."""
    adapter, slot = wire.adapter, wire.site.slot
    if wire.running:
        return output
    if wire.site.route is not None and wire.site.route.turns and wire.value is None:
        return output  # another branch's turn
    if not wire.used:
        wire.used = True
    if isinstance(adapter, TokenAdapter):
        return _leave_tokens(wire, adapter, output)
    assert isinstance(adapter, SideAdapter)
    adapter.arrive(_first(args, kwargs), wire.site.path)
    if slot == "output":
        return map_output(output, lambda y: wire.join(y, wire.run(y)))
    if slot == "readout":
        return map_output(output, partial(_stand_in, wire))
    if slot == "again":
        others = _map_input(args, kwargs, lambda _: None)  # whoever runs the host again would keep its input alive
        wire.run(_first(args, kwargs), partial(_again, wire, host, *others))
        return output
    if slot == "sum":
        stream = wire.take()
        return map_output(output, lambda y: wire.join(y, wire.run(stream + y)))
    if slot == "parallel":
        delta = wire.run(_first(args, kwargs))
    elif slot == "before":  # computed where the branch began
        delta = wire.take()
    else:
        delta = wire.run(wire.take())
    return map_output(output, lambda y: wire.join(y, delta))


def _stand_in(wire: Wire, own: Tensor) -> Tensor:
    wire.own, wire.stand_in = own, wire.join(own, wire.run(own))
    return wire.stand_in


def _again(wire: Wire, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Tensor:
    args, kwargs = _map_input(args, kwargs, lambda _: x)
    wires = host.__dict__.pop(_WIRES, None)  # of this call nobody else is to know
    wire.running = True
    try:
        return next(tensors_of(host(*args, **kwargs)))
    finally:
        wire.running = False
        if wires is not None:
            host.__dict__[_WIRES] = wires


def map_output(output: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``output`` with ``fn`` applied to its first tensor, which is the features where a module returns more."""
    if isinstance(output, Tensor):
        return fn(output)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and type(output) is tuple:
        return (fn(output[0]), *output[1:])
    raise SiteError(f"an output of type {type(output).__name__} holds no features an adapter could add to")


def _map_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], fn: Callable[[Tensor], Any]
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
            args, kwargs = _map_input(args, kwargs, partial(found.join, delta=delta))
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


def _read_own(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a module that leads to further blocks: the host's own output in place of what stands in for it."""
    changed = False
    for found in _wires(module, "reader"):
        own = found.own
        if own is None or _first(args, kwargs) is not found.stand_in:
            raise SiteError(
                f"it was not given what {found.site.path} returned in this call",
                where=found.site.path,
                remedy="Turn gradient checkpointing off (this backbone keeps nothing for a backward pass), and run all "
                "blocks in one call",
            )
        args, kwargs = _map_input(args, kwargs, lambda _, own=own: own)
        changed = True
    return (args, kwargs) if changed else None


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """When the model's forward begins."""
    wires = _wires(model, "model")
    for found in wires:
        found.turn.begin()
    adapters = [found.adapter for found in wires if isinstance(found.adapter, SideAdapter)]
    forward = None
    # Compiled code keeps what a backward pass needs, and runs nothing again but as it decides itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(a.reruns for a in adapters):
        forward = Forward(model, args, kwargs)
    for adapter in adapters:
        adapter.begin(forward)


def _require_out(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """When the model's forward ends, by itself: no tokens may have stayed in its sequence."""
    for found in _wires(model, "model"):
        if isinstance(found.adapter, TokenAdapter) and found.adapter.inside:
            raise SiteError(
                "prompts were put in here, and no block took them out again",
                where=found.site.path,
                remedy="Run all blocks, or use deep=True, where each takes out its own",
            )


def _release(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """When the model's forward ends, also by an exception."""
    # torch.compile traces this apart, and warns of gradients if it so much as looks at the output.
    for found in _wires(model, "model"):
        if not found.turn.end():
            continue
        found.value = found.stream = found.own = found.stand_in = None
        found.running = False  # an interrupt (Ctrl-C) may have left it
        adapter = found.adapter
        if isinstance(adapter, (SideAdapter, TokenAdapter)):
            adapter.release()


def _uncover(host: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """When the forward of a host of tokens ends, also by an exception."""
    for _, found in host.__dict__.get(_WIRES, ()):
        uncover(found.covered)


#: Every hook this file puts on modules.
TAP_HOOKS = (_read_input, _read_output, _read_grid, _read_own, _begin, _require_out, _release, _uncover)


def wire(model: nn.Module, slot: Slot, name: str, site: Site) -> Wire:
    """A new wire for a site of the adapter ``name``, with its taps in ``model``."""
    new, route = Wire(slot, name, site), site.route
    assert route is not None
    if route.source:
        source = model.get_submodule(route.source)
        new.norm = source if site.slot == "tokens" else None
        _tap(source, "source", new)
        if _read_input not in source._forward_pre_hooks.values():
            source.register_forward_pre_hook(_read_input, with_kwargs=True)
            source.register_forward_hook(_read_output)
    if route.grid:
        grid = model.get_submodule(route.grid)
        _tap(grid, "grid", new)
        if _read_grid not in grid._forward_hooks.values():
            grid.register_forward_hook(_read_grid)
    for path in route.readers:
        reader = model.get_submodule(path)
        _tap(reader, "reader", new)
        if _read_own not in reader._forward_pre_hooks.values():
            reader.register_forward_pre_hook(_read_own, with_kwargs=True)
    if site.slot == "tokens":
        host = model.get_submodule(site.path)
        _tap(host, "host", new)
        if _uncover not in host._forward_hooks.values():
            host.register_forward_hook(_uncover, always_call=True)
    _tap(model, "model", new)
    if _release not in model._forward_hooks.values():
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_require_out)
        model.register_forward_hook(_release, always_call=True)
    return new


def _tap(module: nn.Module, role: str, new: Wire) -> None:
    module.__dict__.setdefault(_WIRES, []).append((role, new))


def untap(module: nn.Module, name: str | None = None) -> bool:
    """Forget the wires a module feeds, those of the adapter ``name`` or all; whether none is left of some."""
    wires = module.__dict__.pop(_WIRES, None)
    for role, wire in wires or ():
        if role == "host" and name in (None, wire.name):
            uncover(wire.covered)  # left by an interrupt
    left = [(role, wire) for role, wire in wires or () if name is not None and wire.name != name]
    if left:
        module.__dict__[_WIRES] = left
    return wires is not None and not left
