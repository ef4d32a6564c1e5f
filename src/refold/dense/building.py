"""Dense models by name: an encoder, the decoder or detector around it, and an adapter on the encoder's backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from refold.attachment import attach
from refold.calls import read_call
from refold.dense.encoder import LoadedEncoder, load_encoder
from refold.detection import KINDS, MASK_KINDS, build_detector
from refold.errors import DataError, StoreError
from refold.header import Header
from refold.inspection import describe
from refold.methods import Method
from refold.preprocessing import Preprocessing
from refold.segmentation import DECODERS, PixelText, Segmenter
from refold.segmentation.pixel_text import text_of, unread_text

__all__ = ["BACKBONE", "TASKS", "attach_to", "build", "default_decoder", "rebuild"]

#: Task -> the decoders, or kinds of detector, that it can have; the first is the default.
TASKS: dict[str, tuple[str, ...]] = {
    "segment": ("upernet", *(name for name in DECODERS if name != "upernet"), "pixel_text"),
    "detect": tuple(kind for kind in KINDS if kind not in MASK_KINDS),
    "instance": MASK_KINDS,
}
_DETECTOR: dict[str, type] = {
    "channels": int, "hidden": int, "anchor_scale": float, "rois": int, "score_threshold": float, "detections": int,
}  # fmt: skip
#: Settings that the name of a task's decoder may bring, and their kind; of one decoder, where it has others.
_SETTINGS: dict[str, dict[str, type]] = {
    "segment": {"width": int}, "detect": _DETECTOR, "instance": _DETECTOR,
    "pixel_text": {"text": str, "decoder": str, "width": int, "context": int},
}  # fmt: skip
_LARGEST = 65536  # of a setting: files are not trusted
#: Where the backbone is: the part that adapters are attached to.
BACKBONE = {"segment": "encoder.body", "detect": "backbone.encoder.body", "instance": "backbone.encoder.body"}
#: COCO's longest side for its shortest, in pixels.
_LONGEST = 1333 / 800


def default_decoder(task: str, decoder: str | None) -> str:
    """The decoder as a call in one spelling, checked to be one of the task's; the task's default for None.

    Args:
        decoder: a name, or one with settings: ``"mask_rcnn(channels=64, rois=64)"``. Of segmentation they are those of
            :class:`refold.segmentation.Segmenter`, else those of :func:`refold.detection.build_detector`.
            ``pixel_text`` needs ``text``, the image-text model whose text tower reads the class names, and takes the
            settings of :class:`refold.segmentation.PixelText`; its decoder is ``"fpn"`` unless named.

    Raises:
        DataError: an unknown task, a decoder that is not for it, or settings that it has not.
    """
    name, settings = _read(task, decoder)
    told = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"{name}({told})" if told else name


def _read(task: str, decoder: str | None) -> tuple[str, Mapping[str, Any]]:
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}", where="task", remedy=f"Known: {', '.join(TASKS)}")
    try:
        name, settings = (TASKS[task][0], {}) if decoder is None else read_call(decoder)
    except ValueError as error:
        remedy = f"Write for example {TASKS[task][0]!r}, or settings behind it as in 'mask_rcnn(rois=64)'"
        raise DataError(str(error), where="decoder", remedy=remedy) from error
    if name not in TASKS[task]:
        raise DataError(f"{name!r} is not for {task}", where="decoder", remedy=f"Known: {', '.join(TASKS[task])}")
    known = _SETTINGS.get(name, _SETTINGS[task])
    for key, value in settings.items():
        if key not in known:
            raise DataError(f"{name} has no setting {key!r}", where="decoder", remedy=f"Known: {', '.join(known)}")
        _require(known[key], value, where=f"{name}'s {key}")
    if name == "pixel_text" and "text" not in settings:
        remedy = "Write for example pixel_text(text='open_clip/ViT-B-32/laion2b_s34b_b79k')"
        raise DataError("needs text, the model whose text tower reads the class names", where="decoder", remedy=remedy)
    return name, settings


def _require(kind: type, value: object, where: str) -> None:
    if kind is str:
        if not isinstance(value, str) or not value:
            raise DataError(f"must be a text, not {value!r}", where=where)
        return
    kinds = (int,) if kind is int else (int, float)
    if type(value) not in kinds or not 0 <= value <= _LARGEST:  # type: ignore[operator]
        words = "whole number" if kind is int else "number"
        raise DataError(f"must be a {words} from 0 to {_LARGEST}, not {value!r}", where=where)


def build(
    task: str,
    decoder: str,
    loaded: LoadedEncoder,
    preprocessing: Preprocessing,
    classes: list[str],
    *,
    words: Callable[[str, Sequence[str]], Tensor] = text_of,
) -> nn.Module:
    """The model of a task, its decoder or heads fresh.

    Args:
        task, decoder: see :data:`TASKS` and :func:`default_decoder`.
        loaded: the encoder.
        preprocessing: of its images; the crop of segmentation, the short side of detection.
        classes: names; of detection without background.
        words: what makes text embeddings of class names, where the decoder reads them.

    Raises:
        BackboneError, DataError: as those two.
    """
    name, settings = _read(task, decoder)
    if name == "pixel_text":
        options = {"decoder": "fpn", **settings}
        text = words(options.pop("text"), classes)
        return PixelText(loaded.encoder, text=text, **options)
    if task == "segment":
        return Segmenter(loaded.encoder, name, len(classes), **settings)
    side = min(preprocessing.size)
    longest = max(round(_LONGEST * side), *preprocessing.size)
    return build_detector(
        name, loaded.encoder, len(classes), preprocessing=preprocessing, min_size=side, max_size=longest, **settings
    )


def attach_to(
    model: nn.Module,
    method: Method,
    *,
    task: str,
    decoder: str,
    backbone: str,
    preprocessing: Preprocessing,
    classes: list[str],
) -> None:
    """Put a method's adapters on the backbone of a model of :func:`build`, and note what its file should say.

    Raises:
        SiteError: as :func:`refold.attach`.
    """
    body = model.get_submodule(BACKBONE[task])
    example = torch.randn(1, preprocessing.channels, *preprocessing.size)
    attach(body, method, trainable=(), example=example)
    describe(body, backbone=backbone, classes=classes, preprocessing=preprocessing, task=task, decoder=decoder)


def rebuild(header: Header, weights: str | PathLike[str] | None = None) -> nn.Module:
    """The dense model that an adapter file is for, as it was before the adapter and with fresh heads.

    Raises:
        StoreError: the file does not say what it is.
        BackboneError, DataError: it cannot be built.
    """
    if header.task not in TASKS or not header.classes or header.preprocessing is None:
        reason = "does not say how its dense model is made"
        raise StoreError(reason, where=header.name, remedy="Build the model and load into it")
    decoder = default_decoder(header.task, header.extra.get("decoder"))
    prep = header.preprocessing
    loaded = load_encoder(header.backbone, image_size=prep.size, in_chans=prep.channels, weights=weights)
    return build(header.task, decoder, loaded, prep, list(header.classes), words=unread_text)
