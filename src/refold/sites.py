"""Sites: where adapters can attach to a backbone, and where their fold and their shift would go."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from refold.errors import SiteError
from refold.fold import NORMS, Operator, kind_of, refusal
from refold.probe import Example, Trace, example_input, trace
from refold.roles import MOVED, ROLES

__all__ = ["Layer", "Shift", "Site", "Skipped", "Survey", "head_paths"]

#: Names under which backbones keep their classifier when they do not say so themselves.
_HEAD_NAMES = ("head", "heads", "classifier", "fc")


@dataclass(frozen=True)
class Shift:
    """Where the constant part of a channel map at a layer's input ends up when merged.

    ``target`` is ``"bias"`` (the layer's own), ``"batchnorm"`` (running mean of the only BatchNorm that follows),
    ``"norm"`` (bias of the norm that feeds this layer alone, as ``M^-1 c``), ``"new_bias"`` (created, by
    permission) or ``"none"`` (the adapter is built without a shift). ``path`` is the layer that receives it.
    """

    target: str
    path: str = ""

    def __str__(self) -> str:
        return {
            "bias": "own bias",
            "batchnorm": f"BatchNorm {self.path}",
            "norm": f"norm {self.path}",
            "new_bias": "new bias",
            "none": "none",
        }[self.target]


@dataclass(frozen=True)
class Site:
    """One place for one adapter.

    Attributes:
        path: module path of the host layer.
        slot: ``"input"`` (a channel map before the layer) or ``"weight"`` (a map of its weight).
        kind: name of the layer kind, a key of ``refold.fold.KINDS``.
        width: channels the adapter sees.
        out_width: channels the layer puts out.
        channel_dim: position of the channels in the activation, from the end.
        weight_shape: shape of the host's weight.
        shift: where a shift goes; None for slots without one.
        role: the paper's name of the place, "" if none.
        note: what is worth knowing about the placement.
    """

    path: str
    slot: str
    kind: str
    width: int
    out_width: int
    channel_dim: int
    weight_shape: tuple[int, ...]
    shift: Shift | None = None
    role: str = ""
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """A layer a method would have wanted and why it has no site."""

    path: str
    reason: str


@dataclass(frozen=True)
class Layer:
    """A layer the probe reached and that can be folded into."""

    path: str
    module: nn.Module
    kind: str
    operator: Operator
    role: str = ""
    note: str = ""


class Survey:
    """What a probing forward and the folds' rules say about a backbone: every layer a method may use.

    Args:
        model: any module; left as it was.
        example: what ``attach(example=)`` was given, or None to infer an input.
        head: module paths of the head, which no method adapts.
        allow_new_bias: permission to create biases.

    Raises:
        SiteError: the probing forward fails.
    """

    def __init__(
        self, model: nn.Module, example: Any = None, *, head: Iterable[str] = (), allow_new_bias: bool = False
    ) -> None:
        self.model, self.head, self.allow_new_bias = model, tuple(head), allow_new_bias
        self.example = example_input(model) if example is None else Example.of(example)
        self.trace: Trace = trace(model, self.example)
        self.modules = dict(model.named_modules())
        self.layers: dict[str, Layer] = {}
        self.skipped: list[Skipped] = []
        shared = _shared_parameters(model)
        for path, module in self.modules.items():
            kind = kind_of(module)
            if kind is None or self._in_head(path):
                continue
            reason = self._reason_against(path, module, shared)
            if reason is not None:
                self.skipped.append(Skipped(path, reason))
            else:
                self.layers[path] = Layer(path, module, kind.name, kind.operator(module))

    def _in_head(self, path: str) -> bool:
        return any(path == h or path.startswith(f"{h}.") for h in self.head)

    def _reason_against(self, path: str, module: nn.Module, shared: dict[str, str]) -> str | None:
        if path not in self.trace.calls:
            return "the probing forward never called this layer, so an adapter on it would do nothing"
        return refusal(module) or shared.get(path)

    # -- choosing layers ----------------------------------------------------------------------------------

    def resolve(
        self, sites: str | Iterable[str] | None, default: tuple[str, ...], *, moved: bool, groups: int = 1
    ) -> tuple[list[Layer], list[Skipped]]:
        """The layers that ``sites`` names, in the order of the forward, and those left out with reasons.

        Args:
            sites: roles or module paths (``*`` matches within a path), or None for ``default``.
            default: the roles the method's paper names. If one of them has no layer in this backbone, every
                Linear and every convolution that mixes channels is taken instead.
            moved: accept a role's replacement site where the paper's own cannot fold.
            groups: diagonal blocks of the method's map, for what it may do around grouped convolutions.

        Raises:
            SiteError: a name matches nothing, or only layers that cannot be used.
        """
        if sites is None:
            picked = [self._with_role(role, moved) for role in default]
            if all(picked):
                return self._ordered(layer for group in picked for layer in group), []
            return self._everything(groups)
        names = (sites,) if isinstance(sites, str) else tuple(sites)
        return self._ordered(layer for name in names for layer in self._named(name, moved)), []

    def _with_role(self, role: str, moved: bool) -> list[Layer]:
        patterns, note = ROLES.get(role, ()), ""
        if moved:
            for cls in type(self.model).__mro__:
                family = MOVED.get(f"{cls.__module__}.{cls.__qualname__}", {})
                if role in family:
                    patterns, note = family[role]
                    break
        found = []
        for path, layer in self.layers.items():
            segments = tuple(path.split("."))
            if layer.operator.folds_input and any(segments[-len(p) :] == p for p in patterns):
                found.append(Layer(path, layer.module, layer.kind, layer.operator, role, note))
        return found

    def _named(self, name: str, moved: bool) -> list[Layer]:
        if name in ROLES:
            found = self._with_role(name, moved)
            if not found:
                roles = [r for r in ROLES if self._with_role(r, moved)]
                raise SiteError(
                    f"no usable layer plays the role {name!r}",
                    where=type(self.model).__name__,
                    remedy=f"Roles found here: {roles or 'none'}; or name module paths in sites=",
                )
            return found
        named = [layer for path, layer in self.layers.items() if fnmatchcase(path, name)]
        found = [layer for layer in named if layer.operator.folds_input]
        if found:
            return found
        if named:
            raise SiteError(
                "a norm is not linear in its input, so nothing in front of it folds into it",
                where=named[0].path,
                remedy="Choose the layer behind it",
            )
        reasons = [s for s in self.skipped if fnmatchcase(s.path, name)]
        if reasons:
            raise SiteError(reasons[0].reason, where=reasons[0].path, remedy="Choose another site")
        close = difflib.get_close_matches(name, self.layers, n=3, cutoff=0.4)
        raise SiteError(
            "no layer has this path or role",
            where=name,
            remedy=f"Close: {', '.join(close)}" if close else f"Roles are {', '.join(ROLES)}",
        )

    def _everything(self, groups: int) -> tuple[list[Layer], list[Skipped]]:
        found, left_out = [], []
        for layer in self.layers.values():
            if not layer.operator.folds_input:
                continue
            if groups % layer.operator.groups:
                reason = f"a map of {groups} block(s) would make a convolution of {layer.operator.groups} groups dense"
                left_out.append(Skipped(layer.path, reason))
            else:
                found.append(layer)
        wanted = [s for s in self.skipped if not isinstance(self.modules[s.path], NORMS)]
        return self._ordered(found), left_out + wanted

    def _ordered(self, layers: Iterable[Layer]) -> list[Layer]:
        unique = {layer.path: layer for layer in layers}
        return sorted(unique.values(), key=lambda layer: self.trace.order[layer.path])

    # -- making sites -------------------------------------------------------------------------------------

    def input_site(self, layer: Layer, *, wants_shift: bool, groups: int = 1) -> Site:
        """The site of a channel map before ``layer``.

        Args:
            wants_shift: whether the map has a constant part that needs a place.
            groups: diagonal blocks of the map.

        Raises:
            SiteError: the map would make a grouped convolution dense.
        """
        op = layer.operator
        if groups % op.groups:
            raise SiteError(
                f"a channel-mixing map before a convolution of {op.groups} groups would make it dense",
                where=layer.path,
                remedy="Choose a pointwise or ungrouped layer, or a per-channel method",
            )
        shift = self._place_shift(layer) if wants_shift else Shift("none")
        note = layer.note
        if wants_shift and shift.target == "none":
            note = "; ".join(filter(None, (note, "built without a shift: the layer has no place for one")))
        return self._site(layer, "input", shift, note)

    def weight_site(self, layer: Layer) -> Site:
        """The site of a map of ``layer``'s own weight."""
        return self._site(layer, "weight", None, layer.note)

    def _site(self, layer: Layer, slot: str, shift: Shift | None, note: str) -> Site:
        op = layer.operator
        shape = tuple(getattr(layer.module, op.weight).shape)
        return Site(
            layer.path,
            slot,
            layer.kind,
            op.in_width,
            op.out_width,
            op.channel_dim,
            shape,
            shift,
            layer.role,
            note,
        )

    def _place_shift(self, layer: Layer) -> Shift:
        if getattr(layer.module, layer.operator.bias, None) is not None:
            return Shift("bias", layer.path)
        bn = self.trace.batchnorm.get(layer.path)
        if bn is not None and getattr(self.modules[bn], "running_mean", None) is not None:
            return Shift("batchnorm", bn)
        norm = self.trace.norm.get(layer.path)
        # Zero padding would come between the norm and the layer: a shifted norm shifts no padded zeros.
        if norm is not None and not layer.operator.pads_zeros and getattr(self.modules[norm], "bias", None) is not None:
            return Shift("norm", norm)
        return Shift("new_bias", layer.path) if self.allow_new_bias else Shift("none")


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Layer path -> why it cannot be folded: another module uses the same parameter."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name.rpartition(".")[0])
    reasons = {}
    for paths in owners.values():
        for path in paths if len(set(paths)) > 1 else ():
            others = ", ".join(sorted(set(paths) - {path}))
            reasons[path] = f"its weight is shared with {others}: folding would change both"
    return reasons


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the classifier; () if the model says it has none.

    timm models say so themselves (``get_classifier``); otherwise a child named head, heads, classifier or fc.

    Raises:
        SiteError: neither gives an answer.
    """
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()  # type: ignore[operator]
        heads = found if isinstance(found, (tuple, list)) else (found,)
        ids = {id(h) for h in heads if isinstance(h, nn.Module) and any(True for _ in h.parameters())}
        return tuple(path for path, module in model.named_modules() if id(module) in ids)
    names = [n for n, m in model.named_children() if n in _HEAD_NAMES and any(True for _ in m.parameters())]
    if names:
        return tuple(names)
    raise SiteError(
        "cannot tell which module is the head",
        where=type(model).__name__,
        remedy="Name what stays trainable, for example trainable=('classifier',), or trainable=() for nothing",
    )
