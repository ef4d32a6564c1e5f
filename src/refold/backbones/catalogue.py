"""What can be loaded by name: the table behind ``refold models``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec

from refold.backbones.packaged import PACKAGED, is_installed

__all__ = ["ModelRow", "list_models"]


@dataclass(frozen=True)
class ModelRow:
    """One loadable model.

    Attributes:
        spec: what :func:`refold.backbones.load` takes.
        source: ``"packaged"``, ``"timm"`` or ``"open_clip"``.
        parameters: with its own head; None where counting would mean building the model.
        note: input size, licence, or what to install.
    """

    spec: str
    source: str
    parameters: int | None
    note: str


def list_models(pattern: str | None = None) -> list[ModelRow]:
    """Models with pretrained weights, packaged ones first; any timm repository on the hub loads besides.

    Args:
        pattern: a wildcard over specs (``"timm/vit_*"``), or without a wildcard a part of one (``"convnext"``);
            letter case is ignored. None lists all.
    """
    rows = (row for source in (_packaged, _timm, _open_clip) for row in source())
    if pattern is None:
        return list(rows)
    wanted = (pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*").lower()
    return [row for row in rows if fnmatchcase(row.spec.lower(), wanted)]


def _packaged() -> Iterator[ModelRow]:
    for name, entry in PACKAGED.items():
        note = entry.note if is_installed(entry) else f"{entry.note}; to install: {entry.install}"
        yield ModelRow(f"packaged/{name}", "packaged", entry.parameters, note)


def _timm() -> Iterator[ModelRow]:
    import timm
    from timm.models import get_pretrained_cfg

    for name in timm.list_pretrained():
        record = get_pretrained_cfg(name)
        facts = [f"{record.input_size[-1]} px", record.license or ""] if record is not None else []
        yield ModelRow(f"timm/{name}", "timm", None, ", ".join(fact for fact in facts if fact))


def _open_clip() -> Iterator[ModelRow]:
    if find_spec("open_clip") is None:
        return
    import open_clip

    for name, tag in open_clip.list_pretrained():
        yield ModelRow(f"open_clip/{name}/{tag}", "open_clip", None, "image tower of an image-text model")
