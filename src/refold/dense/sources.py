"""Feature maps from timm's, torchvision's and transformers' own ways to give them; nothing of a backbone is rewritten.

* timm: ``features_only=True``, with the weights of the same model as :func:`refold.backbones.load` gives it, copied
  name by name; so every source and weight file of that function works, and position embeddings are resampled.
* torchvision: the stages of its ``features``, ``trunk_output`` or ``layer1`` to ``layer4`` in sequence.
* transformers: the architecture's ``...Backbone`` class.

Stochastic depth is off in all of them: a frozen backbone gives the same maps in training as in evaluation.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from refold.backbones.hub import hub_access
from refold.backbones.libraries import from_torchvision_zoo, processor_normalization
from refold.backbones.packaged import PACKAGED
from refold.backbones.request import Loaded
from refold.backbones.timm_source import with_drop_path
from refold.dense.stages import Features, choose_stages
from refold.errors import BackboneError, MissingExtraError
from refold.preprocessing import Preprocessing

__all__ = ["from_timm", "from_torchvision", "from_transformers"]

_PROBE = (64, 96)  # pixels; two different sides tell rows from columns and both from channels
_DEFAULT_SIZE = 224


def from_timm(full: Loaded, stages: Sequence[int] | None) -> Features:
    """The feature extractor of a timm classifier, with its weights.

    Raises:
        BackboneError: timm gives no maps of this architecture, or not the stages needed.
    """
    import timm

    model: Any = full.model
    where = full.spec
    name = full.spec.removeprefix("timm/")
    if name.startswith("packaged/"):
        name = PACKAGED[name.removeprefix("packaged/")].architecture
    info = getattr(model, "feature_info", None)
    if not info:
        raise _no_maps("timm", where)
    indices = choose_stages([stage["reduction"] for stage in info], stages, where)
    arguments: dict[str, Any] = {}
    fixed = bool(model.pretrained_cfg.get("fixed_input_size"))
    if fixed:
        arguments["img_size"] = full.preprocessing.size
        options = inspect.signature(type(model).__init__).parameters
        for option, value in (("dynamic_img_size", True), ("strict_img_size", False)):
            if option in options:
                arguments[option] = value
                fixed = False
                break
    try:
        body: Any = with_drop_path(
            timm.create_model,
            name,
            0.0,
            features_only=True,
            out_indices=indices,
            in_chans=full.preprocessing.channels,
            **arguments,
        )
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _no_maps("timm", where, error) from error
    _copy_weights(model, body, where)
    return Features(
        body,
        tuple(body.feature_info.channels()),
        tuple(body.feature_info.reduction()),
        channels_last=str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC"),
        fixed_size=full.preprocessing.size if fixed else None,
        preprocessing=full.preprocessing,
    )


def from_torchvision(
    name: str, image_size: tuple[int, int] | None, pretrained: bool, stages: Sequence[int] | None
) -> Features:
    """The stages of a torchvision classifier.

    Raises:
        BackboneError: an unknown name, weights that cannot be downloaded, or a model without the stages needed.
    """
    import torchvision.models as zoo
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.ops import StochasticDepth

    where = f"torchvision/{name}"
    model = from_torchvision_zoo(name, zoo, "classifier", pretrained=pretrained)
    trunk = _trunk(model, where)
    for module in trunk.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    outputs: dict[str, torch.Size] = {}
    with torch.no_grad():
        x = torch.zeros(1, 3, *_PROBE)
        for child, module in trunk.named_children():
            x = module(x)
            outputs[child] = x.shape
            if child == "layer4":
                break
    names, shapes = list(outputs), list(outputs.values())
    rows, columns = _PROBE
    # Only one of the two readings gives every map the image's aspect ratio.
    first = all(shape[2] * columns == shape[3] * rows for shape in shapes)
    last = all(shape[1] * columns == shape[2] * rows for shape in shapes)
    if first == last:
        raise _no_maps("torchvision", where)
    strides = [rows // shape[2 if first else 1] for shape in shapes]
    indices = choose_stages(strides, stages, where)
    facts = zoo.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    side = facts.crop_size[0]
    return Features(
        IntermediateLayerGetter(trunk, {names[i]: str(k) for k, i in enumerate(indices)}),
        tuple(shapes[i][1 if first else 3] for i in indices),
        tuple(strides[i] for i in indices),
        channels_last=last,
        fixed_size=None,
        preprocessing=Preprocessing(
            image_size or (side, side), tuple(facts.mean), tuple(facts.std), facts.interpolation.value
        ),
    )


def from_transformers(
    name: str, image_size: tuple[int, int] | None, pretrained: bool, stages: Sequence[int] | None
) -> Features:
    """A ``...Backbone`` of transformers, from the hub, its cache or a local folder.

    Norms that transformers puts after single stages and that a classifier's checkpoint lacks start as the identity.
    Mean and standard deviation are the checkpoint's image processor's; ImageNet's where it brings none.

    Raises:
        BackboneError: unknown or unreachable, of a kind without a backbone class, incomplete weights, or without the
            stages needed.
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig
    except ImportError as error:
        raise MissingExtraError.of("transformers", "transformers") from error

    where = f"transformers/{name}"
    with hub_access(where):
        config: Any = AutoConfig.from_pretrained(name)
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = 0.0
    kind: Any = MODEL_FOR_BACKBONE_MAPPING.get(type(config), None)
    if kind is None:
        raise _no_maps("transformers", where)

    def build(chosen: list[str], weights: bool) -> nn.Module:
        config.out_features = chosen
        if not weights:
            return kind(config).eval()
        with hub_access(where):
            body, loading = kind.from_pretrained(name, config=config, output_loading_info=True)
        lost = [key for key in loading["missing_keys"] if not key.startswith("hidden_states_norms.")]
        if lost or loading["mismatched_keys"]:
            raise BackboneError(f"its checkpoint lacks {sorted(lost)[:4]} of a {kind.__name__}", where=where)
        return body.eval()

    side = getattr(config, "image_size", None) or _DEFAULT_SIZE
    size = image_size or ((side, side) if isinstance(side, int) else (side[0], side[1]))
    names = list(config.stage_names)
    strides, _ = _measure(build(names, weights=False), size, where)
    chosen = choose_stages(strides, stages, where)
    body = build([names[i] for i in chosen], pretrained)
    strides, channels = _measure(body, size, where)
    mean, std = processor_normalization(name)
    return Features(body, channels, strides, False, None, Preprocessing(size, mean, std))


def _copy_weights(full: nn.Module, body: nn.Module, where: str) -> None:
    """Every tensor of ``body`` from ``full``, by names that differ by timm's wrapper prefix and flattened dots."""
    found = {name.replace(".", "_"): tensor for name, tensor in full.state_dict().items()}
    state = {}
    for name in body.state_dict():
        plain = name.replace(".", "_")
        source = next(
            (p for p in (plain, plain.removeprefix("model_"), plain.removeprefix("body_")) if p in found), None
        )
        if source is None:
            raise BackboneError(f"timm's feature extractor has {name}, the classifier has not", where=where)
        state[name] = found[source]
    try:
        body.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BackboneError(f"its weights do not fit timm's feature extractor ({error})", where=where) from error


def _trunk(model: nn.Module, where: str) -> nn.Module:
    """The module whose children, one after the other, are a torchvision classifier without its head."""
    features = getattr(model, "features", None)
    if isinstance(features, nn.Sequential):
        return features
    if isinstance(trunk := getattr(model, "trunk_output", None), nn.Sequential):  # RegNet
        return nn.Sequential(OrderedDict([("stem", model.get_submodule("stem")), *trunk.named_children()]))
    if hasattr(model, "layer4"):  # ResNet
        return model
    raise _no_maps("torchvision", where)


@torch.no_grad()
def _measure(body: Any, size: tuple[int, int], where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and channels of a transformers backbone's maps, from one forward."""
    try:
        maps = body(torch.zeros(1, 3, *size)).feature_maps
    except (RuntimeError, ValueError) as error:
        raise BackboneError(f"cannot take {size[0]}x{size[1]} images ({error})", where=where) from error
    return tuple(round(size[0] / m.shape[2]) for m in maps), tuple(m.shape[1] for m in maps)


def _no_maps(library: str, where: str, error: Exception | None = None) -> BackboneError:
    reason = f"{library} gives no feature maps of this model"
    return BackboneError(
        f"{reason} ({error})" if error else reason,
        where=where,
        remedy="Use a Swin, ConvNeXt, ResNet, EfficientNet or plain ViT of timm",
    )
