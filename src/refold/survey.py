"""Where adapters can attach to a backbone, and where their fold and their shift would go."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from refold.adapters import Adapter
from refold.errors import SiteError
from refold.fold import KINDS, NORMS, kind_of, refusal, replaces_weight
from refold.maps import is_quantized
from refold.probe import Example, Trace, example_input, tensor_name, trace
from refold.roles import INTERLEAVED, MOVED, ONE_INPUT, ROLES
from refold.sharing import shared_parameters
from refold.sites import Layer, Shift, Site, Skipped

__all__ = ["Survey", "head_paths", "matches"]

#: Names under which backbones keep their classifier when they do not say so themselves.
_HEAD_NAMES = ("head", "heads", "classifier", "fc")


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
        ours = {id(part) for module in model.modules() if isinstance(module, Adapter) for part in module.modules()}
        self.modules = {path: module for path, module in model.named_modules() if id(module) not in ours}
        self.layers: dict[str, Layer] = {}
        self.skipped: list[Skipped] = []
        shared = shared_parameters(model)
        for path, module in self.modules.items():
            kind = kind_of(module)
            if kind is None or self._in_head(path):
                continue
            if (reason := self._reason_against(path, module, shared)) is not None:
                self.skipped.append(Skipped(path, reason))
            else:
                self.layers[path] = Layer(path, module, kind.name, kind.operator(module), self._owner(path))

    def _in_head(self, path: str) -> bool:
        return any(path == h or path.startswith(f"{h}.") for h in self.head)

    def _reason_against(self, path: str, module: nn.Module, shared: dict[str, str]) -> str | None:
        reason = refusal(module)
        if reason is None and path not in self.trace.calls and not self._users(path):
            reason = "the probing forward never used this layer, so an adapter on it would do nothing"
        if reason is None and self._is_quantized(module) and self._users(path) - {path}:
            reason = (
                "another module reads its quantized weight itself, so an adapter beside it would not be in the path"
            )
        return reason or shared.get(path)

    @staticmethod
    def _is_quantized(module: nn.Module) -> bool:
        kind = kind_of(module)
        assert kind is not None
        weight = module._parameters.get(kind.operator(module).weight)
        return weight is not None and is_quantized(weight)

    def _users(self, path: str) -> frozenset[str]:
        """Paths of the modules whose own forward reads the layer's weight."""
        kind = kind_of(self.modules[path])
        assert kind is not None
        return self.trace.uses.get(tensor_name(path, kind.operator(self.modules[path]).weight), frozenset())

    def _owner(self, path: str) -> str | None:
        """Whose forward must see the folded weight; None where the layer's hooks see all that its weight does."""
        kind, users = kind_of(self.modules[path]), self._users(path)
        assert kind is not None
        if path in self.trace.calls:
            if users <= {path}:
                plain = kind.is_plain(self.modules[path]) and "forward" not in self.modules[path].__dict__
                return None if plain or self._is_quantized(self.modules[path]) else path
            users |= {path}
        owner = _common(users)
        while owner and owner not in self.trace.calls:  # a container that nobody calls
            owner = owner.rpartition(".")[0]
        return owner

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

    def operations(self, sites: str | Iterable[str] | None) -> tuple[list[Layer], list[Skipped]]:
        """The layers that ``sites`` names, norms included, or all of them, and those left out with reasons.

        Raises:
            SiteError: a name matches nothing, or only layers that cannot be used.
        """
        if sites is None:
            return self._ordered(self.layers.values()), list(self.skipped)
        names = (sites,) if isinstance(sites, str) else tuple(sites)
        return self._ordered(layer for name in names for layer in self._named(name, False, norms=True)), []

    def _with_role(self, role: str, moved: bool) -> list[Layer]:
        found = []
        for path, layer in self.layers.items():
            usual = (ROLES.get(role, ()), "")
            patterns, note = self._moved(path).get(role, usual) if moved else usual
            mixes = layer.operator.folds_input and layer.operator.groups == 1  # no paper names a grouped convolution
            if mixes and any(matches(path, pattern) for pattern in patterns):
                found.append(replace(layer, role=role, note=note))
        return self._first_readers(found) if role in ONE_INPUT else found

    def _moved(self, path: str) -> Mapping[str, tuple[tuple[tuple[str, ...], ...], str]]:
        """What ``MOVED`` says of the family of the nearest module around ``path``: backbones come wrapped, too."""
        while path:
            path = path.rpartition(".")[0]
            for cls in type(self.modules[path]).__mro__:
                family = MOVED.get(f"{cls.__module__}.{cls.__qualname__}")
                if family is not None:
                    return family
        return {}

    def _first_readers(self, layers: list[Layer]) -> list[Layer]:
        """Of the layers with one parent, those that read what the first of them reads: not the way back."""
        first: dict[str, int | None] = {}
        kept = []
        for layer in self._ordered(layers):
            source = self.trace.source.get(layer.path)
            if first.setdefault(layer.path.rpartition(".")[0], source) == source:
                kept.append(layer)
        return kept

    def _named(self, name: str, moved: bool, *, norms: bool = False) -> list[Layer]:
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
        found = [layer for layer in named if norms or layer.operator.folds_input]
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
        usable = [path for path, layer in self.layers.items() if norms or layer.operator.folds_input]
        close = difflib.get_close_matches(name, usable, n=3, cutoff=0.4)
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
        return sorted(unique.values(), key=self._position)

    def _position(self, layer: Layer) -> tuple[int, str]:
        """Of the layer's first call, or of its owner's where nobody calls the layer."""
        reader = layer.path if layer.path in self.trace.order else layer.owner or ""
        return self.trace.order[reader], layer.path

    def require_blocks(self, path: str) -> None:
        """Raise :class:`SiteError` where a joint projection has no block of rows for each of query, key and value."""
        parent = self.modules[path.rpartition(".")[0]]
        attribute = INTERLEAVED.get(f"{type(parent).__module__}.{type(parent).__qualname__}")
        if attribute is not None and getattr(parent, attribute, False):
            raise SiteError(
                "its query, key and value are interleaved head by head, so they are no blocks of rows",
                where=path,
                remedy="Name rows as 'first:end', or choose other sites",
            )

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
        return self._site(layer, "input", self._place_shift(layer) if wants_shift else Shift("none"), wants_shift)

    def input_sites(self, layers: Iterable[Layer], *, wants_shift: bool) -> list[Site]:
        """:meth:`input_site` of each; layers of one role that read the same tensor share one adapter.

        Separate projections for query, key and value then have together what a joint projection has, as the papers
        mean it: one map of what the attention reads.
        """
        groups: dict[object, list[Site]] = {}
        for layer in layers:
            site, source = self.input_site(layer, wants_shift=wants_shift), self.trace.source.get(layer.path)
            alone = not layer.role or source is None or site.owner is not None
            groups.setdefault(site.path if alone else (layer.role, source), []).append(site)
        sites: list[Site] = []
        for first, *others in groups.values():
            if any(site.shift is not None and site.shift.target == "none" for site in (first, *others)):
                first = replace(first, shift=Shift("none"))
            sites.append(first)
            for site in others:
                shift = first.shift if first.shift == Shift("none") else site.shift
                note = "; ".join(filter(None, (site.note, f"shares the adapter of {first.path}")))
                sites.append(replace(site, shift=shift, note=note, shares=first.path))
        return sites

    def output_site(self, layer: Layer) -> Site:
        """The site of a per-channel map with a shift after ``layer``, which may be a norm.

        Raises:
            SiteError: the layer's forward is its own, so it may undo a scaling of its weight.
        """
        kind = KINDS[layer.kind]
        if not kind.returns_product:
            # A norm's parameters are as small as the map itself; of packed projections no output is seen.
            layer = replace(layer, owner=layer.path if layer.owner is None else layer.owner)
        elif layer.owner == layer.path:
            raise SiteError(
                f"{type(layer.module).__name__} has a forward of its own, which may normalise a scaled weight away",
                where=layer.path,
                remedy="Choose another site, or a method that maps the layer's input",
            )
        return self._site(layer, "output", self._place_shift(layer, after=True), True)

    def weight_site(self, layer: Layer, *, wants_shift: bool = False) -> Site:
        """The site of a map of ``layer``'s own weight, and of its bias if the map has a constant part.

        The constant part has no place but the layer's own bias, or a new one.
        """
        if layer.owner is None and replaces_weight(layer.module):
            layer = replace(layer, owner=layer.path)
        shift = self._place_shift(layer, own=True) if wants_shift else None
        return self._site(layer, "weight", shift, wants_shift)

    def _site(self, layer: Layer, slot: str, shift: Shift | None, wants_shift: bool) -> Site:
        op, notes = layer.operator, [layer.note]
        if wants_shift and shift is not None and shift.target == "none":
            notes.append("built without a shift: the layer has no place for one")
        if layer.owner is not None:
            reader = "its own forward" if layer.owner == layer.path else layer.owner or "the model itself"
            notes.append(f"acts on the stored weight, which {reader} reads")
        note = "; ".join(filter(None, notes))
        return Site(
            layer.path,
            slot,
            layer.kind,
            op.in_width,
            op.out_width,
            op.channel_dim,
            op.weight_shape,
            shift,
            layer.role,
            note,
            layer.owner,
        )

    def _place_shift(self, layer: Layer, *, after: bool = False, own: bool = False) -> Shift:
        has_bias = layer.module._parameters.get(layer.operator.bias) is not None
        if layer.owner is not None and has_bias:
            # Both are replaced together, so whoever reads the bias must be inside the owner's forward.
            readers = self.trace.uses.get(tensor_name(layer.path, layer.operator.bias), frozenset())
            has_bias = bool(readers) and all(_inside(r, layer.owner) for r in readers)
        if has_bias:
            return Shift("bias", layer.path)
        if layer.owner is not None:
            return Shift("none")
        bn = self.trace.batchnorm.get(layer.path)
        if own:
            return Shift("new_bias", layer.path) if self.allow_new_bias else Shift("none")
        if bn is not None and getattr(self.modules[bn], "running_mean", None) is not None:
            return Shift("batchnorm", bn)
        norm = self.trace.norm.get(layer.path)
        # Zero padding would come between the norm and the layer: a shifted norm shifts no padded zeros.
        usable = norm in self.layers and not after and not layer.operator.pads_zeros
        if usable and norm is not None and getattr(self.modules[norm], "bias", None) is not None:
            return Shift("norm", norm)
        return Shift("new_bias", layer.path) if self.allow_new_bias else Shift("none")


def matches(path: str, pattern: tuple[str, ...]) -> bool:
    """Whether the last segments of ``path`` are those of ``pattern``, in which ``*`` stands for any characters."""
    last = path.split(".")[-len(pattern) :]
    return len(last) == len(pattern) and all(map(fnmatchcase, last, pattern))


def _inside(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(f"{ancestor}.")


def _common(paths: Iterable[str]) -> str:
    """The longest module path that all ``paths`` start with."""
    segments = [path.split(".") if path else [] for path in paths]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*segments, strict=False))
    return ".".join(level[0] for level in shared)


def head_paths(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the classifier; () if the model says it has none, or that it returns feature maps.

    timm models say so themselves (``get_classifier``; ``feature_info`` of ``features_only=True``), as do transformers'
    backbones (``out_features``); otherwise a child named head, heads, classifier or fc.

    Raises:
        SiteError: neither gives an answer.
    """
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()  # type: ignore[operator]
        heads = found if isinstance(found, (tuple, list)) else (found,)
        ids = {id(h) for h in heads if isinstance(h, nn.Module) and any(True for _ in h.parameters())}
        return tuple(path for path, module in model.named_modules() if id(module) in ids)
    if hasattr(model, "feature_info") or getattr(model, "out_features", None):
        return ()
    names = [n for n, m in model.named_children() if n in _HEAD_NAMES and any(True for _ in m.parameters())]
    if names:
        return tuple(names)
    raise SiteError(
        "cannot tell which module is the head",
        where=type(model).__name__,
        remedy="Name what stays trainable, for example trainable=('classifier',), or trainable=() for nothing",
    )
