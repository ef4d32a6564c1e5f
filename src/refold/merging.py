"""merge, unmerge, switch: folding adapters into the backbone's own weights and taking them out again, exactly.

"Structural re-parameterization" (arXiv 2302.08106 §3.3). Folds are computed in float64 from exact base weights
and rounded once to the weight's own dtype, so any number of switches never drifts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from refold import hosting, kept, quantized
from refold.attachment import activate, exchange_owned, put_in_use
from refold.comparison import LIMITS, compute_dtype, difference, run_probes
from refold.errors import MergeError, RefoldError
from refold.folding import fold_all
from refold.freezing import unfreeze_statistics
from refold.maps import to_float64
from refold.state import (
    Kept,
    Record,
    State,
    drop_compiled,
    get_tensor,
    recompiled_if_replaced,
    require_state,
    set_tensor,
)

__all__ = ["MergeReport", "merge", "switch", "unmerge"]


@dataclass(frozen=True)
class MergeReport:
    """What a checked merge saw on its probe inputs.

    Attributes:
        name: the adapter that was merged.
        folded: names of the tensors that hold a fold.
        checked: whether outputs were compared.
        dtype: precision of the comparison; low-precision models are compared through float32 copies.
        max_abs, rel_l2: largest absolute and relative L2 difference of merged and unmerged outputs.
        dequantized: names of the weights that were quantized and are floating now.
        extra_bytes: how much larger they are.
        loss: relative L2 difference that giving up quantized arithmetic made to the outputs, in the model's own
            precision, the fold included; what rounding to few values cost before is not won back.
    """

    name: str
    folded: tuple[str, ...]
    checked: bool
    dtype: str = ""
    max_abs: float = 0.0
    rel_l2: float = 0.0
    dequantized: tuple[str, ...] = ()
    extra_bytes: int = 0
    loss: float = 0.0


def merge(model: nn.Module, *, check: bool = True, keep_base: bool = True, dequantize: bool = False) -> MergeReport:
    """Fold the active adapter into the backbone and remove every trace of it, in place.

    Afterwards class, module tree, hooks, state-dict keys and shapes are those of the untouched backbone. What the
    method trained in place (head, biases) stays as trained.

    Args:
        check: compare outputs before and after on probe inputs and undo the merge if they differ.
        keep_base: keep exact copies of the replaced weights (on the CPU), which ``unmerge`` and ``switch`` need.
        dequantize: store quantized weights that receive a fold in floating point; without it they are refused.

    Raises:
        MergeError: an adapter does not fold, a folded weight is not finite, or the outputs differ. The model is
            then as it was.
        SiteError: nothing is attached, or a layer with an adapter was replaced since.
    """
    state = require_state(model, "merge")
    if state.merged is not None:
        raise MergeError(f"adapter {state.merged!r} is merged already", remedy="Call refold.unmerge first")
    record = state.record()
    name = state.active
    assert name is not None
    if not record.method.mergeable:
        raise MergeError(f"{_unfoldable(record)} does not fold into a backbone's weights", remedy="Ship it unmerged")
    adapters = hosting.adapters_of(model, record.sites, name)
    names = quantized.quantized_weights(model, [record])
    if names and dequantize:
        # All that some attached adapter would fold into, because switching to it then needs no further permission.
        names = quantized.quantized_weights(model, state.records.values())
        return _merge_dequantized(model, state, names, check=check, keep_base=keep_base)
    if names:
        raise MergeError(
            "its weight is quantized, and a fold would be rounded to the few values it can take",
            where=names[0],
            remedy="Ship the adapter unmerged, or merge(model, dequantize=True) for floating weights in these layers",
        )
    report = None
    if check and compute_dtype(model) not in LIMITS:
        # Below float32 rounding hides a wrong fold: prove it on a float32 copy, then fold the model itself.
        report = merge(quantized.single_precision_copy(model), check=True, keep_base=False)
        check = False
    before = _outputs(model, state) if check else []
    folds = fold_all(model, record, adapters)
    _park(model, state)
    _write(model, state, name, folds)
    if check:
        try:
            report = _compare(model, state, name, before)
        except RefoldError:
            unmerge(model)
            raise
    if not keep_base:
        state.unfolded, state.quantized, state.kept_base = {}, {}, False
    if report is None:
        return MergeReport(name, tuple(folds), checked=False)
    return report


def _merge_dequantized(
    model: nn.Module, state: State, names: tuple[str, ...], *, check: bool, keep_base: bool
) -> MergeReport:
    """:func:`merge` after the quantized weights have been replaced; they come back if it fails."""
    before = _outputs(model, state) if check else []
    state.quantized = quantized.dequantize(model, names)
    extra = sum(_bytes(get_tensor(model, n)) - _bytes(t) for n, t in state.quantized.items())
    try:
        report = merge(model, check=check, keep_base=keep_base)
    except RefoldError:
        quantized.requantize(model, state)
        raise
    loss = difference(run_probes(model, state.example), before)[1] if check else 0.0
    return replace(report, dequantized=names, extra_bytes=extra, loss=loss)


def _bytes(tensor: Tensor | None) -> int:
    """What a tensor takes, also one made of several tensors."""
    assert tensor is not None
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])  # type: ignore[attr-defined]


def unmerge(model: nn.Module) -> None:
    """Put the exact base weights and the adapters back, in place.

    Raises:
        MergeError: the model is not merged, its base was not kept, or the merged weights were changed since.
        SiteError: nothing is attached.
    """
    state = require_state(model, "unmerge")
    if state.merged is None:
        raise MergeError("the model is not merged", where="unmerge", remedy="Call refold.merge first")
    _require_base(state, "unmerge")
    _require_untouched(model, state)
    drop_compiled()
    name = state.merged
    _restore_base(model, state)
    quantized.requantize(model, state)
    state.merged, state.active, state.kept_base = None, name, True
    state.kept = {}
    for key, record in state.records.items():
        for site in record.sites:
            device = hosting.nearest_parameter(model, site.path).device
            hosting.host(model, site, key, record.parked[site.key].to(device))
        record.parked = {}
    put_in_use(model, state, name)


def switch(model: nn.Module, name: str, *, keep: int = 4) -> None:
    """Move a merged model to another adapter, folded from exact base weights; ``activate`` if it is not merged.

    The first visit to an adapter folds it, later ones copy what was folded then, bit for bit the same.

    Args:
        keep: adapters whose folded weights stay in memory, on the model's device, for the way back: each costs
            as much as the layers it folds into, the one in use included. 0 keeps none and folds at every switch.

    Raises:
        MergeError: the base was not kept, the merged weights were changed, or the adapter does not fold.
        SiteError: nothing is attached, or no adapter has this name.
    """
    state = require_state(model, "switch")
    record = state.record(name)
    if state.merged is None:
        activate(model, name)
        return
    if not record.method.mergeable:
        raise MergeError(f"{_unfoldable(record)} does not fold into a backbone's weights", where=name)
    names = quantized.quantized_weights(model, [record])
    if names:
        raise MergeError(
            f"its weight is quantized and was not dequantized for {state.merged!r}",
            where=names[0],
            remedy=f"Call refold.unmerge, activate {name!r}, then merge(model, dequantize=True)",
        )
    if keep < 0:
        raise MergeError(f"keep={keep} is no number of adapters", where="switch", remedy="Give 0 or more")
    _require_base(state, "switch")
    _require_untouched(model, state)
    with recompiled_if_replaced(model):
        kept.keep(model, state, keep)
        found = kept.find(model, state, name)
        if found is None:
            _fold_anew(model, state, name)
        elif name != state.merged:
            _put_back(model, state, name, found)


def _fold_anew(model: nn.Module, state: State, name: str) -> None:
    """From one merged adapter to another by folding it; to the one before if that fails."""
    record, previous = state.records[name], state.merged
    assert previous is not None
    known = {**state.unfolded, **{n: t for found in state.kept.values() for n, t in found.unfolded.items()}}
    for site in record.sites:  # the model may have moved since the adapter left it
        record.parked[site.key].to(hosting.nearest_parameter(model, site.path).device)
    _restore_base(model, state)
    exchange_owned(model, state, name)
    state.merged = name
    try:
        folds = fold_all(model, record, record.parked)
    except RefoldError:
        record = state.records[previous]
        exchange_owned(model, state, previous)
        state.merged = previous
        _write(model, state, previous, fold_all(model, record, record.parked), known)
        raise
    _write(model, state, name, folds, known)


def _put_back(model: nn.Module, state: State, name: str, found: Kept) -> None:
    """From one merged adapter to another whose folded weights were kept."""
    assert state.merged is not None
    owned = state.records[state.merged].owned
    for key, value in state.unfolded.items():
        if key not in found.values or key in owned:
            set_tensor(model, key, value)
    exchange_owned(model, state, name)
    for key, value in found.values.items():
        set_tensor(model, key, value)
    state.merged, state.source = name, found.source
    state.unfolded, state.folded = dict(found.unfolded), dict(found.folded)
    _freeze(model, found.values)


def _unfoldable(record: Record) -> str:
    return ", ".join(method.describe() for method in record.method.parts() if not method.mergeable)


# -- the fold -------------------------------------------------------------------------------------------------


def _park(model: nn.Module, state: State) -> None:
    """Take every adapter and hook out of the module tree, keeping the adapters in the records."""
    drop_compiled()
    state.kept = {}
    for key, record in state.records.items():
        record.parked = hosting.adapters_of(model, record.sites, key)
    hosting.unhost(model)
    unfreeze_statistics(model)


def _write(
    model: nn.Module,
    state: State,
    name: str,
    folds: dict[str, Tensor],
    known: dict[str, Tensor | None] | None = None,
) -> None:
    """Put the folds into the model's own tensors, keeping exact copies of what they replace.

    Copies that are ``known`` from before are shared where they are still right.
    """
    state.unfolded = {}
    for key in folds:
        tensor, copied = get_tensor(model, key), (known or {}).get(key)
        same = copied is not None and tensor is not None and kept.same_bits(tensor, copied)
        state.unfolded[key] = None if tensor is None else copied if same else tensor.detach().cpu().clone()
    for key, value in folds.items():
        set_tensor(model, key, value)
    state.merged, state.active, state.kept_base = name, None, True
    state.folded = kept.checksums(model, folds)
    state.source = kept.source(state.records[name].parked)
    _freeze(model, folds)


def _freeze(model: nn.Module, names: Iterable[str]) -> None:
    for key in names:
        tensor = get_tensor(model, key)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(False)


def _restore_base(model: nn.Module, state: State) -> None:
    for key, value in state.unfolded.items():
        set_tensor(model, key, value)
    state.unfolded, state.folded = {}, {}


def _require_base(state: State, verb: str) -> None:
    if not state.kept_base:
        raise MergeError(f"cannot {verb}: the base weights were not kept", remedy="Merge with keep_base=True")


def _require_untouched(model: nn.Module, state: State) -> None:
    """Refuse to throw away changes made to merged weights.

    Checksums answer at once in the usual case. A cast to another dtype changes them: then the fold is computed
    again from the exact base and compared.
    """
    if kept.checksums(model, state.folded) == state.folded:
        return
    now = {name: get_tensor(model, name) for name in state.folded}
    # A tensor that is gone belongs to a layer that was replaced: there is nothing to fold into and compare.
    changed = [name for name, tensor in now.items() if tensor is None] or _changed(model, state, now)
    if changed:
        raise MergeError(
            "the merged weight was changed since merge",
            where=changed[0],
            remedy="Save what you changed; then load the backbone and the adapter afresh",
        )


def _changed(model: nn.Module, state: State, now: dict[str, Tensor | None]) -> list[str]:
    """The folded tensors whose values are not those of a fold, rounding aside."""
    assert state.merged is not None
    record = state.records[state.merged]
    twin = copy.deepcopy(model).to("cpu", torch.float64)
    for name, value in state.unfolded.items():
        set_tensor(twin, name, value)
    parked = copy.deepcopy(record.parked)  # together: some share parts
    for adapter in parked.values():
        adapter.cpu()
    rounding = max(torch.finfo(v.dtype).eps for v in state.unfolded.values() if v is not None)
    changed = []
    for name, value in fold_all(twin, record, parked).items():
        tensor = now[name]
        assert tensor is not None
        tolerance = 4 * max(rounding, torch.finfo(tensor.dtype).eps) * float(value.abs().max())
        same = tensor.shape == value.shape and float((to_float64(tensor).cpu() - value).abs().max()) <= tolerance
        if not same:
            changed.append(name)
    return changed


# -- the check ------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, state: State) -> list[Tensor]:
    outputs = run_probes(model, state.example)
    if not outputs:
        raise MergeError("the model returns no floating tensor that could be compared", remedy="Use check=False")
    if not all(bool(torch.isfinite(o).all()) for o in outputs):
        raise MergeError(
            "the unmerged model's output is not finite, so a merge cannot be checked", remedy="Check training"
        )
    return outputs


def _compare(model: nn.Module, state: State, name: str, before: list[Tensor]) -> MergeReport:
    dtype = compute_dtype(model)
    max_abs, rel_l2 = difference(run_probes(model, state.example), before)
    if not rel_l2 <= LIMITS[dtype]:
        raise MergeError(
            f"merged and unmerged outputs differ by {rel_l2:.2e} (relative L2), more than {LIMITS[dtype]:.0e}; "
            "the merge was undone",
            where=name,
            remedy="If the adapter's effect is very large, convert the model to float64 first; else report this",
        )
    return MergeReport(name, tuple(state.folded), True, str(dtype).removeprefix("torch."), max_abs, rel_l2)
