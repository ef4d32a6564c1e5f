"""Dense models by name: an encoder, the decoder or detector around it, and an adapter on the encoder's backbone."""

from __future__ import annotations

from os import PathLike

import torch
from torch import nn

from refold.attachment import attach
from refold.dense.encoder import LoadedEncoder, load_encoder
from refold.detection import KINDS, MASK_KINDS, build_detector
from refold.errors import DataError, StoreError
from refold.header import Header
from refold.inspection import describe
from refold.methods import Method
from refold.preprocessing import Preprocessing
from refold.segmentation import DECODERS, Segmenter

__all__ = ["BACKBONE", "TASKS", "attach_to", "build", "default_decoder", "rebuild"]

#: Task -> the decoders, or kinds of detector, that it can have; the first is the default.
TASKS: dict[str, tuple[str, ...]] = {
    "segment": ("upernet", *(name for name in DECODERS if name != "upernet")),
    "detect": tuple(kind for kind in KINDS if kind not in MASK_KINDS),
    "instance": MASK_KINDS,
}
#: Where the backbone is: the part that adapters are attached to.
BACKBONE = {"segment": "encoder.body", "detect": "backbone.encoder.body", "instance": "backbone.encoder.body"}
#: COCO's longest side for its shortest, in pixels.
_LONGEST = 1333 / 800


def default_decoder(task: str, decoder: str | None) -> str:
    """The decoder, checked to be one of the task's; the task's default for None.

    Raises:
        DataError: an unknown task, or a decoder that is not for it.
    """
    if task not in TASKS:
        raise DataError(f"unknown task {task!r}", where="task", remedy=f"Known: {', '.join(TASKS)}")
    chosen = TASKS[task][0] if decoder is None else decoder
    if chosen not in TASKS[task]:
        raise DataError(f"{chosen!r} is not for {task}", where="decoder", remedy=f"Known: {', '.join(TASKS[task])}")
    return chosen


def build(
    task: str, decoder: str, loaded: LoadedEncoder, preprocessing: Preprocessing, classes: list[str]
) -> nn.Module:
    """The model of a task, its decoder or heads fresh.

    Args:
        task, decoder: see :data:`TASKS`.
        loaded: the encoder.
        preprocessing: of its images; the crop of segmentation, the short side of detection.
        classes: names; of detection without background.

    Raises:
        BackboneError, DataError: as those two.
    """
    if task == "segment":
        return Segmenter(loaded.encoder, decoder, len(classes))
    side = min(preprocessing.size)
    longest = max(round(_LONGEST * side), *preprocessing.size)
    return build_detector(
        decoder, loaded.encoder, len(classes), preprocessing=preprocessing, min_size=side, max_size=longest
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
    return build(header.task, decoder, loaded, prep, list(header.classes))
