"""The exactness certificate: what merging changed, measured on copies in three precisions, and what it left alone."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from refold.attachment import detach
from refold.comparison import LIMITS, difference, probe_examples, run_probes
from refold.errors import MergeError
from refold.hosting import hooks_left
from refold.merging import merge
from refold.probe import forward, preserved
from refold.state import require_state

__all__ = ["certify"]


def certify(model: nn.Module) -> dict[str, Any]:
    """Merge copies of an attached model and compare them with the unmerged one; ``model`` stays as it is.

    Rows ``float64`` and ``float32`` are the distance of merged from unmerged outputs. Row ``bfloat16`` is the
    distance of the float32 merge, cast to bfloat16, from the unmerged float64 model, and its limit four times that
    of the unmerged model run in bfloat16: both are rounding, which a few outputs show only to that accuracy, while
    a wrong fold is off by far more.

    Returns:
        JSON-ready: ``dtypes`` (for each, ``max_abs``, ``max_rel`` relative to the largest output, ``rel_l2``
        and its ``limit``), ``probe``, ``keys_unchanged``, ``shapes_unchanged``, ``hooks_left``,
        ``extra_modules``, ``parameters``, ``operations`` (one forward, in floating-point operations),
        ``folded_layers``, versions, and ``holds``: whether every line is as it must be.

    Raises:
        SiteError: nothing is attached.
        MergeError: the model is merged already, or the adapter does not fold.
    """
    state = require_state(model, "certify")
    if state.merged is not None:
        raise MergeError("the model is merged already", where="certify", remedy="Call refold.unmerge first")
    exact = _copy(model, torch.float64)
    reference = run_probes(exact, state.example)
    report = merge(exact, check=False)
    dtypes = {"float64": _row(run_probes(exact, state.example), reference, LIMITS[torch.float64])}
    del exact

    single = _copy(model, torch.float32)
    unmerged = run_probes(single, state.example)
    half_unmerged = run_probes(_copy(single, torch.bfloat16), state.example)
    merge(single, check=False, keep_base=False)
    dtypes["float32"] = _row(run_probes(single, state.example), unmerged, LIMITS[torch.float32])
    half_merged = run_probes(_copy(single, torch.bfloat16), state.example)
    rounding = difference(half_unmerged, reference)[1]
    dtypes["bfloat16"] = _row(half_merged, reference, 4 * rounding)

    untouched = _copy(model, torch.float32)
    detach(untouched)
    merged_shapes, shapes = ({k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (single, untouched))
    modules = [{(n, type(m)) for n, m in m.named_modules()} for m in (single, untouched)]
    inputs = probe_examples(untouched, state.example)
    certificate: dict[str, Any] = {
        "dtypes": dtypes,
        "probe": {"inputs": len(inputs), "shape": _shape(inputs[0])},
        "keys_unchanged": list(merged_shapes) == list(shapes),
        "shapes_unchanged": merged_shapes == shapes,
        "hooks_left": hooks_left(single),
        "extra_modules": len(modules[0] - modules[1]),
        "parameters": {"backbone": _count(untouched), "merged": _count(single)},
        "operations": {"backbone": _operations(untouched, inputs[0]), "merged": _operations(single, inputs[0])},
        "folded_layers": len(state.record().sites),
        "folded_tensors": len(report.folded),
        "refold": version("refold"),
        "torch": torch.__version__,
    }
    certificate["holds"] = (
        all(row["rel_l2"] <= row["limit"] for row in dtypes.values())
        and certificate["keys_unchanged"]
        and certificate["shapes_unchanged"]
        and not certificate["hooks_left"]
        and not certificate["extra_modules"]
        and certificate["parameters"]["backbone"] == certificate["parameters"]["merged"]
        and certificate["operations"]["backbone"] == certificate["operations"]["merged"]
    )
    return certificate


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model).to(device=_compute_device(model, dtype), dtype=dtype)


def _compute_device(model: nn.Module, dtype: torch.dtype) -> torch.device:
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "mps" and dtype == torch.float64 else device


def _row(found: list[Tensor], reference: list[Tensor], limit: float) -> dict[str, float]:
    max_abs, rel_l2 = difference(found, reference)
    largest = max(float(r.abs().max()) for r in reference)
    return {"max_abs": max_abs, "max_rel": max_abs / max(largest, 1e-300), "rel_l2": rel_l2, "limit": limit}


def _shape(example: Any) -> list[int]:
    tensors = [a for a in (*example.args, *example.kwargs.values()) if isinstance(a, Tensor)]
    return list(tensors[0].shape) if tensors else []


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _operations(model: nn.Module, example: Any) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # brings triton, which takes longer than all of refold

    counter, fast = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see inside fused attention layers
    try:
        with preserved(model), counter:
            forward(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()
