"""load_peft: a PEFT checkpoint as an adapter of refold, decided by the tensors in the file and never by guessing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from refold import hosting
from refold.attachment import install
from refold.errors import SiteError, StoreError
from refold.fold import kind_of
from refold.header import safetensors_metadata
from refold.maps import to_float64
from refold.methods.shelf import DoRA, LoRA
from refold.peft_format.config import CONFIG, PREFIX, WEIGHTS, Config, read_config
from refold.peft_format.layers import difference
from refold.preparation import Prepared, build_adapters, prepare, require_room
from refold.probe import tensor_name
from refold.state import require_state, set_tensor, state_of

__all__ = ["load_peft"]

#: PEFT's names of the tensors of one layer.
_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def load_peft(model: nn.Module, folder: str | Path, *, name: str = "default", example: Any = None) -> nn.Module:
    """Attach the LoRA or DoRA checkpoint that PEFT's ``save_pretrained`` wrote, in place, active and mergeable.

    The model must be the backbone that PEFT adapted, weights included: nothing in such a checkpoint can tell.
    Modules that PEFT saved whole (``modules_to_save``) and biases it trained are put in and train on; the rest is
    frozen. The model is untouched on any error.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: a name for the adapter.
        example: an input for the probing forward, as for :func:`refold.attach`.

    Returns:
        ``model`` itself.

    Raises:
        StoreError: a file is missing, malformed, does not fit the model, or asks for what cannot be honoured exactly.
        SiteError: the name is taken or the model is merged.
    """
    require_room(model, name)
    path = Path(folder) / WEIGHTS
    config = read_config(Path(folder) / CONFIG)
    if not path.is_file():
        raise StoreError(
            "does not exist",
            where=str(path),
            remedy="Save it with PEFT as safetensors; pickles (adapter_model.bin) are not opened",
        )
    safetensors_metadata(path, str(path))
    with safe_open(path, framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        layout = _layout(model, config, shapes, str(path))
        tensors = {key: file.get_tensor(key) for key in layout.all_keys()}
    for key in (key for parts in layout.parts.values() for key in parts.values()):
        if not tensors[key].is_floating_point():
            raise StoreError(f"{key} holds {tensors[key].dtype}", where=str(path), remedy="Save it in floating point")
    values = _values_in_place(model, config, layout, tensors, str(path))
    try:
        prepared = prepare(
            model,
            _method(model, config, layout),
            name=name,
            example=example,
            trainable=_modules_of(model, layout, values),
            allow_new_bias=False,
            strict=True,
        )
    except SiteError as error:
        raise StoreError(f"does not fit this model: {error}", where=str(path)) from error
    _require_plan(model, prepared, layout, values, shapes, str(path))
    adapters = {site.path: _adapter_values(model, config, layout, tensors, site.path) for site in prepared.plan.sites}
    install(model, prepared)
    slots = hosting.hosted(model)
    for host, adapter in adapters.items():
        slots[host][name].load_state_dict(adapter)
    for key in require_state(model, "load").record(name).owned:
        if key in values:
            set_tensor(model, key, values[key])
    return model


# -- what the file holds --------------------------------------------------------------------------------------


@dataclass
class _Layout:
    """Keys of the file.

    Attributes:
        parts: layer path -> part (``"down"``, ``"up"``, ...) -> key.
        whole: name of a tensor of the backbone -> key.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)

    def all_keys(self) -> list[str]:
        return [*(key for parts in self.parts.values() for key in parts.values()), *self.whole.values()]


def _layout(model: nn.Module, config: Config, shapes: Mapping[str, Any], where: str) -> _Layout:
    """Which tensor of the file is what; raises :class:`StoreError` unless every one of them is understood."""
    layout, own = _Layout(), _own_tensors(model)
    unknown: list[tuple[str, str]] = []
    for key in shapes:
        name = key.removeprefix(PREFIX)
        part = next((p for p in _PARTS if name.endswith(f".{p}")), None)
        if name == key:
            raise StoreError(f"{key} does not begin with {PREFIX}", where=where, remedy="Save it with save_pretrained")
        if part is not None:
            layout.parts.setdefault(name.removesuffix(f".{part}"), {})[_PARTS[part]] = key
        elif name in own:
            layout.whole[name] = key
        else:
            unknown.append((name, key))
    wanted = {"down", "up"} | ({"magnitude"} if config.dora else set())
    for path, parts in sorted(layout.parts.items()):  # a layer before the layers inside it
        _require_layer(model, path, set(parts), wanted, where)
        rank, _ = config.at(path)
        if shapes[parts["down"]][:1] != (rank,):
            reason = f"lora_A has shape {shapes[parts['down']]}, but the configuration says rank {rank}"
            raise StoreError(reason, where=path, remedy="Download both files again")
    for name, key in unknown:
        path, _, leaf = name.rpartition(".base_layer.")
        if path in layout.parts and tensor_name(path, leaf) in own:
            layout.whole[tensor_name(path, leaf)] = key
        elif not _is_copy(name, layout):
            raise StoreError(
                f"the model has no place for {key}", where=where, remedy="Use the backbone it was made for"
            )
    if not layout.parts:
        raise StoreError("holds no LoRA tensors", where=where)
    for saved in config.saved:
        if not any(path.endswith(saved) for name in layout.whole for path in _ancestors(name)):
            raise StoreError(f"modules_to_save has {saved!r}, of which the file holds nothing", where=where)
    return layout


def _require_layer(model: nn.Module, path: str, parts: set[str], wanted: set[str], where: str) -> None:
    try:
        layer = model.get_submodule(path)
    except AttributeError as error:
        raise StoreError(
            f"the model has no module {path}", where=where, remedy="Use the backbone it was made for"
        ) from error
    reason = difference(layer)
    if reason is not None:
        raise StoreError(reason, where=path, remedy="Merge it with PEFT and use the merged weights as a backbone")
    if parts - {"bias"} != wanted or {"bias", "magnitude"} <= parts:
        raise StoreError(f"holds {sorted(parts)}, needs {sorted(wanted)}", where=path, remedy="Download it again")
    if "bias" in parts and getattr(layer, "bias", None) is None:
        raise StoreError("lora_bias, but the layer has no bias to fold it into", where=path, remedy="Leave it out")


def _is_copy(name: str, layout: _Layout) -> bool:
    """With bias="all" PEFT writes biases of the modules saved whole three times, under its wrapper's own names."""
    for wrapper in (".modules_to_save.", ".original_module."):
        path, found, leaf = name.partition(wrapper)
        # Under the first, the adapter's name follows where the module is no leaf.
        if found and any(f"{path}.{rest}" in layout.whole for rest in (leaf, leaf.partition(".")[2])):
            return True
    return False


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the backbone's state dict; nothing of adapters, nor what they trained in place."""
    slots = tuple(f"{tensor_name(path, hosting.SLOT)}." for path in hosting.hosted(model))
    own = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor) and not n.startswith(slots)}
    state = state_of(model)
    return own if state is None else own | state.base


def _ancestors(name: str) -> list[str]:
    """Paths of the modules that hold the tensor ``name``, the innermost first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


# -- what it means for the model --------------------------------------------------------------------------------


def _method(model: nn.Module, config: Config, layout: _Layout) -> LoRA:
    at = {path: config.at(path) for path in layout.parts}
    (rank, scale), _ = Counter(at.values()).most_common(1)[0]
    overrides = tuple((path, *found) for path, found in at.items() if found != (rank, scale))
    kind = DoRA if config.dora else LoRA
    return kind(rank=rank, scale=scale, dropout=config.dropout, sites=_sites(model, layout), overrides=overrides)


def _sites(model: nn.Module, layout: _Layout) -> tuple[str, ...]:
    """The adapted layers; ``blocks.*.fc1`` for all that are alike but for numbers, where this says the same."""
    layers = [path for path, module in model.named_modules() if kind_of(module) is not None]
    alike: dict[str, list[str]] = {}
    for path in layout.parts:
        alike.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), []).append(path)
    short = {pattern: {p for p in layers if fnmatchcase(p, pattern)} == set(paths) for pattern, paths in alike.items()}
    return tuple(site for pattern, paths in alike.items() for site in ([pattern] if short[pattern] else paths))


def _values_in_place(
    model: nn.Module, config: Config, layout: _Layout, tensors: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Name -> value of every tensor of the backbone that PEFT trained in place."""
    own = _own_tensors(model)
    values = {name: tensors[key] for name, key in layout.whole.items()}
    for name, value in values.items():
        if value.shape != own[name].shape:
            raise StoreError(
                f"{name} has shape {tuple(value.shape)}, this model needs {tuple(own[name].shape)}",
                where=where,
                remedy="Build the backbone with the number of classes the checkpoint was trained for",
            )
        path, _, leaf = name.rpartition(".")
        if path in layout.parts and leaf != "bias":
            raise StoreError("both the weight and an adapter of it are in the file", where=name)
    for path, parts in layout.parts.items():
        if "bias" in parts:
            name, (_, scale) = tensor_name(path, "bias"), config.at(path)
            shift = to_float64(tensors[parts["bias"]])
            if shift.shape != own[name].shape:
                raise StoreError(f"{parts['bias']} has shape {tuple(shift.shape)}", where=where)
            values[name] = to_float64(values.get(name, own[name])).cpu() + scale * shift
    return values


def _modules_of(model: nn.Module, layout: _Layout, values: dict[str, Tensor]) -> tuple[str, ...]:
    """The fewest modules that hold nothing but tensors in ``values``, and the names of the tensors outside them."""
    own, parameters = _own_tensors(model), {n for n, _ in model.named_parameters()}
    adapted = tuple(f"{path}." for path in layout.parts)
    found: dict[str, None] = {}
    for name in values:
        if name not in parameters:
            continue
        chosen = name
        for path in _ancestors(name):
            inside = [n for n in own if n.startswith(f"{path}.")]
            if not all(n in values for n in inside) or any(a.startswith(f"{path}.") for a in adapted):
                break
            chosen = path
        found[chosen] = None
    return tuple(found)


def _require_plan(
    model: nn.Module,
    prepared: Prepared,
    layout: _Layout,
    values: dict[str, Tensor],
    shapes: Mapping[str, Any],
    where: str,
) -> None:
    """That the plan is exactly the file's, its shapes included, and that nothing of the file would be left over."""
    if {site.path for site in prepared.plan.sites} != set(layout.parts):
        raise StoreError("its layers are not those that their names stand for in this model", where=where)
    for site in prepared.plan.sites:
        if site.owner is not None:
            raise StoreError(
                "another forward reads the layer's weight, past PEFT's adapter",
                where=site.path,
                remedy="Merge it with PEFT and use the merged weights as a backbone",
            )
    for path, adapter in build_adapters(model, prepared, torch.device("meta")).items():
        for part, tensor in adapter.state_dict().items():
            key, shape = layout.parts[path][part], tuple(tensor.shape)
            spatial = (1,) * (len(shapes[layout.parts[path]["down"]]) - 2)
            accepted = {
                "down": (shape,),
                "up": ((*shape, *spatial),),
                "magnitude": ((*shape,), (1, *shape, *spatial)),
            }[part]
            if shapes[key] not in accepted:
                raise StoreError(f"{key} has shape {shapes[key]}, this model needs {accepted[-1]}", where=where)
    own = _own_tensors(model)
    for name in values.keys() - set(prepared.owned):
        if not torch.equal(values[name].to(own[name]), own[name]):
            raise StoreError(f"{name} has another value, and is no parameter that could be exchanged", where=where)


def _adapter_values(
    model: nn.Module, config: Config, layout: _Layout, tensors: dict[str, Tensor], path: str
) -> dict[str, Tensor]:
    parts = layout.parts[path]
    down, up = tensors[parts["down"]], tensors[parts["up"]]
    values = {"down": down, "up": up.flatten(1)}
    if config.dora:
        weight = _own_tensors(model)[tensor_name(path, "weight")]
        norm = to_float64(weight).flatten(1).norm(dim=1).cpu()
        magnitude = to_float64(tensors[parts["magnitude"]]).flatten()
        if bool((magnitude[norm == 0] != 0).any()):
            raise StoreError("a channel of the backbone's weight is zero, its magnitude is not", where=path)
        values["magnitude"] = torch.where(norm > 0, magnitude / norm, torch.ones_like(norm))
    return values
