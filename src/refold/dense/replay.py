"""What an encoder gives, made of what its frozen backbone computed once.

E3VA's highway and LST's side network read the backbone and give nothing back before a map is read out, so their
adapters can run on what they read without the backbone around them. Hooks on the adapters note, in one forward, what
each is given and in which order; a replay calls them in this order with the same. What the body makes of what is read
out must be the layout alone, or one frozen LayerNorm and the layout; or, of the last result, frozen modules in a row
with no more than layouts and pooling between them, as in front of a classifier's head. All this is proved for every
image size, with random adapters, before it is used. Maps that no adapter changes are kept themselves: all of them
without adapters (a linear probe), those of the early stages with LST.

As in evaluation: what draws in a backbone in training mode (DropPath, dropout) is off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from refold.adapters import Layout
from refold.adapters.ladder import Carrier
from refold.dense.fed import Fed
from refold.dense.tails import Call, Tail, calls_behind, find_tail
from refold.errors import SiteError
from refold.hosting import hosted
from refold.probe import example_input, tensors_of
from refold.state import is_compiled_wrapper, state_of
from refold.training.inference import in_evaluation
from refold.wires import Wire

__all__ = ["Replay", "Tap", "precision_of"]

_NOISE = 0.1  # standard deviation of what proofs add to the adapters, of which some start as nothing


@dataclass(frozen=True)
class Tap:
    """One tensor that the backbone computed.

    Attributes:
        shape: of one image's.
        dtype: as computed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class _Step:
    """One adapter's call.

    Attributes:
        wire: the adapter's.
        tap: what it reads.
        kept: whether it looks at more than the shape.
        grid, rerun: of its layout.
    """

    wire: Wire
    tap: Tap
    kept: bool
    grid: tuple[int, int] | None
    rerun: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class _Program:
    """What an encoder does with images of one size.

    Attributes:
        steps: the adapters' calls.
        tails: how each map is made of their results; None for a map that is kept itself.
        taps: what is kept: what adapters read, then maps.
    """

    steps: tuple[_Step, ...]
    tails: tuple[Tail | None, ...]
    taps: tuple[Tap, ...]


class Replay:
    """An encoder in two halves: what its frozen backbone computes, and what is made of it.

    Args:
        encoder: its body is frozen but for what is behind the maps, and carries E3VA, LST or nothing.

    Attributes:
        encoder: as above.
        reads: what is kept of a forward, as plain data: the same for every rank of an adapter.

    Raises:
        SiteError: an adapter changes what the backbone computes, or a part of the backbone trains.
    """

    def __init__(self, encoder: Fed) -> None:
        self.encoder = encoder
        self._wires = _reading(encoder.body, encoder.behind)
        self._state = state_of(encoder.body)
        self._active = None if self._state is None else self._state.active
        self._programs: dict[tuple[tuple[int, int], str], _Program] = {}
        self.reads: list[list[Any]] = [[wire.site.path, wire.site.slot] for wire in self._wires if _reads(wire)]
        self.reads += encoder.gives

    def taps(self, size: tuple[int, int]) -> tuple[Tap, ...]:
        """What is kept of an image of this size (height, width).

        Raises:
            SiteError: the forward cannot be replayed.
        """
        return self._program(size).taps

    def record(self, images: Tensor) -> list[Tensor]:
        """Run the backbone on images (B, C, H, W), in evaluation mode, and copy its taps, (B, ...) each.

        Raises:
            SiteError: as :meth:`taps`.
        """
        program = self._program((images.shape[-2], images.shape[-1]))
        taps, maps = self._record(images)
        return taps + [one.contiguous() for one, tail in zip(maps, program.tails, strict=True) if tail is None]

    def maps(self, taps: Sequence[Tensor], size: tuple[int, int]) -> list[Tensor]:
        """The encoder's maps of images of this size from their taps, differentiable by the adapters.

        Args:
            taps: as :meth:`record` gave them, in their dtypes.

        Raises:
            SiteError: as :meth:`taps`.
        """
        program = self._program(size)
        count = sum(step.kept for step in program.steps)
        kept, results = iter(taps[count:]), self._results(program.steps, taps[:count])
        return [next(kept) if tail is None else tail(results) for tail in program.tails]

    def noise(self, size: tuple[int, int], count: int = 1) -> Tensor:
        """Images of noise as the encoder takes them, the same for the same arguments."""
        return _noise((count, *_channels(self.encoder.body), *size), self.encoder.body)

    # -- forwards -----------------------------------------------------------------------------------------------

    def _watched(self, images: Tensor, note: Callable[[Wire, Tensor, Layout], None]) -> list[Tensor]:
        """The maps, in evaluation mode; ``note`` is told of every adapter what it was given."""
        handles = [wire.adapter.register_forward_pre_hook(partial(_tell, partial(note, wire))) for wire in self._wires]
        try:
            # Compiled code does not see hooks that are added later.
            eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
            with torch.no_grad(), in_evaluation(self.encoder), self.encoder.fed(None), eager:
                return self.encoder(images)
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What the adapters read, copied, and the maps."""
        found: list[Tensor] = []

        def note(wire: Wire, x: Tensor, layout: Layout) -> None:
            if _reads(wire):
                found.append(x.detach().clone())  # the backbone may go on in place

        return found, self._watched(images, note)

    def _results(self, steps: Sequence[_Step], taps: Sequence[Tensor]) -> list[tuple[Wire, Tensor]]:
        """What stands in for the results that are read out, and who gives it."""
        given, results = iter(taps), []
        adapters: list[Carrier] = [step.wire.adapter for step in steps]  # type: ignore[misc]
        with _hosts_in_evaluation(self.encoder.body, steps):
            for adapter in adapters:
                adapter.begin(None)
            try:
                for step, adapter in zip(steps, adapters, strict=True):
                    if step.kept:
                        x = next(given)
                    else:
                        x = taps[0].new_empty((), dtype=step.tap.dtype).expand(len(taps[0]), *step.tap.shape)
                    adapter.arrive(x, step.wire.site.path)
                    step.wire.grid = step.grid
                    added = step.wire.run(x, step.rerun)
                    if added is not None:
                        results.append((step.wire, step.wire.join(x, added)))
            finally:
                for adapter in adapters:
                    adapter.release()
        return results

    # -- proofs -------------------------------------------------------------------------------------------------

    def _program(self, size: tuple[int, int]) -> _Program:
        if state_of(self.encoder.body) is not self._state or (self._state and self._state.active != self._active):
            raise SiteError(
                "other adapters are on it than when its features were cached",
                where=type(self.encoder.body).__name__,
                remedy="Make the cache anew, once the adapter that trains is attached and active",
            )
        key = size, precision_of(self.encoder.body)
        if key not in self._programs:
            try:
                self._programs[key] = self._prove(size)
            except (AssertionError, RuntimeError, ValueError) as error:
                raise SiteError(
                    f"its features of {size[0]}x{size[1]} images cannot be replayed: {type(error).__name__}: {error}",
                    where=type(self.encoder.body).__name__,
                    remedy="Train without cached features",
                ) from error
        return self._programs[key]

    @torch.no_grad()
    def _prove(self, size: tuple[int, int]) -> _Program:
        """Find the program with one image, and prove it with two others and random adapters."""
        one, two = self.noise(size), self.noise(size, 2)
        steps: list[_Step] = []

        def note(wire: Wire, x: Tensor, layout: Layout) -> None:
            if x.shape[0] != 1 or any(wire is step.wire for step in steps):
                raise SiteError("its adapter does not read whole images, once each", where=wire.site.path)
            tap = Tap(tuple(x.shape[1:]), x.dtype)
            steps.append(_Step(wire, tap, _reads(wire), layout.grid, layout.rerun))

        self._watched(one, note)
        taps, plain = self._record(two)
        adapters = {id(p) for wire in self._wires for p in wire.adapter.parameters()}
        noisy: dict[str, Tensor] = {
            f"encoder.{name}": nn.Parameter(p + _NOISE * _noise(p.shape, self.encoder.body).to(p), requires_grad=False)
            for name, p in self.encoder.named_parameters()
            if id(p) in adapters
        }
        both = _Both(self.encoder, lambda: (self._watched(two, _nothing), self._results(steps, taps)))
        readers = [step.wire.site.path for step in steps]
        calls: AbstractContextManager[list[Call]] = nullcontext([])
        if readers:
            calls = calls_behind(self.encoder.body, readers[-1], self.encoder.behind)
        with calls as behind:
            maps, results = functional_call(both, noisy, ())
        norms = _norms(self.encoder.body, self._wires)
        tails = tuple(
            None if torch.equal(one, before) else find_tail(k, one, results, norms, behind)
            for k, (one, before) in enumerate(zip(maps, plain, strict=True))
        )
        kept = [Tap(tuple(m.shape[1:]), m.dtype) for m, tail in zip(plain, tails, strict=True) if tail is None]
        return _Program(tuple(steps), tails, (*(step.tap for step in steps if step.kept), *kept))


class _Both(nn.Module):
    """Calls a function where torch can put other parameters into the encoder."""

    def __init__(self, encoder: Fed, run: Callable[[], Any]) -> None:
        super().__init__()
        self.encoder, self._run = encoder, run

    def forward(self) -> Any:
        return self._run()


def precision_of(body: nn.Module) -> str:
    """What the backbone computes in now: autocast's dtype, or that of its parameters."""
    parameter = next(p for p in body.parameters() if p.is_floating_point())
    kind = parameter.device.type
    if torch.is_autocast_enabled(kind):
        return f"autocast to {torch.get_autocast_dtype(kind)}"
    return str(parameter.dtype)


def _reading(body: nn.Module, behind: Iterable[str]) -> list[Wire]:
    """The wires of the adapters in use, each of which only reads the backbone; what is ``behind`` it may train."""
    if is_compiled_wrapper(body):
        raise SiteError("it is a compiled wrapper", where="body", remedy="Compile after caching, or not at all")
    state, wires = state_of(body), []
    for path, slot in hosted(body).items():
        for adapter, site in slot.current():
            wire = slot.wire(site)
            if wire is None or not (isinstance(adapter, Carrier) and adapter.beside):
                assert state is not None
                raise SiteError(
                    f"{type(state.record().method).__name__} changes what the backbone computes, and does so at every "
                    "step: it cannot be computed once",
                    where=path,
                    remedy="Cache features for E3VA, LST or LinearProbe, or train without cached features",
                )
            wires.append(wire)
    trains = [*(wire.adapter for wire in wires), *map(body.get_submodule, behind)]
    ours = {id(p) for module in trains for p in module.parameters()}
    trained = next((name for name, p in body.named_parameters() if p.requires_grad and id(p) not in ours), None)
    if trained is not None:
        raise SiteError(
            "it trains, and what the backbone computes changes with it",
            where=trained,
            remedy="Attach E3VA, LST or LinearProbe (around feature maps with trainable=()), or train without cached "
            "features",
        )
    order = {} if state is None or not wires else {site.key: k for k, site in enumerate(state.record().sites)}
    return sorted(wires, key=lambda wire: order[wire.site.key])


def _reads(wire: Wire) -> bool:
    """Whether an adapter looks at more of what it is given than the shape."""
    assert isinstance(wire.adapter, Carrier)
    return wire.adapter.reads


def _tell(note: Callable[[Tensor, Layout], None], adapter: nn.Module, args: tuple[Tensor, Layout]) -> None:
    note(*args)


def _nothing(wire: Wire, x: Tensor, layout: Layout) -> None:
    pass


@contextmanager
def _hosts_in_evaluation(body: nn.Module, steps: Iterable[_Step]) -> Iterator[None]:
    """The backbone's modules that adapters run again are in evaluation mode, as when the taps were computed."""
    with ExitStack() as stack:
        for step in steps:
            if step.rerun is not None:
                stack.enter_context(in_evaluation(body.get_submodule(step.wire.site.path)))
        yield


def _channels(body: nn.Module) -> tuple[int]:
    example = example_input(body)
    return (next(tensors_of((example.args, example.kwargs))).shape[1],)


def _noise(shape: Sequence[int], body: nn.Module) -> Tensor:
    """Numbers as the body takes them as images; always the same for a shape."""
    parameter = next(p for p in body.parameters() if p.is_floating_point())
    dtype = torch.float32 if torch.is_autocast_enabled(parameter.device.type) else parameter.dtype
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(parameter.device, dtype)


def _norms(body: nn.Module, wires: Iterable[Wire]) -> list[nn.LayerNorm]:
    own = {id(module) for wire in wires for module in wire.adapter.modules()}
    return [m for m in body.modules() if isinstance(m, nn.LayerNorm) and id(m) not in own]
