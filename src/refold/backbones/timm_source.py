"""Backbones of timm: built by name, with weights from the hub or from a local file, strictly loaded."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from refold.backbones.checkpoints import (
    class_count,
    describe_mismatch,
    read_npz_layout,
    read_state_dict,
    require_file,
    some,
)
from refold.backbones.hub import hub_access
from refold.backbones.normalization import from_config
from refold.backbones.request import Loaded, Request
from refold.errors import BackboneError

__all__ = ["build", "check_size", "close_matches", "finish", "known_name", "load_hub", "load_timm"]

_HUB = "hf-hub:"


def load_timm(name: str, request: Request) -> Loaded:
    """A timm model by its registered name, with or without a pretrained tag."""
    name = known_name(name)
    model = build(name, request)
    tag = model.pretrained_cfg.get("tag")
    architecture = name.partition(".")[0]
    from_tag = request.pretrained and request.weights is None and tag
    return finish(model, f"timm/{architecture}.{tag}" if from_tag else f"timm/{name}", request)


def load_hub(repository: str, request: Request) -> Loaded:
    """A timm model from any Hugging Face repository (``user/repo``, optionally ``@revision``)."""
    name = f"{_HUB}{repository}"
    return finish(build(name, request), name, request)


def build(name: str, request: Request, **overlay: Any) -> Any:
    """The model with its weights and the head that belongs to them.

    Args:
        name: a registered timm name, or ``hf-hub:user/repo``.
        request: ``num_classes`` is not used here, see :func:`finish`.
        overlay: entries that replace those of timm's record about the pretrained weights.

    Raises:
        BackboneError: the name has no weights, the download fails, or the file does not fit.
    """
    from timm.models import is_model_pretrained

    if request.weights is not None:
        require_file(request.weights)
    record = _record(name) | overlay
    if request.weights is not None:
        from_file = _build_from_npz if request.weights.suffix == ".npz" else _build_from_state_dict
        return from_file(name, request, request.weights, record, overlay)
    if not request.pretrained:
        return _create(name, request, record, pretrained_cfg_overlay=overlay)
    if not name.startswith(_HUB) and not is_model_pretrained(name):
        raise BackboneError(
            "timm knows no pretrained weights for this architecture",
            where=_spec(name),
            remedy="Pass a file with --weights FILE (weights=...), or pretrained=False for random weights",
        )
    with hub_access(_spec(name)):
        return _create(name, request, record, pretrained=True, pretrained_cfg_overlay=overlay)


def finish(model: Any, spec: str, request: Request) -> Loaded:
    """Check the image size, replace the head if asked, and describe the input."""
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)
    size = request.image_size or tuple(config["input_size"][1:])
    check_size(size, getattr(getattr(model, "patch_embed", None), "patch_size", None), spec)
    if request.num_classes is not None:
        model.reset_classifier(request.num_classes)
    channels = request.in_chans or config["input_size"][0]
    return Loaded(model.eval(), spec, from_config(config, channels=channels, size=size))


def check_size(size: tuple[int, int], patch: int | tuple[int, int] | None, spec: str) -> None:
    """Raise :class:`BackboneError` unless whole patches cover the image; names the nearest size that works."""
    patch = (patch, patch) if isinstance(patch, int) else patch
    if patch is None or not (size[0] % patch[0] or size[1] % patch[1]):
        return
    nearest = [max(1, round(s / p)) * p for s, p in zip(size, patch, strict=True)]
    raise BackboneError(
        f"an image size of {size[0]}x{size[1]} is no multiple of its {patch[0]}x{patch[1]} patches",
        where=spec,
        remedy=f"The nearest size that works is {nearest[0]}x{nearest[1]}",
    )


def known_name(name: str) -> str:
    """The current timm name for ``name``; names timm has renamed are followed.

    Raises:
        BackboneError: timm does not know the architecture or the tag; lists close matches.
    """
    import timm
    from timm.models import get_deprecated_models, is_model

    architecture, _, tag = name.partition(".")
    renamed = get_deprecated_models()
    if architecture in renamed:
        current = renamed[architecture]
        if current is None:
            raise BackboneError("timm has removed this model", where=f"timm/{name}", remedy="See: refold models")
        return current
    if not is_model(architecture):
        remedy = close_matches(name, timm.list_models(), "timm/") or "See: refold models"
        raise BackboneError("timm knows no such model", where=f"timm/{name}", remedy=remedy)
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        remedy = f"Known tags: {', '.join(t.partition('.')[2] for t in tagged)}" if tagged else "It has no tags"
        raise BackboneError(f"timm knows no pretrained tag {tag!r}", where=f"timm/{name}", remedy=remedy)
    return name


def close_matches(name: str, candidates: list[str], prefix: str) -> str:
    """A sentence with the names most like ``name``, or nothing."""
    found = difflib.get_close_matches(name, candidates, n=4, cutoff=0.6)
    return f"Did you mean {', '.join(prefix + f for f in found)}?" if found else ""


def _spec(name: str) -> str:
    return name if name.startswith(_HUB) else f"timm/{name}"


def _record(name: str) -> dict[str, Any]:
    """What timm knows of a model's pretrained weights: input size, classifier, first layer, and so on."""
    from timm.models import get_pretrained_cfg, load_model_config_from_hf

    own: dict[str, Any] = {}
    architecture = name
    if name.startswith(_HUB):
        with hub_access(name):
            own, architecture, _ = load_model_config_from_hf(name.removeprefix(_HUB))
    known = get_pretrained_cfg(architecture)
    return (known.to_dict() if known is not None else {}) | own


def _create(name: str, request: Request, record: dict[str, Any], **arguments: Any) -> Any:
    """``timm.create_model`` with the options of ``request`` that this architecture takes."""
    import timm

    if request.in_chans is not None:
        arguments["in_chans"] = request.in_chans
    if request.image_size is not None and record.get("fixed_input_size"):  # ViT, Swin and their like
        arguments["img_size"] = request.image_size
    try:
        return with_drop_path(timm.create_model, name, request.drop_path, **arguments)
    except (AssertionError, ValueError) as error:
        if "img_size" not in arguments:
            raise
        height, width = arguments["img_size"]
        raise BackboneError(
            f"cannot be built for {height}x{width} images ({error})",
            where=_spec(name),
            remedy="Use the model's own size, or a multiple of its patch and window sizes",
        ) from error


def with_drop_path(create: Callable[..., Any], name: str, rate: float, **arguments: Any) -> Any:
    """``create(name, ...)`` with this rate of stochastic depth; 0 is said as well, for Swin and others have a default.

    An architecture without it is built as it is.
    """
    try:
        return create(name, drop_path_rate=rate, **arguments)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        return create(name, **arguments)


def _build_from_state_dict(
    name: str, request: Request, path: Path, record: dict[str, Any], overlay: dict[str, Any]
) -> Any:
    """Load a file of PyTorch tensors through timm's own conversion for this architecture.

    That conversion renames foreign keys, resizes position embeddings and adapts the first layer to ``in_chans``.
    The model is built with the file's number of classes, so that everything, the head included, must match.
    """
    state = read_state_dict(path)
    classifier = record.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    classes = class_count({key: tuple(value.shape) for key, value in state.items()}, classifiers)
    overlay = overlay | {"state_dict": state, "source": "", "num_classes": classes, "label_offset": None}
    stem = state.get(f"{record.get('first_conv')}.weight")
    if request.in_chans is not None and stem is not None and stem.shape[1] == request.in_chans:
        # Saved with this number of channels: tell timm, which would else assume three.
        overlay["input_size"] = (request.in_chans, *record["input_size"][1:])
    try:
        model = _create(name, request, record, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except BackboneError:
        raise
    except Exception as error:  # a conversion given foreign keys fails in many ways
        raise _misfit(path, name, describe_mismatch(error)) from error
    model.pretrained_cfg.pop("state_dict")  # or the model would carry its weights twice
    return model


def _build_from_npz(name: str, request: Request, path: Path, record: dict[str, Any], overlay: dict[str, Any]) -> Any:
    """Load a Google ``.npz`` checkpoint through the architecture's ``load_pretrained``.

    timm's loader copies what it knows and is silent about the rest, so every parameter is first set to NaN: one
    that is still NaN afterwards was not in the file.
    """
    layout = read_npz_layout(path)
    model = _create(name, request, record, num_classes=layout.classes, pretrained_cfg_overlay=overlay)
    if not hasattr(model, "load_pretrained"):
        remedy = "Use a timm ViT or BiT architecture, or a .safetensors or .pth file"
        raise BackboneError(f"{name} cannot read .npz checkpoints", where=str(path), remedy=remedy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    try:
        model.load_pretrained(str(path))
    except Exception as error:  # KeyError, ValueError, RuntimeError or a damaged archive
        raise _misfit(path, name, f"{type(error).__name__}: {error}") from error
    missing = [key for key, parameter in model.named_parameters() if bool(parameter.isnan().any())]
    if missing:
        raise _misfit(path, name, f"missing {some(missing)}")
    if layout.blocks > len(getattr(model, "blocks", ())):
        raise _misfit(path, name, f"it has {layout.blocks} blocks, not {len(model.blocks)}")
    return model


def _misfit(path: Path, name: str, why: str) -> BackboneError:
    remedy = "Name the architecture the weights belong to"
    return BackboneError(f"does not fit {name}: {why}", where=str(path), remedy=remedy)
