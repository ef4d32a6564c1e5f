"""merge, unmerge, switch: folding adapters into the backbone's own weights and taking them out again, exactly.

"Structural re-parameterization" (arXiv 2302.08106 §3.3). Folds are computed in float64 from exact base weights
and rounded once to the weight's own dtype, so any number of switches never drifts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refold import hosting
from refold.adapters import Adapter, ChannelAdapter, WeightAdapter
from refold.attachment import activate, exchange_owned
from refold.errors import MergeError, RefoldError
from refold.fold import KINDS, fold_input
from refold.maps import ChannelMap, to_float64
from refold.probe import Example, forward, preserved, tensors_of
from refold.sites import Site
from refold.state import Record, State, drop_compiled, get_tensor, require_state, set_tensor, tensor_name

__all__ = ["LIMITS", "MergeReport", "merge", "switch", "unmerge"]

#: Largest relative L2 distance between merged and unmerged outputs that counts as equal.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class MergeReport:
    """What a checked merge saw on its probe inputs.

    Attributes:
        name: the adapter that was merged.
        folded: names of the tensors that hold a fold.
        checked: whether outputs were compared.
        dtype: precision of the comparison; low-precision models are compared through float32 copies.
        max_abs, rel_l2: largest absolute and relative L2 difference of merged and unmerged outputs.
    """

    name: str
    folded: tuple[str, ...]
    checked: bool
    dtype: str = ""
    max_abs: float = 0.0
    rel_l2: float = 0.0


def merge(model: nn.Module, *, check: bool = True, keep_base: bool = True) -> MergeReport:
    """Fold the active adapter into the backbone and remove every trace of it, in place.

    Afterwards class, module tree, hooks, state-dict keys and shapes are those of the untouched backbone. What the
    method trained in place (head, biases) stays as trained.

    Args:
        check: compare outputs before and after on probe inputs and undo the merge if they differ.
        keep_base: keep exact copies of the replaced weights (on the CPU), which ``unmerge`` and ``switch`` need.

    Raises:
        MergeError: an adapter does not fold, a folded weight is not finite, or the outputs differ. The model is
            then as it was.
        SiteError: nothing is attached.
    """
    state = require_state(model, "merge")
    if state.merged is not None:
        raise MergeError(f"adapter {state.merged!r} is merged already", remedy="Call refold.unmerge first")
    record = state.record()
    name = state.active
    assert name is not None
    if not record.method.mergeable:
        raise MergeError(
            f"{type(record.method).__name__} does not fold into a backbone's weights",
            remedy="Ship it unmerged",
        )
    report = None
    if check and _compute_dtype(model) not in LIMITS:
        # Below float32 rounding hides a wrong fold: prove it on a float32 copy, then fold the model itself.
        report = merge(copy.deepcopy(model).float(), check=True, keep_base=False)
        check = False
    before = _outputs(model, state) if check else []
    adapters = {site.path: _adapter_at(model, site, name) for site in record.sites}
    folds = _folds(model, record, adapters)
    _park(model, state)
    _write(model, state, name, folds)
    if check:
        try:
            report = _compare(model, state, name, before)
        except RefoldError:
            unmerge(model)
            raise
    if not keep_base:
        state.unfolded, state.kept_base = {}, False
    if report is None:
        return MergeReport(name, tuple(folds), checked=False)
    return report


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
    state.merged, state.active, state.kept_base = None, name, True
    for key, record in state.records.items():
        for site in record.sites:
            layer = model.get_submodule(site.path)
            adapter = record.parked[site.path].to(next(layer.parameters()).device)
            hosting.host(layer, site, key, adapter)
        record.parked = {}
    activate(model, name)


def switch(model: nn.Module, name: str) -> None:
    """Move a merged model to another adapter, folded from exact base weights; ``activate`` if it is not merged.

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
        raise MergeError(f"{type(record.method).__name__} does not fold into a backbone's weights", where=name)
    _require_base(state, "switch")
    _require_untouched(model, state)
    drop_compiled()
    previous = state.merged
    for path, adapter in record.parked.items():  # the model may have moved since the adapter left it
        adapter.to(next(model.get_submodule(path).parameters()).device)
    _restore_base(model, state)
    exchange_owned(model, state, name)
    state.merged = name
    try:
        folds = _folds(model, record, record.parked)
    except RefoldError:
        record = state.records[previous]
        exchange_owned(model, state, previous)
        state.merged = previous
        folds = _folds(model, record, record.parked)
        _write(model, state, previous, folds)
        raise
    _write(model, state, name, folds)


# -- the fold -------------------------------------------------------------------------------------------------


def _adapter_at(model: nn.Module, site: Site, name: str) -> Adapter:
    adapter = hosting.hosted(model)[site.path][name]
    assert isinstance(adapter, Adapter)
    return adapter


@torch.no_grad()
def _folds(model: nn.Module, record: Record, adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """State-dict name -> folded value in float64, from the model's present weights."""
    folds: dict[str, Tensor] = {}

    def current(name: str) -> Tensor | None:
        if name not in folds:
            tensor = get_tensor(model, name)
            if tensor is None:
                return None
            folds[name] = to_float64(tensor)
        return folds[name]

    for site in record.sites:
        layer = model.get_submodule(site.path)
        op = KINDS[site.kind].operator(layer)
        weight_name, bias_name = tensor_name(site.path, op.weight), tensor_name(site.path, op.bias)
        weight = current(weight_name)
        assert weight is not None
        adapter = adapters[site.path]
        if isinstance(adapter, WeightAdapter):
            present = getattr(layer, op.bias, None)
            bias = None if present is None else folds.get(bias_name, to_float64(present))
            folds[weight_name], moved = adapter.reparameterize(weight, bias)
            if moved is not None and moved is not bias:
                folds[bias_name] = moved
        elif isinstance(adapter, ChannelAdapter):
            channel_map = adapter.channel_map()
            folds[weight_name], moved = fold_input(op, weight, channel_map)
            if moved is None:
                continue
            assert site.shift is not None
            if site.shift.target in ("bias", "new_bias"):
                bias = current(bias_name)
                folds[bias_name] = moved if bias is None else bias + moved
            elif site.shift.target == "batchnorm":
                mean = current(f"{site.shift.path}.running_mean")
                assert mean is not None
                folds[f"{site.shift.path}.running_mean"] = mean - moved
            elif site.shift.target == "norm":
                bias, shift = current(f"{site.shift.path}.bias"), channel_map.shift
                assert bias is not None
                assert shift is not None
                folds[f"{site.shift.path}.bias"] = bias + _solve(channel_map, shift, site)
        else:
            raise MergeError(f"{type(adapter).__name__} does not fold", where=site.path, remedy="Ship it unmerged")
    for name, value in folds.items():
        tensor = get_tensor(model, name)
        limit = torch.finfo(tensor.dtype if tensor is not None else torch.float32).max
        if not bool(torch.isfinite(value).all()) or float(value.abs().max()) > limit:
            raise MergeError(
                "the folded value is not finite in the weight's dtype", where=name, remedy="Check training"
            )
    return folds


def _solve(channel_map: ChannelMap, shift: Tensor, site: Site) -> Tensor:
    try:
        return channel_map.solve(shift)
    except RuntimeError as error:  # torch.linalg.LinAlgError, which torch does not export to type checkers
        raise MergeError(
            "the adapter's matrix is singular, so its shift cannot move into the norm before the layer",
            where=site.path,
            remedy="Attach with allow_new_bias=True",
        ) from error


def _park(model: nn.Module, state: State) -> None:
    """Take every adapter and hook out of the module tree, keeping the adapters in the records."""
    drop_compiled()
    for key, record in state.records.items():
        record.parked = {site.path: _adapter_at(model, site, key) for site in record.sites}
    hosting.unhost(model)
    hosting.unfreeze_statistics(model)


def _write(model: nn.Module, state: State, name: str, folds: dict[str, Tensor]) -> None:
    """Put the folds into the model's own tensors, keeping exact copies of what they replace."""
    originals = {n: get_tensor(model, n) for n in folds}
    state.unfolded = {n: None if t is None else t.detach().cpu().clone() for n, t in originals.items()}
    for key, value in folds.items():
        set_tensor(model, key, value)
    state.merged, state.active, state.kept_base = name, None, True
    state.folded = {n: _mark(get_tensor(model, n)) for n in folds}
    for key in folds:
        tensor = get_tensor(model, key)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(False)


def _mark(tensor: Tensor | None) -> int:
    """A checksum of the tensor's bits: one read, no copy, and the same on every device and in every copy.

    Torch's version counters would cost nothing, but writes through ``.data`` or numpy do not raise them.
    """
    if tensor is None:
        return 0
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().view(words).sum(dtype=torch.int64))


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
    now = {name: get_tensor(model, name) for name in state.folded}
    if all(_mark(now[name]) == mark for name, mark in state.folded.items()):
        return
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
    parked = {path: copy.deepcopy(adapter).cpu() for path, adapter in record.parked.items()}
    rounding = max(torch.finfo(v.dtype).eps for v in state.unfolded.values() if v is not None)
    changed = []
    for name, value in _folds(twin, record, parked).items():
        tensor = now[name]
        assert tensor is not None
        tolerance = 4 * max(rounding, torch.finfo(tensor.dtype).eps) * float(value.abs().max())
        same = tensor.shape == value.shape and float((to_float64(tensor).cpu() - value).abs().max()) <= tolerance
        if not same:
            changed.append(name)
    return changed


# -- the check ------------------------------------------------------------------------------------------------


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The lowest floating precision among the parameters: it bounds what outputs can show."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return min(dtypes or {torch.float32}, key=lambda d: -torch.finfo(d).eps)


def probe_examples(model: nn.Module, example: Example) -> list[Example]:
    """The attach-time example and one of fresh noise in its shapes, on the model's device and dtype."""
    reference = next(p for p in model.parameters() if p.is_floating_point())

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(reference.device, reference.dtype if tensor.is_floating_point() else tensor.dtype)

    generator = torch.Generator().manual_seed(1)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    return [example.map(place), example.map(noise).map(place)]


@torch.no_grad()
def run_probes(model: nn.Module, example: Example) -> list[Tensor]:
    """The model's outputs at evaluation on :func:`probe_examples`, flattened to float64."""
    with preserved(model):
        return [
            to_float64(tensor).flatten()
            for probe in probe_examples(model, example)
            for tensor in tensors_of(forward(model, probe))
            if tensor.is_floating_point()
        ]


def _outputs(model: nn.Module, state: State) -> list[Tensor]:
    outputs = run_probes(model, state.example)
    if not outputs:
        raise MergeError("the model returns no floating tensor that could be compared", remedy="Use check=False")
    if not all(bool(torch.isfinite(o).all()) for o in outputs):
        raise MergeError(
            "the unmerged model's output is not finite, so a merge cannot be checked", remedy="Check training"
        )
    return outputs


def difference(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """Largest absolute difference and relative L2 distance of two lists of outputs, ``b`` the reference."""
    left, right = torch.cat(a), torch.cat(b)
    max_abs = float((left - right).abs().max())
    return max_abs, float((left - right).norm() / right.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _compare(model: nn.Module, state: State, name: str, before: list[Tensor]) -> MergeReport:
    dtype = _compute_dtype(model)
    max_abs, rel_l2 = difference(run_probes(model, state.example), before)
    if not rel_l2 <= LIMITS[dtype]:
        raise MergeError(
            f"merged and unmerged outputs differ by {rel_l2:.2e} (relative L2), more than {LIMITS[dtype]:.0e}; "
            "the merge was undone",
            where=name,
            remedy="If the adapter's effect is very large, convert the model to float64 first; else report this",
        )
    return MergeReport(name, tuple(state.folded), True, str(dtype).removeprefix("torch."), max_abs, rel_l2)
