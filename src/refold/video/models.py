"""Models of clips behind one interface: clips (B, T, C, H, W) in, scores (B, K) out.

* Backbones for images see the frames of a clip one after the other; their scores are averaged (:class:`FrameModel`).
* transformers' VideoMAE, TimeSformer and ViViT, and torchvision's video models, are used as they are; the module around
  them only brings a clip into their layout and takes the scores out (:class:`ClipModel`).

Methods attach to the wrapped model, or to the library's own: nothing in it is rewritten. The keys of a state dict are
the model's own under ``backbone.``. Of TimeSformer's divided attention the role ``"attention"`` means both parts, over
time and over space; name paths (``"*.temporal_attention.attention.qkv"``) for one of them.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from refold.backbones import Loaded, load
from refold.backbones.checkpoints import describe_mismatch, read_state_dict
from refold.backbones.hub import hub_access
from refold.backbones.libraries import from_torchvision_zoo, processor_normalization
from refold.backbones.normalization import NORMALIZATIONS
from refold.backbones.request import Request
from refold.errors import BackboneError, DataError, MissingExtraError
from refold.preprocessing import Preprocessing
from refold.probe import example_input
from refold.survey import head_paths

__all__ = ["ClipModel", "FrameModel", "load_video"]

#: transformers' families that are known to work, by ``config.model_type``.
_FAMILIES = ("timesformer", "videomae", "vivit")
#: What both libraries call the head of a model of clips.
_HEADS = ("classifier", "fc", "head")
#: Frames of a clip of a backbone for images, and of torchvision's models, where nothing else is asked.
_FRAMES = 8
_TORCHVISION_FRAMES = 16


class FrameModel(nn.Module):
    """A backbone for images over the frames of clips: the mean of the frames' scores.

    The backbone sees the frames of a clip one after the other, as images (B * T, C, H, W): what
    :class:`refold.STAdapter` with the same ``frames`` expects.

    Args:
        backbone: maps images (N, C, H, W) to scores (N, K).
        frames: of every clip. A clip of another length is refused: an adapter that mixes frames would mix clips.
    """

    def __init__(self, backbone: nn.Module, frames: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.frames = frames

    def forward(self, clips: Tensor) -> Tensor:
        _require_clips(clips, self.frames)
        return self.backbone(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).mean(1)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The backbone's head, which trains beside an adapter."""
        return tuple(self.backbone.get_submodule(path) for path in head_paths(self.backbone))

    def example_input(self) -> Tensor:
        """A random clip that :func:`refold.attach` can probe with, (1, T, C, H, W)."""
        image: Tensor = example_input(self.backbone).args[0]
        return image.unsqueeze(1).repeat(1, self.frames, 1, 1, 1)


class ClipModel(nn.Module):
    """A model of clips from a library, in one layout.

    Args:
        backbone: gives scores (B, K), or an object that has them as ``logits``.
        frames, size: of the clips it is built for; its tables of positions are for these, so others are refused.
        channels_first: it reads (B, C, T, H, W), as torchvision's do, instead of (B, T, C, H, W).
    """

    def __init__(self, backbone: nn.Module, frames: int, size: tuple[int, int], *, channels_first: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.frames = frames
        self.size = size
        self.channels_first = channels_first

    def forward(self, clips: Tensor) -> Tensor:
        _require_clips(clips, self.frames, self.size)
        scores = self.backbone(clips.transpose(1, 2) if self.channels_first else clips)
        return scores if isinstance(scores, Tensor) else scores.logits

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The model's head, which trains beside an adapter."""
        return tuple(module for name, module in self.backbone.named_children() if name in _HEADS)

    def example_input(self) -> Tensor:
        """A random clip that :func:`refold.attach` can probe with, (1, T, 3, H, W)."""
        parameter = next(self.parameters())
        clip = torch.randn(1, self.frames, 3, *self.size, generator=torch.Generator().manual_seed(0))
        return clip.to(parameter.device, parameter.dtype)


def load_video(
    spec: str,
    *,
    frames: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | PathLike[str] | None = None,
    drop_path: float = 0.0,
    in_chans: int | None = None,
) -> Loaded:
    """Build a model of clips and load its weights; never random weights unless asked.

    Args:
        spec: ``transformers/NAME`` (a VideoMAE, TimeSformer or ViViT: a repository on the hub, a local folder, or
            ``videomae``, ``timesformer`` or ``vivit`` for the family's default architecture), ``torchvision/NAME``
            (``swin3d_t``, ``mvit_v2_s``, ``r3d_18``, ...), or any backbone for images that
            :func:`refold.backbones.load` takes.
        frames: of every clip. Default: what the model was made for; 8 for backbones for images.
        image_size: pixels, a side or (height, width). Default: the model's.
        num_classes: a fresh head for so many classes, 0 for none; None keeps the head of the weights. A VideoMAE with
            a fresh head averages its tokens, as published, also where the checkpoint is of its pretraining.
        pretrained: False for random weights.
        weights: a local file instead of the download.
        drop_path: stochastic depth rate while training.
        in_chans: input channels of a backbone for images; clips of the others have three.

    Returns:
        A :class:`FrameModel` or :class:`ClipModel`, whose ``frames`` say how long its clips are; its canonical spec;
        how a frame becomes its input.

    Raises:
        BackboneError: as :func:`refold.backbones.load`; and where the model cannot take such clips.
        MissingExtraError: a package that the spec needs is not installed.
    """
    request = Request(
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        weights=None if weights is None else Path(weights).expanduser(),
        pretrained=pretrained,
        drop_path=drop_path,
    )
    if frames is not None and frames < 1:
        raise BackboneError(f"must be at least 1 (got {frames})", where="frames")
    for prefix, source in (("transformers/", _transformers), ("torchvision/", _torchvision)):
        if spec.startswith(prefix) and len(spec) > len(prefix):
            if in_chans not in (None, 3):
                raise BackboneError(f"takes clips of 3 channels, not {in_chans}", where=spec)
            return source(spec.removeprefix(prefix), frames, request)
    loaded = load(
        spec,
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=request.image_size,
        weights=weights,
        pretrained=pretrained,
        drop_path=drop_path,
    )
    return Loaded(FrameModel(loaded.model, frames or _FRAMES).eval(), loaded.spec, loaded.preprocessing)


def _transformers(name: str, frames: int | None, request: Request) -> Loaded:
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForVideoClassification
    except ImportError as error:
        raise MissingExtraError.of("transformers", "transformers") from error

    where = f"transformers/{name}"
    if request.drop_path:
        raise BackboneError("has no stochastic depth that could be set", where=where, remedy="Leave drop_path at 0")
    own = request.pretrained and request.weights is None
    if name in _FAMILIES:
        if own:
            raise BackboneError(
                "names a family, not its weights",
                where=where,
                remedy="Name a repository on the hub or a folder (transformers/USER/REPO), pass a file with "
                "--weights FILE (weights=...), or pretrained=False for random weights",
            )
        config: Any = CONFIG_MAPPING[name]()
    else:
        with hub_access(where):
            config = AutoConfig.from_pretrained(name)
    if config.model_type not in _FAMILIES:
        raise BackboneError(
            f"is a {config.model_type}, no model of clips that is known to work",
            where=where,
            remedy=f"Known: {', '.join(_FAMILIES)}",
        )
    made_for = f"frames={config.num_frames}, image_size={config.image_size}"
    side = request.image_size or config.image_size
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    config.image_size = size[0] if size[0] == size[1] else list(size)
    config.num_frames = frames or config.num_frames
    if config.model_type == "videomae" and request.num_classes is not None:
        config.use_mean_pooling = True
    model: Any
    if own or request.weights is not None:
        model = _read_transformers(name, config, request, where, made_for)
    else:
        model = AutoModelForVideoClassification.from_config(config)
    if request.num_classes is not None:
        config.num_labels = model.num_labels = request.num_classes
        _replace_head(model, request.num_classes)
    mean, std = NORMALIZATIONS["imagenet"] if name in _FAMILIES else processor_normalization(name)
    wrapped = ClipModel(model, config.num_frames, size, channels_first=False).eval()
    _try_shapes(wrapped, where, made_for)
    return Loaded(wrapped, where, Preprocessing(size, mean, std, "bilinear"))


def _read_transformers(name: str, config: Any, request: Request, where: str, made_for: str) -> nn.Module:
    """The model with weights of the hub, a folder or a file, of which nothing but a fresh head may be missing."""
    from transformers import AutoModelForVideoClassification

    state = None
    if request.weights is not None:
        state, where = read_state_dict(request.weights), str(request.weights)
        if "classifier.weight" in state:
            config.num_labels = len(state["classifier.weight"])
    with hub_access(where):
        kind: Any = AutoModelForVideoClassification._model_mapping[type(config)]  # type: ignore[attr-defined]
        model, found = kind.from_pretrained(
            None if state is not None else name,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # else an error that does not say which
            output_loading_info=True,
        )
    for key, here, there in sorted(found["mismatched_keys"]):
        raise BackboneError(
            f"its {key} is {tuple(here)}, not {tuple(there)}, as such clips need",
            where=where,
            remedy=f"Use the clips it was made for: {made_for}",
        )
    fresh = ("fc_norm.", "classifier.") if request.num_classes is not None else ("fc_norm.",)
    lost = sorted(key for key in found["missing_keys"] if not key.startswith(fresh))
    if lost or found["error_msgs"]:
        what = f"lacks {', '.join(lost[:4])}" if lost else found["error_msgs"][0]
        raise BackboneError(
            f"does not fit a {type(model).__name__}: {what}",
            where=where,
            remedy="Pass num_classes= for a fresh head" if lost and lost[0].startswith("classifier.") else None,
        )
    return model


def _torchvision(name: str, frames: int | None, request: Request) -> Loaded:
    from torchvision.models import get_model_weights, video
    from torchvision.ops import StochasticDepth

    where = f"torchvision/{name}"
    model = from_torchvision_zoo(
        name, video, "model of clips", pretrained=request.pretrained and request.weights is None
    )
    if request.weights is not None:
        _read_torchvision(model, request.weights, name)
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if request.drop_path and not depths:
        raise BackboneError("has no stochastic depth that could be set", where=where, remedy="Leave drop_path at 0")
    highest = max((module.p for module in depths), default=1.0)
    for module in depths:  # torchvision lets it rise from block to block to a rate of its own
        module.p *= request.drop_path / highest
    if request.num_classes is not None:
        _replace_head(model, request.num_classes)
    facts = get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    side = facts.crop_size[0]
    size, length = request.image_size or (side, side), frames or _TORCHVISION_FRAMES
    made_for = f"frames={_TORCHVISION_FRAMES}, image_size={side}"
    if isinstance(model, video.MViT):
        # Clips of another shape with as many tokens would pass, and get the positions of others.
        own = (model.pos_encoding.temporal_size, *model.pos_encoding.spatial_size)
        if tuple(n * s for n, s in zip(own, model.conv_proj.stride, strict=True)) != (length, *size):
            raise _unfit(length, size, where, made_for)
    wrapped = ClipModel(model, length, size, channels_first=True).eval()
    _try_shapes(wrapped, where, made_for)
    return Loaded(wrapped, where, Preprocessing(size, tuple(facts.mean), tuple(facts.std), facts.interpolation.value))


def _read_torchvision(model: nn.Module, path: Path, name: str) -> None:
    """A file of the model's state dict, with whatever number of classes."""
    state = read_state_dict(path)
    rows = state.get(f"{_last_layer(model)}.weight")
    if rows is not None:
        _replace_head(model, len(rows))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BackboneError(
            f"does not fit {name}: {describe_mismatch(error)}",
            where=str(path),
            remedy="Name the architecture the weights belong to",
        ) from error


def _last_layer(model: nn.Module) -> str:
    """Path of the layer that gives the scores: the last one of the head."""
    layers = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv3d))]
    return next(path for path in reversed(layers) if path.partition(".")[0] in _HEADS)


def _replace_head(model: nn.Module, classes: int) -> None:
    """A fresh last layer for so many classes, or none for 0."""
    path = _last_layer(model)
    old = model.get_submodule(path)
    if classes == 0:
        fresh: nn.Module = nn.Identity()
    elif isinstance(old, nn.Conv3d):
        fresh = nn.Conv3d(old.in_channels, classes, old.kernel_size, old.stride)  # type: ignore[arg-type]
    else:
        fresh = nn.Linear(old.in_features, classes)  # type: ignore[arg-type]
    model.set_submodule(path, fresh)


def _require_clips(clips: Tensor, frames: int, size: tuple[int, int] | None = None) -> None:
    fits = clips.dim() == 5 and clips.shape[1] == frames and size in (None, tuple(clips.shape[3:]))
    if not fits:
        wanted = f"(B, {frames}, C, {size[0]}, {size[1]})" if size else f"(B, {frames}, C, H, W)"
        raise DataError(
            f"this model takes clips of shape {wanted}, not {tuple(clips.shape)}",
            where="clips",
            remedy="Load the model for such clips with frames= and image_size=",
        )


def _try_shapes(model: ClipModel, where: str, made_for: str) -> None:
    """Refuse clips that the model cannot take, by a forward that computes shapes alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    clip = torch.empty(1, model.frames, 3, *model.size, device="meta")
    try:
        with torch.no_grad():
            functional_call(model, shapes, (clip,))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise _unfit(model.frames, model.size, where, made_for) from error


def _unfit(frames: int, size: tuple[int, int], where: str, made_for: str) -> BackboneError:
    return BackboneError(
        f"cannot take clips of {frames} frames of {size[0]}x{size[1]}",
        where=where,
        remedy=f"It is made for {made_for}",
    )
