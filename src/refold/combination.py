"""combine: a weighted sum of trained adapters as one new adapter, in structured form.

"Task arithmetic" (arXiv 2212.04089) where it has one meaning: every adapter i changes a layer's weights from W to
W'_i, and the combination changes them to ``W + sum_i w_i (W'_i - W)``, biases alike. For channel maps that is
``M = I + sum_i w_i (M_i - I)``, ``c = sum_i w_i c_i``. Low-rank parts are concatenated, never multiplied out, so the
result is exact and an adapter like any other: it trains, saves, loads and merges.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from refold import hosting
from refold.adapters import Adapter, LinearBottleneck, LowRank, ScaleShift
from refold.attachment import install
from refold.errors import SiteError
from refold.maps import to_float64
from refold.methods import Method, Plan
from refold.methods.base import is_number
from refold.methods.shelf import SSF, LoRA, RepAdapter
from refold.preparation import Prepared, require_room
from refold.sites import Site
from refold.state import Record, State, get_tensor, require_state, set_tensor

__all__ = ["combine"]


def combine(
    model: nn.Module, weights: Mapping[str, float], *, name: str = "combined", head: str | None = None
) -> nn.Module:
    """Attach the weighted sum of attached adapters of one method as a new adapter, and make it the one in use.

    The sum is one of changes of weights: ``W + sum_i w_i (W'_i - W)``. Ranks add up; LoRA, RepAdapter and SSF can be
    combined, also with different ranks, scales and groups.

    Args:
        weights: adapter name -> its weight, which may be negative; they need not add up to 1.
        name: of the new adapter.
        head: the adapter whose head the new one gets a copy of; None if their heads are the same.

    Returns:
        ``model`` itself.

    Raises:
        SiteError: nothing is attached, the model is merged, a name is unknown or taken, or the adapters have no
            weighted sum: other methods, other sites, tensors trained in place, different heads. The model is then
            as it was.
    """
    state = require_state(model, "combine")
    require_room(model, name)
    if not weights:
        raise SiteError("no adapters to combine", where="weights", remedy="Give {name: weight, ...}")
    for key, weight in weights.items():
        if not is_number(weight, -1e6, 1e6) or weight == 0:
            raise SiteError(f"{weight!r} is no weight", where=key, remedy="Give a number other than 0, or leave it out")
    records = {key: state.record(key) for key in weights}
    rule = _rule(records)
    _require_same_sites(records)
    first = next(iter(records.values()))
    method = rule.method([record.method for record in records.values()], first.sites)
    source = _head_source(model, state, records, head)
    values = {key: value.detach().clone() for key, value in _owned(model, state, source).items()}
    slots = hosting.hosted(model)
    parts = {site.path: [_adapter(slots[site.path], key) for key in records] for site in first.sites}
    chosen = records[source]
    plan = Plan(first.sites, first.skipped)
    install(model, Prepared(name, method, plan, chosen.head, chosen.owned, chosen.trainable, state.example))
    slots = hosting.hosted(model)
    with torch.no_grad():
        for path, adapters in parts.items():
            rule.fill(_adapter(slots[path], name), adapters, list(weights.values()))
    for key, value in values.items():
        set_tensor(model, key, value)
    state.record(name).info = _info(records, head) | {"combined": {k: float(w) for k, w in weights.items()}}
    return model


def _adapter(slot: hosting.Slot, name: str) -> Adapter:
    adapter = slot[name]
    assert isinstance(adapter, Adapter)
    return adapter


# -- what can be combined ---------------------------------------------------------------------------------------


def _rule(records: dict[str, Record]) -> _Rule:
    methods = {key: record.method for key, record in records.items()}
    kinds = {type(method) for method in methods.values()}
    if len(kinds) > 1:
        told = ", ".join(f"{key} is {type(method).__name__}" for key, method in methods.items())
        raise SiteError(
            f"adapters of different methods have no sum in one form ({told})",
            where="combine",
            remedy="Combine adapters of one method",
        )
    kind = kinds.pop()
    rule = _RULES.get(kind)
    if rule is None:
        able = ", ".join(k.__name__ for k in _RULES)
        raise SiteError(
            f"a weighted sum of {kind.__name__} adapters is no {kind.__name__} adapter",
            where="combine",
            remedy=f"These can be combined: {able}; or train one adapter on both tasks, or use refold.switch",
        )
    for key, method in methods.items():
        if isinstance(method, LoRA) and method.rows is not None:
            raise SiteError(
                f"adapters on some rows only (rows={method.rows}) have no weighted sum here",
                where=key,
                remedy="Train with rows=None, or use refold.switch",
            )
        if isinstance(method, RepAdapter) and (method.position == "parallel" or not method.mergeable):
            raise SiteError(
                f"adapters with position={method.position!r} and activation={method.activation!r} have no weighted "
                "sum here",
                where=key,
                remedy="Train linear ones before or after a projection, or use refold.switch",
            )
    return rule


def _require_same_sites(records: dict[str, Record]) -> None:
    (first, reference), *others = records.items()
    ours = {_place(site) for site in reference.sites}
    for key, record in others:
        odd = sorted(ours ^ {_place(site) for site in record.sites})
        if odd:
            raise SiteError(
                f"{first!r} and {key!r} have different sites",
                where=odd[0][0],
                remedy="Train both with the same sites=",
            )
    for key, record in records.items():
        outside = [n for n in record.owned if not any(n == h or n.startswith(f"{h}.") for h in record.head)]
        if outside:
            raise SiteError(
                f"{key!r} also trains this in place, outside its head",
                where=outside[0],
                remedy="Combine adapters that leave the backbone's own tensors alone",
            )


def _place(site: Site) -> tuple[str, str, str, str, str]:
    return site.path, site.slot, str(site.shift or ""), str(site.owner), str(site.shares)


def _head_source(model: nn.Module, state: State, records: dict[str, Record], head: str | None) -> str:
    """The name of the adapter whose head the combination gets."""
    if head is not None:
        if head not in records:
            raise SiteError("is not among the adapters to combine", where=head, remedy=f"One of {', '.join(records)}")
        return head
    first, *others = records
    reference = _owned(model, state, first)
    for key in others:
        values = _owned(model, state, key)
        same = values.keys() == reference.keys() and all(
            value.shape == reference[n].shape and torch.equal(value.cpu(), reference[n].cpu())
            for n, value in values.items()
        )
        if not same or records[key].head != records[first].head:
            raise SiteError(
                f"{first!r} and {key!r} have different heads, and heads of different tasks have no meaningful sum",
                where="combine",
                remedy=f"Say whose head to use, for example head={first!r}",
            )
    return first


def _owned(model: nn.Module, state: State, name: str) -> dict[str, Tensor]:
    """An adapter's values of the backbone's tensors, in use or not."""
    record = state.records[name]
    found = {}
    for key in record.owned:
        value = get_tensor(model, key) if name == state.active else record.values.get(key, state.base.get(key))
        assert value is not None
        found[key] = value
    return found


def _info(records: dict[str, Record], head: str | None) -> dict[str, Any]:
    """What was described of the head's adapter, or of all of them alike."""
    if head is not None:
        return dict(records[head].info)
    first, *others = (record.info for record in records.values())
    return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}


# -- one rule a method ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """How adapters of one method add up: the method of the sum, and filling one of its adapters."""

    method: Callable[[Sequence[Any], tuple[Site, ...]], Method]
    fill: Callable[[Any, Sequence[Any], Sequence[float]], None]


def _sum_of_loras(methods: Sequence[LoRA], sites: tuple[Site, ...]) -> LoRA:
    ranks = {site.path: sum(method.at(site.path)[0] for method in methods) for site in sites}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    overrides = tuple((path, rank, 1.0) for path, rank in ranks.items() if rank != usual)
    return replace(methods[0], rank=usual, scale=1.0, overrides=overrides)


def _fill_low_rank(target: LowRank, parts: Sequence[LowRank], weights: Sequence[float]) -> None:
    """``sum_i w_i s_i Up_i Down_i`` is one product of the factors side by side."""
    scaled = [w * p.scale * to_float64(p.up) for p, w in zip(parts, weights, strict=True)]
    target.up.copy_(torch.cat(scaled, dim=1))
    target.down.copy_(torch.cat([p.down for p in parts]))


def _sum_of_rep_adapters(methods: Sequence[RepAdapter], sites: tuple[Site, ...]) -> RepAdapter:
    groups = gcd(*(method.groups for method in methods))
    return replace(methods[0], rank=sum(method.rank for method in methods), groups=groups, scale=1.0)


def _fill_bottleneck(target: LinearBottleneck, parts: Sequence[LinearBottleneck], weights: Sequence[float]) -> None:
    """Side by side within each group, as Up is block-diagonal over the groups.

    Blocks of more groups are also blocks of a divisor of their number, with zeros between them.
    """
    groups = target.groups
    downs, ups, down_biases, up_biases = [], [], [], []
    for part, weight in zip(parts, weights, strict=True):
        factor = weight * part.scale
        dense = part.up if part.groups == 1 else torch.block_diag(*part.up.chunk(part.groups))
        blocks = dense.unflatten(0, (groups, -1)).unflatten(-1, (groups, -1))
        diagonal = torch.cat([blocks[g, :, g] for g in range(groups)])
        ups.append(factor * to_float64(diagonal))
        downs.append(part.down.unflatten(0, (groups, -1)))
        if part.down_bias is not None and part.up_bias is not None:
            down_biases.append(part.down_bias.unflatten(0, (groups, -1)))
            up_biases.append(factor * to_float64(part.up_bias))
    target.up.copy_(torch.cat(ups, dim=1))
    target.down.copy_(torch.cat(downs, dim=1).flatten(0, 1))
    if target.down_bias is not None and target.up_bias is not None:
        target.down_bias.copy_(torch.cat(down_biases, dim=1).flatten())
        target.up_bias.copy_(torch.stack(up_biases).sum(0))


def _same_ssf(methods: Sequence[SSF], sites: tuple[Site, ...]) -> SSF:
    return methods[0]


def _fill_scale_shift(target: ScaleShift, parts: Sequence[ScaleShift], weights: Sequence[float]) -> None:
    pairs = list(zip(parts, weights, strict=True))
    target.gamma.copy_(1 + torch.stack([w * (to_float64(p.gamma) - 1) for p, w in pairs]).sum(0))
    shifts = [w * to_float64(p.beta) for p, w in pairs if p.beta is not None]
    if target.beta is not None:
        target.beta.copy_(torch.stack(shifts).sum(0))


#: By exact type: DoRA is a LoRA whose norm makes it no sum, and rotations add up to no rotation.
_RULES: dict[type[Method], _Rule] = {
    LoRA: _Rule(_sum_of_loras, _fill_low_rank),
    RepAdapter: _Rule(_sum_of_rep_adapters, _fill_bottleneck),
    SSF: _Rule(_same_ssf, _fill_scale_shift),
}
