"""From a config, a run folder, an adapter file or a model to something that can be trained, scored or asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import refold
from refold.attachment import attached_part, trainable_parameters
from refold.errors import DataError
from refold.inspection import description
from refold.preprocessing import Preprocessing
from refold.state import state_of
from refold.store import Header, read_header
from refold.training.config import DENSE_TASKS, TrainConfig
from refold.training.tasks import Task, plain_task

if TYPE_CHECKING:
    from refold.backbones import Prompts

__all__ = ["Ready", "build_attached", "build_backbone", "load_start", "resolve"]


@dataclass(frozen=True)
class Ready:
    """A trained model with what it takes to use it.

    Attributes:
        model: in eval mode.
        preprocessing: how images become its input.
        kind: the name of its task: what :attr:`Task.kind` says, one of the dense tasks, or ``"video"``.
        classes: names in the order of its outputs, of detection from label 1 on; None for a regression.
        config: of the run it comes from, None for files and models.
    """

    model: nn.Module
    preprocessing: Preprocessing
    kind: str
    classes: list[str] | None
    config: TrainConfig | None = None

    @property
    def task(self) -> Task:
        """What the outputs of a model of whole images or videos mean.

        Raises:
            DataError: the model is of a dense task.
        """
        return plain_task("classify" if self.kind == "video" else self.kind, self.classes)

    @property
    def dense(self) -> bool:
        """Whether the task is segmentation or detection."""
        return self.kind in DENSE_TASKS

    @property
    def backbone(self) -> nn.Module:
        """The module that adapters are attached to: the model itself, or a part of a dense one."""
        return self.model.get_submodule(attached_part(self.model))


def build_backbone(
    config: TrainConfig, outputs: int, head: str | Prompts = "linear"
) -> tuple[nn.Module, str, Preprocessing]:
    """The config's backbone with a head of ``outputs`` outputs, fresh or as ``head`` says, its spec, and its
    preprocessing.

    Random weights, the head's among them, are a function of the seed; the global random state is left alone.
    """
    from refold import backbones

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        loaded = backbones.load(
            config.model,
            num_classes=outputs,
            in_chans=config.in_chans,
            image_size=config.image_size,
            weights=config.weights,
            pretrained=config.pretrained,
            drop_path=config.drop_path,
            head=head,
        )
    normalized = backbones.with_normalization(loaded.preprocessing, config.normalize)
    return loaded.model, loaded.spec, replace(normalized, crop=config.crop)


def build_attached(config: TrainConfig, kind: str, classes: list[str] | None) -> tuple[nn.Module, Preprocessing]:
    """The backbone with the config's method attached and described; its start is that of a file, or of the seed.

    Raises:
        DataError: the file to start from holds another method, prompts that do not suit the data, or nothing to train.
        StoreError: it cannot be read, or is for another backbone or other classes.
    """
    prompts = _prompts(config, kind, classes)
    model, spec, preprocessing = build_backbone(config, len(classes) if classes else 1, prompts or "linear")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        example = torch.randn(1, preprocessing.channels, *preprocessing.size)
        if config.start is None:
            refold.attach(model, config.method, example=example)
        else:
            load_start(model, config, example, classes)
    refold.describe(model, backbone=spec, classes=classes, preprocessing=preprocessing, task=kind)
    if prompts is not None:
        refold.describe(model, prompts=prompts.to_json())
    _freeze_head(model, config)
    if config.freeze_head and not trainable_parameters(model):
        raise DataError("leaves nothing to train", where="freeze_head", remedy="Choose a method with adapters")
    return model, preprocessing


def _freeze_head(model: nn.Module, config: TrainConfig) -> None:
    if config.freeze_head:
        model.get_submodule("head").requires_grad_(False)


def _prompts(config: TrainConfig, kind: str, classes: list[str] | None) -> Prompts | None:
    """What the config's head says to the text tower; None of a linear one."""
    if config.head == "linear":
        return None
    from refold.backbones import Prompts

    if kind != "classify" or classes is None:
        raise DataError(f"is for classes that exclude each other, not for {kind!r}", where="head", remedy="Use linear")
    names = None
    if config.class_names is not None:
        from refold.data.tables import read_pairs

        names = read_pairs(Path(config.class_names), "CLASS,NAME")
    return Prompts.of(classes, config.templates, names, tower=config.head == "text")


def load_start(model: nn.Module, config: TrainConfig, example: torch.Tensor, classes: list[str] | None) -> None:
    """Attach what the config's file to start from holds.

    Raises:
        DataError, StoreError: as :func:`build_attached`.
    """
    assert config.start is not None
    header = read_header(config.start)
    if header.method != config.method:
        raise DataError(f"holds {header.method.describe()}, not {config.method.describe()}", where=config.start)
    if header.classes is not None and list(header.classes) != classes:
        raise DataError(f"knows the classes {list(header.classes)}, not {classes}", where=config.start)
    refold.load(model, config.start, name="default", example=example)


def resolve(source: nn.Module | str | Path, *, weights: str | Path | None = None, force: bool = False) -> Ready:
    """A trained model from whatever names one.

    Args:
        source: a model with an adapter attached or merged, a run folder, an adapter file, or ``"hf-hub:user/repo"``.
        weights: local checkpoint of the backbone, for a file; a run folder knows its own.
        force: load although the backbone's weights are not those the adapter was trained on.

    Raises:
        DataError: the model or file does not say which preprocessing and task it was trained for.
        StoreError: the file cannot be read or does not fit.
        BackboneError: the backbone cannot be loaded.
    """
    config, where = None, str(source)
    if isinstance(source, nn.Module):
        model, where = source, type(source).__name__
        if state_of(model.get_submodule(attached_part(model))) is None:
            raise DataError(
                "has no adapter, so nothing tells its classes and preprocessing",
                where=where,
                remedy="Pass a model from refold.load, an adapter file or a run folder",
            )
    elif Path(source).is_dir():
        config, file = TrainConfig.load(source), Path(source) / "adapter.safetensors"
        if config.pretrained:
            model = refold.from_pretrained(file, weights=weights or config.weights, force=force)
        else:
            model = refold.load(_random(config, read_header(file)), file, force=force)
        _freeze_head(model, config)
    else:
        model = refold.from_pretrained(source, weights=weights, force=force)
    info = description(model.get_submodule(attached_part(model)))
    for name in ("preprocessing", "task"):
        if name not in info:
            raise DataError(
                f"does not say its {name}",
                where=where,
                remedy=f"Tell it with refold.describe(model, {name}=...) and save it again",
            )
    ready = Ready(model.eval(), info["preprocessing"], info["task"], info.get("classes"), config)
    if not ready.dense:
        ready.task  # noqa: B018 (complains about what is no task)
    return ready


def _random(config: TrainConfig, header: Header) -> nn.Module:
    """The model of a run on random weights, without its adapter."""
    classes = list(header.classes or ())
    if config.task is None:
        from refold.backbones import stored_head

        return build_backbone(config, len(classes) or 1, stored_head(header.extra.get("prompts")))[0]
    if config.task == "video":
        from refold.video.building import build_plain as build_video

        return build_video(config, len(classes))[0]
    from refold.dense.job import build_plain

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_plain(config, classes)[0]
