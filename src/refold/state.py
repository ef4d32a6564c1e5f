"""What refold remembers about a model: one plain object in the model's ``__dict__``, gone after ``detach``.

It is no module and holds no module of the backbone, only names and tensors, so ``deepcopy`` and pickle carry
it along, and ``.to()`` or ``.half()`` leave its exact copies alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refold.adapters import Adapter
from refold.errors import SiteError
from refold.methods import Method
from refold.probe import Example
from refold.sites import Site, Skipped

__all__ = [
    "Kept",
    "Record",
    "State",
    "drop_compiled",
    "get_tensor",
    "is_compiled_wrapper",
    "recompiled_if_replaced",
    "require_state",
    "require_whole",
    "set_tensor",
    "state_of",
]

_KEY = "_refold"


@dataclass
class Record:
    """One named adapter.

    Attributes:
        method: its hyper-parameters.
        sites: where its adapters are.
        skipped: the layers the method left out, with reasons.
        head: module paths of its head.
        owned: names of the backbone's tensors of which it has values of its own: head, parameters trained in
            place, statistics that move.
        trainable: names of the owned ones that are trained.
        values: the owned tensors' values while another adapter is active.
        parked: adapters by host path while the model is merged and nothing of refold may be in it.
        info: what ``describe`` was told: backbone spec, classes, preprocessing, task.
    """

    method: Method
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...] = ()
    head: tuple[str, ...] = ()
    owned: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    trains_statistics: bool = False
    values: dict[str, Tensor] = field(default_factory=dict)
    parked: dict[str, Adapter] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """The folded weights of one adapter, see :mod:`refold.kept`.

    Attributes:
        values: state-dict name -> the folded tensor, in the model's dtype and on its device.
        unfolded: the exact values (CPU) they replace; None for a bias that did not exist.
        folded: their checksums.
        source: checksum of the adapter they were folded from.
    """

    values: dict[str, Tensor]
    unfolded: dict[str, Tensor | None]
    folded: dict[str, int]
    source: int


@dataclass
class State:
    """All named adapters of one model.

    Attributes:
        example: the call that probing used; later checks repeat it.
        requires_grad: every parameter's flag before the first attach.
        base: original values (CPU) of every owned tensor.
        active: the adapter in use, None inside ``disabled``.
        unfolded: while merged, the exact values (CPU) the folds replaced; None for a bias that did not exist.
            Empty with ``keep_base=False``.
        folded: while merged, name -> checksum of the tensors that hold a fold.
        merged: the name of the adapter that is folded in, None while unmerged.
        quantized: while merged with ``dequantize=True``, the parameters that floating ones stand in for.
        source: while merged, checksum of the adapter the folds were computed from.
        kept: folded weights of the adapters switched between while merged; left out of copies and pickles.
    """

    example: Example
    requires_grad: dict[str, bool]
    records: dict[str, Record] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    active: str | None = None
    merged: str | None = None
    unfolded: dict[str, Tensor | None] = field(default_factory=dict)
    folded: dict[str, int] = field(default_factory=dict)
    kept_base: bool = True
    quantized: dict[str, Tensor] = field(default_factory=dict)
    source: int = 0
    kept: dict[str, Kept] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}

    def record(self, name: str | None = None) -> Record:
        """The record of ``name``, or of the adapter in use; raises :class:`SiteError` if there is none."""
        chosen = name if name is not None else self.active or self.merged
        if chosen is None:
            raise SiteError("no adapter is in use here", remedy="Leave refold.disabled first, or name one")
        if chosen not in self.records:
            raise SiteError(f"no adapter named {chosen!r}", remedy=f"Attached: {', '.join(self.records) or 'none'}")
        return self.records[chosen]


def state_of(model: nn.Module) -> State | None:
    """The model's state, or None if nothing is attached."""
    return model.__dict__.get(_KEY)


def require_state(model: nn.Module, verb: str, *, sharded: bool = False) -> State:
    """The model's state; raises :class:`SiteError` naming ``verb`` if nothing is attached.

    Args:
        sharded: whether ``verb`` is possible although no process holds the whole parameters.
    """
    if is_compiled_wrapper(model):
        raise SiteError(
            f"cannot {verb} through a compiled wrapper",
            where=type(model).__name__,
            remedy="Pass the module you compiled",
        )
    require_whole(model, verb, sharded=sharded)
    state = state_of(model)
    if state is None:
        inside = next((path for path, module in model.named_modules() if state_of(module) is not None), None)
        raise SiteError(
            f"cannot {verb}: no adapter is attached",
            where=type(model).__name__,
            remedy="Call refold.attach first" if inside is None else f"Pass its part {inside!r}, which has adapters",
        )
    return state


def store_state(model: nn.Module, state: State | None) -> None:
    if state is None:
        model.__dict__.pop(_KEY, None)
    else:
        model.__dict__[_KEY] = state


def is_compiled_wrapper(model: object) -> bool:
    """Whether ``model`` is what ``torch.compile(module)`` returns; never imports the compiler to find out."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(model, dynamo.eval_frame.OptimizedModule)


def require_whole(model: nn.Module, verb: str, *, sharded: bool = False) -> None:
    """Raise :class:`SiteError` for a wrapper that distributes a model, and for parameters of which this process holds
    a part (unless ``sharded``): folding a part would be wrong without a word.
    """
    if is_instance_of(model, "torch.nn.parallel", "DistributedDataParallel", "DataParallel") or is_instance_of(
        model, "torch.distributed.fsdp", "FullyShardedDataParallel"
    ):
        raise SiteError(
            f"cannot {verb} through {type(model).__name__}",
            where=type(model).__name__,
            remedy="Pass the module inside (model.module); attach before wrapping, so that adapters are synchronised",
        )
    if sharded or "torch.distributed.tensor" not in sys.modules:
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_instance_of(tensor, "torch.distributed.tensor", "DTensor"):
            raise SiteError(
                f"cannot {verb}: the parameter is sharded over processes",
                where=name,
                remedy="Gather it with torch.distributed.checkpoint.state_dict.get_model_state_dict (full_state_dict="
                "True), load that into the same model without fully_shard, and go on there",
            )


def is_instance_of(value: object, module: str, *names: str) -> bool:
    """``isinstance`` with classes of a module that need not be imported: without it there are no instances."""
    found = sys.modules.get(module)
    classes = tuple(cls for name in names if isinstance(cls := getattr(found, name, None), type))
    return isinstance(value, classes)


def drop_compiled() -> None:
    """Forget compiled code that captured a model without its present hooks.

    torch.compile does not guard on hooks by default: compiled code, also that behind a wrapper around the model,
    which nothing here can see, would go on running without the adapters in silence.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def recompiled_if_replaced(model: nn.Module) -> Iterator[None]:
    """Forget compiled code only if a parameter was created, removed or replaced inside.

    New values in the same tensors reach compiled code as they are, unless it was frozen with constants inside.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    before = list(model.parameters())
    try:
        yield
    finally:
        after = list(model.parameters())
        same = len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))
        inductor = sys.modules.get("torch._inductor.config")
        if not same or getattr(inductor, "freezing", False):
            drop_compiled()


def get_tensor(model: nn.Module, name: str) -> Tensor | None:
    """Parameter or buffer by its state-dict name; None if the module has no such tensor."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    # Not by attribute: a weight adapter may be shadowing the parameter, see hosting.
    return module._parameters.get(leaf, module._buffers.get(leaf))


@torch.no_grad()
def set_tensor(model: nn.Module, name: str, value: Tensor | None) -> None:
    """Copy ``value`` into a parameter or buffer, keeping its identity, dtype and device.

    A parameter of another shape (a head with other classes) or one that did not exist (a created bias) is
    replaced, because it cannot be kept; a value that is a parameter itself takes the place as the object it is, so
    that an optimizer which holds it goes on training it.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    current = get_tensor(model, name)
    if value is None:
        module.register_parameter(leaf, None)
    elif current is not None and current.shape == value.shape:
        current.copy_(value)
    elif current is not None and leaf in module._buffers:
        module._buffers[leaf] = value.to(current)
    else:
        like = current if current is not None else next(module.parameters())
        flag = current.requires_grad if current is not None else False
        if isinstance(value, nn.Parameter):
            value.data = value.data.to(like)
        else:
            value = nn.Parameter(value.detach().clone().to(like), requires_grad=flag)
        module.register_parameter(leaf, value)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
