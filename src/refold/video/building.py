"""Models of clips with an adapter: from the settings of a run, or from an adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

import refold
from refold.backbones import with_normalization
from refold.errors import DataError, StoreError
from refold.header import Header
from refold.methods import Method
from refold.methods.st_adapter import STAdapter
from refold.preprocessing import Preprocessing
from refold.training.build import load_start
from refold.training.config import TrainConfig
from refold.video.models import load_video
from refold.video.sampling import Sampling, Views

__all__ = ["build_attached", "build_plain", "rebuild", "views_of"]


def build_plain(config: TrainConfig, outputs: int) -> tuple[nn.Module, str, Preprocessing]:
    """The config's model with a fresh head of ``outputs`` outputs, its spec, and how a frame becomes its input.

    Random weights are a function of the seed; the global random state is left alone.

    Raises:
        BackboneError: it cannot be built for such clips.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        loaded = load_video(
            config.model,
            frames=config.frames,
            image_size=config.image_size,
            num_classes=outputs,
            pretrained=config.pretrained,
            weights=config.weights,
            drop_path=config.drop_path,
        )
    normalized = with_normalization(loaded.preprocessing, config.normalize)
    return loaded.model, loaded.spec, replace(normalized, crop="center", crop_fraction=1.0)


def build_attached(config: TrainConfig, classes: list[str]) -> tuple[nn.Module, Preprocessing, Views]:
    """The model with the config's method attached and described, how a frame becomes its input, how videos are seen.

    Raises:
        BackboneError, SiteError: it cannot be built or adapted.
        DataError: the method is for clips of another length, or as :func:`refold.training.build.build_attached`.
    """
    model, spec, preprocessing = build_plain(config, len(classes))
    frames = model.frames
    assert isinstance(frames, int)
    views = Views(Sampling(config.sampling, frames, config.stride), config.clips, config.crops)
    _require_frames(config.method, frames)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        example = torch.randn(1, frames, preprocessing.channels, *preprocessing.size)
        if config.start is None:
            refold.attach(model, config.method, example=example)
        else:
            load_start(model, config, example, classes)
    refold.describe(
        model, backbone=spec, classes=classes, preprocessing=preprocessing, task="video", views=asdict(views)
    )
    return model, preprocessing, views


def views_of(info: Mapping[str, Any]) -> Views:
    """How videos are seen, as :func:`refold.describe` was told.

    Raises:
        DataError: it does not say, or something impossible.
    """
    try:
        views = info["views"]
        return Views(Sampling(**views["sampling"]), views["clips"], views["crops"])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"does not say how videos are seen ({error})",
            where="views",
            remedy="Tell it with refold.describe(model, views=dataclasses.asdict(refold.video.Views(...)))",
        ) from error


def rebuild(header: Header, weights: str | PathLike[str] | None = None) -> nn.Module:
    """The model that an adapter file is for, as it was before the adapter and with a fresh head.

    Raises:
        StoreError: the file does not say what it is.
        BackboneError: it cannot be built.
    """
    try:
        frames = views_of(header.extra).sampling.frames
    except DataError as error:
        raise StoreError(error.reason, where=header.name, remedy="Build the model and load into it") from error
    outputs = header.extra.get("outputs", len(header.classes) if header.classes else 1)
    size = header.preprocessing.size if header.preprocessing else None
    return load_video(header.backbone, frames=frames, image_size=size, num_classes=outputs, weights=weights).model


def _require_frames(method: Method, frames: int) -> None:
    """An adapter that mixes the frames of clips must be told their true number: it would mix clips."""
    for part in method.parts():
        if isinstance(part, STAdapter) and part.frames != frames:
            raise DataError(
                f"is for clips of {part.frames} frames, and the clips have {frames}",
                where="method",
                remedy=f"Use STAdapter(frames={frames}), or frames={part.frames} (--frames {part.frames})",
            )
