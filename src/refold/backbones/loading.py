"""``load(spec)``: one name for a backbone, wherever its weights come from."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from refold.backbones.open_clip_source import load_open_clip
from refold.backbones.packaged import load_packaged
from refold.backbones.prompts import Prompts
from refold.backbones.request import Loaded, Request
from refold.backbones.timm_source import load_hub, load_timm
from refold.errors import BackboneError

__all__ = ["load"]

#: Prefix of a spec -> loader of what follows it.
_SOURCES: dict[str, Callable[[str, Request], Loaded]] = {
    "timm/": load_timm,
    "hf-hub:": load_hub,
    "open_clip/": load_open_clip,
    "packaged/": load_packaged,
}
_FORMS = "timm/NAME, hf-hub:USER/REPO, open_clip/NAME/PRETRAINED or packaged/NAME"


def load(
    spec: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    weights: str | PathLike[str] | None = None,
    pretrained: bool = True,
    drop_path: float = 0.0,
    head: str | Prompts = "linear",
) -> Loaded:
    """Build a backbone and load its weights; never random weights unless asked.

    Args:
        spec: ``timm/NAME`` (with or without a pretrained tag; a bare NAME is the same), ``hf-hub:USER/REPO``
            (a timm model on the Hugging Face hub), ``open_clip/NAME/PRETRAINED`` (an image tower), or
            ``packaged/NAME`` (weights inside a Python package, no hub needed).
        num_classes: a fresh head for so many classes, 0 for none; None keeps the head of the weights, if any.
        in_chans: input channels; the first layer's weights are summed (1) or repeated. Default: the model's.
        image_size: pixels, a side or (height, width). Architectures built for one size are built for this one,
            with resized position embeddings; convolutional ones take any. Default: the model's.
        weights: a local file instead of the download: ``.safetensors``, a PyTorch file that opens with
            ``weights_only=True``, or a Google ``.npz``. It must match the architecture in every key and shape,
            after timm's conversion; the head may have any number of classes.
        pretrained: False for random weights.
        drop_path: stochastic depth rate while training; no effect on architectures without it (VGG, DLA, open_clip).
        head: of open_clip's towers alone: ``"cosine"`` is a fresh :class:`CosineHead`; :class:`Prompts` give the
            zero-shot head of their class names, or keep the text tower (:class:`TextClassifier`).

    Returns:
        The model in evaluation mode, on the CPU in float32; its canonical spec; its preprocessing.

    Raises:
        BackboneError: unknown spec, failed download (within seconds where the hub cannot be reached), weights or
            options that do not fit.
        MissingExtraError: a package that the spec needs is not installed.
    """
    request = Request(
        num_classes=num_classes,
        in_chans=in_chans,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        weights=None if weights is None else Path(weights).expanduser(),
        pretrained=pretrained,
        drop_path=drop_path,
        head=head,
    )
    if head != "linear" and not spec.startswith("open_clip/"):
        raise BackboneError(
            "has no text tower that class names could go through",
            where=spec,
            remedy="Use an open_clip/NAME/PRETRAINED model, or a linear head",
        )
    for prefix, source in _SOURCES.items():
        if spec.startswith(prefix) and len(spec) > len(prefix):
            return source(spec.removeprefix(prefix), request)
    if spec and not any(mark in spec for mark in "/:\\"):
        return load_timm(spec, request)
    remedy = f"A model is named as {_FORMS}; a local checkpoint is passed with --weights FILE"
    raise BackboneError("not the name of a backbone", where=repr(spec), remedy=remedy)
