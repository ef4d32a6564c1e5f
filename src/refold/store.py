"""save and load: one safetensors file an adapter, with a versioned header, safe to open from strangers.

Layout: tensors ``adapter/<layer path>/<parameter>`` and ``model/<state-dict name>`` (head, parameters trained in
place, moved statistics), and ``task/<state-dict name>`` for what is around the backbone of a dense model; metadata key
``refold`` holds the JSON :class:`Header`. Nothing is unpickled; header size, shapes and hyper-parameters are checked
before anything of their size is allocated.
"""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from refold import hosting
from refold.attachment import attached_part, head_paths, install
from refold.errors import SiteError, StoreError
from refold.fingerprint import body_tensors, compare, fingerprint
from refold.header import FORMAT, Header, fetch, read_header
from refold.preparation import Prepared, build_adapters, prepare, require_room
from refold.sites import own_sites
from refold.state import Record, State, get_tensor, require_state, set_tensor, state_of

__all__ = ["Header", "from_pretrained", "load", "read_header", "save"]


def save(model: nn.Module, path: str | Path, *, name: str | None = None) -> Path:
    """Write one adapter and its head to ``path`` (atomically), the backbone's weights left out.

    Args:
        model: adapters are attached to it, or to one part of it, its backbone: all that is around that part, the
            decoder and heads of a dense model, is written as well.
        path: ends in ``.safetensors``; the folder must exist.
        name: which adapter; None is the one in use or folded in.

    Returns:
        The path written.

    Raises:
        SiteError: nothing is attached, or no adapter has this name.
        StoreError: the path is unsuitable or cannot be written, ``describe`` was given what JSON cannot hold, the
            model was merged with ``keep_base=False``, or something trains that belongs to no adapter.
    """
    part = attached_part(model)
    backbone = model.get_submodule(part)
    state = require_state(backbone, "save")
    if not state.kept_base:
        raise StoreError(
            "cannot be saved: merged without its base weights, the model cannot say which backbone it fits",
            where=str(path),
            remedy="Save before the merge, or merge with keep_base=True",
        )
    target = Path(path)
    if target.suffix != ".safetensors":
        raise StoreError("the name does not end in .safetensors", where=str(target), remedy="Rename it")
    if not target.parent.is_dir():
        raise StoreError("the folder does not exist", where=str(target.parent), remedy="Create it first")
    record = state.record(name)
    chosen = next(key for key, value in state.records.items() if value is record)
    around = {f"task/{key}": t.detach().cpu().contiguous().clone() for key, t in _around(model, part).items()}
    tensors = adapter_tensors(backbone, state, record, chosen) | around
    try:
        header = json.dumps({**_header_json(backbone, state, record, chosen), "part": part}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"what describe() was told does not fit in JSON: {error}", where=str(target)) from error
    try:
        write_atomically(target, tensors, {"refold": header})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"cannot be written ({reason})", where=str(target)) from error
    return target


def load(
    model: nn.Module, source: str | Path, *, name: str | None = None, example: Any = None, force: bool = False
) -> nn.Module:
    """Attach what an adapter file describes and load its weights, in place; the model is untouched on any error.

    Args:
        model: the backbone; or, of a file that holds a dense model, all of that, its backbone where the file says. A
            backbone alone takes the adapter of such a file and nothing else.
        source: a file, or ``"hf-hub:user/repo"`` whose ``adapter.safetensors`` is downloaded.
        name: name for the adapter here; None keeps the file's.
        example: an input for the probing forward, as for :func:`refold.attach`.
        force: load although the backbone's weights are not those the adapter was trained on.

    Returns:
        ``model`` itself.

    Raises:
        StoreError: no refold file, truncated, from a newer format, for another backbone, or sites missing.
        SiteError: the name is taken or the model is merged.
    """
    path, where = fetch(source), str(source)
    header = read_header(path)
    whole = model
    inside = bool(header.part) and any(path == header.part for path, _ in model.named_modules())
    model = whole.get_submodule(header.part) if inside else whole
    require_room(model, name or header.name)
    _require_backbone(model, header, where, force)
    try:
        prepared = prepare(
            model,
            header.method,
            name=name or header.name,
            example=example,
            trainable=header.head,
            allow_new_bias=header.allow_new_bias,
            strict=False,
        )
    except SiteError as error:
        raise StoreError(f"does not fit this model: {error}", where=where) from error
    with safe_open(path, framework="pt") as file:
        _require_shapes(model, prepared, header, file, where)
        around = _around(whole, header.part) if inside else {}
        if inside:
            _require_same({k.removeprefix("task/"): v for k, v in _stored(file, "task/").items()}, around, where)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    install(model, prepared)
    record = require_state(model, "load").record(prepared.name)
    adapters = hosting.adapters_of(model, record.sites, prepared.name)
    for site in own_sites(record.sites):
        adapter = adapters[site.key]
        adapter.load_state_dict({key: tensors[f"adapter/{site.key}/{key}"] for key in adapter.state_dict()})
    for key in record.owned:
        set_tensor(model, key, tensors[f"model/{key}"])
    record.info = _info(header)
    for key, tensor in around.items():
        tensor.data.copy_(tensors[f"task/{key}"])
    return whole


def from_pretrained(source: str | Path, *, weights: str | Path | None = None, force: bool = False) -> nn.Module:
    """The model an adapter file is for, with the adapter attached, in evaluation mode: the backbone that it names, in
    the dense model around it where the file holds one.

    Args:
        source: as for :func:`load`.
        weights: local checkpoint of the backbone, where it was trained on one.
        force: as for :func:`load`.

    Raises:
        StoreError: as :func:`load`, or the file does not say which backbone it is for.
        BackboneError: the backbone cannot be loaded.
    """
    path = fetch(source)
    header = read_header(path)
    if not header.backbone:
        raise StoreError(
            "the file does not name its backbone",
            where=str(source),
            remedy="Build it yourself and call refold.load",
        )
    from refold import backbones

    if header.part:
        from refold.dense.building import rebuild

        return load(rebuild(header, weights), path, force=force).eval()
    if header.task == "video":
        from refold.video.building import rebuild as rebuild_video

        return load(rebuild_video(header, weights), path, force=force).eval()
    size = header.preprocessing.size if header.preprocessing else None
    channels = header.preprocessing.channels if header.preprocessing else None
    outputs = header.extra.get("outputs", len(header.classes) if header.classes else 1)
    loaded = backbones.load(
        header.backbone,
        num_classes=outputs,
        in_chans=channels,
        image_size=size,
        weights=weights,
        head=backbones.stored_head(header.extra.get("prompts")),
    )
    return load(loaded.model, path, force=force).eval()


# -- writing --------------------------------------------------------------------------------------------------


def _require_all_recorded(model: nn.Module, state: State) -> None:
    """Raise :class:`StoreError` for a parameter that trains and that no file would hold."""
    in_use = state.active or state.merged
    known = set(state.records[in_use].trainable) if in_use is not None else set()
    adapters = hosting.adapter_parameters(model)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and key not in known and id(parameter) not in adapters:
            raise StoreError(
                "trains, but is no part of the adapter, so the file would not hold it",
                where=key,
                remedy="Attach with trainable=[...], or after replacing layers; if it did not change, freeze it "
                "(requires_grad_(False)); if it did, save model.state_dict()",
            )


def adapter_tensors(model: nn.Module, state: State, record: Record, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    adapters = record.parked or hosting.adapters_of(model, record.sites, name)
    _require_all_recorded(model, state)
    for site in own_sites(record.sites):
        for key, value in adapters[site.key].state_dict().items():
            tensors[f"adapter/{site.key}/{key}"] = value
    in_use = name in (state.active, state.merged)
    for key in record.owned:
        value = state.unfolded.get(key) if in_use else record.values.get(key, state.base.get(key))
        if value is None:
            value = get_tensor(model, key)
        if value is None:
            raise StoreError(
                f"its layer was replaced or removed after adapter {name!r} was attached",
                where=key,
                remedy=hosting.REATTACH,
            )
        tensors[f"model/{key}"] = value
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def _header_json(model: nn.Module, state: State, record: Record, name: str) -> dict[str, Any]:
    info = dict(record.info)
    preprocessing = info.pop("preprocessing", None)
    return {
        "format": FORMAT,
        "refold": version("refold"),
        "name": name,
        "method": record.method.to_json(),
        "backbone": info.pop("backbone", "") or _timm_spec(model),
        "architecture": f"{type(model).__module__}.{type(model).__qualname__}",
        "fingerprint": fingerprint(_original_body(model, state, record.head)),
        "sites": [[s.key, s.slot, str(s.shift or "")] for s in record.sites],
        "head": list(record.head),
        "allow_new_bias": any(s.shift is not None and s.shift.target == "new_bias" for s in record.sites),
        "classes": info.pop("classes", None),
        "preprocessing": preprocessing.to_json() if preprocessing is not None else None,
        "task": info.pop("task", ""),
        "extra": info,
    }


def _timm_spec(model: nn.Module) -> str:
    """timm models know their own name; only pretrained weights can be found again by it."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("architecture"):
        return ""
    tag = f".{config['tag']}" if config.get("tag") else ""
    return f"timm/{config['architecture']}{tag}"


def _original_body(model: nn.Module, state: State | None, head: tuple[str, ...]) -> dict[str, Tensor]:
    """The backbone's original values, whatever is trained in place or folded now."""
    originals: dict[str, Tensor] = {}
    skip: set[int] = set()
    if state is not None:
        originals = {n: t for n, t in state.unfolded.items() if t is not None} | dict(state.base)
        skip = hosting.adapter_parameters(model)
    return body_tensors(model, head, originals, skip)


def write_atomically(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        with Path(temporary).open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# -- reading -----------------------------------------------------------------------------------------------------


def _require_backbone(model: nn.Module, header: Header, where: str, force: bool) -> None:
    if force:
        return
    try:
        reason = compare(header.fingerprint, _original_body(model, state_of(model), header.head))
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"the fingerprint is malformed ({error})", where=where) from error
    if reason is not None:
        raise StoreError(
            f"made for another backbone ({header.backbone or header.architecture}): {reason}",
            where=where,
            remedy="Load it onto the weights it was trained on, or pass force=True (--force) if you know better",
        )


def _require_shapes(model: nn.Module, prepared: Prepared, header: Header, file: Any, where: str) -> None:
    """Compare sites and shapes with adapters built on the meta device: nothing of a stranger's size is allocated."""
    found = tuple((s.key, s.slot, str(s.shift or "")) for s in prepared.plan.sites)
    if found != header.sites:
        odd = sorted(set(found) ^ set(header.sites)) or [("order",)]
        raise StoreError(f"its adapters have other sites in this backbone (first difference: {odd[0][0]})", where=where)
    expected: dict[str, tuple[int, ...]] = {}
    adapters = build_adapters(model, prepared, torch.device("meta"))
    for site in own_sites(prepared.plan.sites):
        shapes = {key: tuple(t.shape) for key, t in adapters[site.key].state_dict().items()}
        expected |= {f"adapter/{site.key}/{key}": shape for key, shape in shapes.items()}
    for key in prepared.owned:
        tensor = get_tensor(model, key)
        expected[f"model/{key}"] = () if tensor is None else tuple(tensor.shape)
    around = _stored(file, "task/") if header.part else {}
    stored = {key: shape for key, shape in _stored(file).items() if key not in around}
    _require_names(stored, expected, where)
    classifiers = _classifiers(model, header.head)
    outputs: dict[str, int] = {}
    for key, shape in expected.items():
        # A classifier may differ in its number of classes, its first dimension, and in nothing else.
        layer, found_shape = classifiers.get(key.removeprefix("model/")), stored[key]
        if layer is not None and len(found_shape) == len(shape) and all(found_shape):
            shape = (outputs.setdefault(layer, found_shape[0]), *shape[1:])
        if found_shape != shape:
            raise StoreError(f"{key} has shape {found_shape}, this model needs {shape}", where=where)


def _stored(file: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Name -> shape of the file's tensors whose names begin so."""
    names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
    return {key: tuple(file.get_slice(key).get_shape()) for key in names}


def _require_names(stored: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    missing, extra = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or extra:
        raise StoreError(f"missing tensors {missing[:3]}, unexpected tensors {extra[:3]}", where=where)


def _require_same(stored: dict[str, tuple[int, ...]], around: dict[str, Tensor], where: str) -> None:
    """What is around the backbone has these names and shapes."""
    _require_names(stored, around, where)
    for key, tensor in around.items():
        if stored[key] != tuple(tensor.shape):
            raise StoreError(f"{key} has shape {stored[key]}, this model needs {tuple(tensor.shape)}", where=where)


def _around(model: nn.Module, part: str) -> dict[str, Tensor]:
    """State-dict name -> tensor of all of a dense model but its backbone, whatever paths lead to that."""
    if not part:
        return {}
    backbone = {id(tensor) for tensor in model.get_submodule(part).state_dict(keep_vars=True).values()}
    return {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in backbone}


def _classifiers(model: nn.Module, head: tuple[str, ...]) -> dict[str, str]:
    """Tensor name -> path of its layer, for the layers of the file's head that put out the model's classes."""
    try:
        own = head_paths(model)
    except SiteError:
        return {}
    found: dict[str, str] = {}
    for path in set(own).intersection(head):
        names = [n for n, _ in model.named_parameters() if n.startswith(f"{path}.")]
        last = names[-1].rpartition(".")[0]
        found |= {name: last for name in names if name.rpartition(".")[0] == last}
    return found


def _info(header: Header) -> dict[str, Any]:
    given = {
        "backbone": header.backbone or None,
        "task": header.task or None,
        "classes": None if header.classes is None else list(header.classes),
        "preprocessing": header.preprocessing,
    }
    return header.extra | {key: value for key, value in given.items() if value is not None}
