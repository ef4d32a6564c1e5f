"""save_peft: a LoRA or DoRA of refold as a checkpoint that ``peft.PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from refold import hosting
from refold.errors import StoreError
from refold.maps import to_float64
from refold.methods.shelf import DoRA, LoRA
from refold.peft_format.config import CONFIG, PREFIX, WEIGHTS
from refold.peft_format.layers import difference
from refold.probe import tensor_name
from refold.state import Record, State, get_tensor, require_state
from refold.store import adapter_tensors, write_atomically

__all__ = ["save_peft"]


def save_peft(model: nn.Module, folder: str | Path, *, name: str | None = None) -> Path:
    """Write a LoRA or DoRA and its head as a PEFT checkpoint, for PEFT 0.15 or later.

    The head becomes ``modules_to_save``; PEFT needs a backbone with a head of the same size to load it onto.

    Args:
        folder: made if it does not exist; its parent must.
        name: which adapter; None is the one in use or folded in.

    Returns:
        The folder.

    Raises:
        SiteError: nothing is attached, or no adapter has this name.
        StoreError: the method, a layer or the head has no exact counterpart in PEFT, the folder cannot be written, or
            the model was merged with ``keep_base=False``.
    """
    state = require_state(model, "save")
    if not state.kept_base:
        raise StoreError(
            "cannot be saved: merged without its base weights",
            where=str(folder),
            remedy="Save before the merge, or merge with keep_base=True",
        )
    record = state.record(name)
    chosen = next(key for key, value in state.records.items() if value is record)
    method = record.method
    if type(method) not in (LoRA, DoRA):
        raise StoreError(
            f"{type(method).__name__} has no counterpart in PEFT", where=str(folder), remedy="Use refold.save"
        )
    assert isinstance(method, LoRA)
    if method.rows is not None:
        raise StoreError(
            f"PEFT has no low-rank adapter on some rows of a weight (rows={method.rows})",
            where=str(folder),
            remedy="Keep refold's own file, or merge and ship plain weights",
        )
    found = adapter_tensors(model, state, record, chosen)
    for site in record.sites:
        reason = difference(model.get_submodule(site.path))
        if reason is None and site.owner is not None:
            reason = "another forward reads the layer's weight, past PEFT's adapter"
        if reason is not None:
            raise StoreError(reason, where=site.path, remedy="Use refold.save, or merge and save the merged weights")
    heads = _require_heads(model, record)
    tensors = _tensors(model, state, record, found, heads)
    config = json.dumps(_config(method, [site.path for site in record.sites], heads), indent=2)
    target = Path(folder)
    try:
        target.mkdir(exist_ok=True)
        write_atomically(target / WEIGHTS, tensors, {"format": "pt"})
        partial = target / f".{CONFIG}.{os.getpid()}"
        partial.write_text(config)
        partial.replace(target / CONFIG)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot be written ({reason})", where=str(target)) from error
    return target


def _require_heads(model: nn.Module, record: Record) -> tuple[str, ...]:
    """The head's modules; PEFT can save modules alone, and takes every one whose path ends in the given name."""
    slots = tuple(f"{tensor_name(path, hosting.SLOT)}." for path in hosting.hosted(model))
    modules = [p for p, m in model.named_modules() if m.state_dict() and not f"{p}.".startswith(slots)]
    for name in record.trainable:
        if not any(name.startswith(f"{head}.") for head in record.head):
            raise StoreError(
                "trained in place, which PEFT can hold for whole modules only",
                where=name,
                remedy="Name modules in trainable=, or use refold.save",
            )
    for head in record.head:
        others = [path for path in modules if path != head and path.endswith(head)]
        if others:
            raise StoreError(
                f"PEFT would take {others[0]} for the head {head!r} too", where=head, remedy="Use refold.save"
            )
    return record.head


def _tensors(
    model: nn.Module, state: State, record: Record, found: dict[str, Tensor], heads: tuple[str, ...]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site in record.sites:
        down, up = (found[f"adapter/{site.path}/{part}"] for part in ("down", "up"))
        spatial = (1,) * (down.dim() - 2)
        key = f"{PREFIX}{site.path}."
        tensors[f"{key}lora_A.weight"] = down
        tensors[f"{key}lora_B.weight"] = up.view(*up.shape, *spatial)
        if isinstance(record.method, DoRA):
            weight = _frozen(model, state, tensor_name(site.path, "weight"))
            relative = found[f"adapter/{site.path}/magnitude"]
            magnitude = (to_float64(relative) * to_float64(weight).flatten(1).norm(dim=1).cpu()).to(relative.dtype)
            tensors[f"{key}lora_magnitude_vector"] = magnitude.view(1, -1, *spatial) if spatial else magnitude
    own: dict[str, Tensor] = model.state_dict()
    for path, value in own.items():
        if any(path.startswith(f"{head}.") for head in heads):
            tensors[f"{PREFIX}{path}"] = found.get(f"model/{path}", value).detach().cpu().contiguous().clone()
    return tensors


def _frozen(model: nn.Module, state: State, name: str) -> Tensor:
    """The backbone's own value, whatever another adapter trained there or folded in."""
    found = (state.base.get(name), state.unfolded.get(name), get_tensor(model, name))
    return next(tensor for tensor in found if tensor is not None)


def _config(method: LoRA, paths: list[str], heads: tuple[str, ...]) -> dict[str, Any]:
    at = {path: method.at(path) for path in paths}
    (rank, scale), _ = Counter(at.values()).most_common(1)[0]
    ranks = {_pattern(path, paths): r for path, (r, _) in at.items() if r != rank}
    alphas = {_pattern(path, paths): _alpha(r, s) for path, (r, s) in at.items() if r * s != rank * scale}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _alpha(rank, scale),
        "lora_dropout": method.dropout,
        # An expression, because PEFT matches the names in a list with every path that ends in one of them.
        "target_modules": "|".join(map(re.escape, paths)),
        "modules_to_save": list(heads) or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_dora": isinstance(method, DoRA),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _alpha(rank: int, scale: float) -> float | int:
    alpha = rank * scale
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(path: str, paths: list[str]) -> str:
    """An expression that PEFT finds in ``path`` and in no other of ``paths``: the path itself where that will do."""
    plain = re.compile(rf"(.*\.)?({path})$") if re.escape(path).replace("\\.", ".") == path else None
    if plain is not None and [p for p in paths if plain.match(p)] == [path]:
        return path
    return f"^{re.escape(path)}"
