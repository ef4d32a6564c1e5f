"""Local weight files: reading them safely, and saying why one does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from refold.errors import BackboneError

__all__ = [
    "SUFFIXES",
    "NpzLayout",
    "class_count",
    "describe_mismatch",
    "read_npz_layout",
    "read_state_dict",
    "require_file",
    "some",
]

#: File endings read as a state dict of PyTorch tensors; ``.npz`` is read by the architecture's own loader.
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
#: Where architectures and the papers' original checkpoints keep the classifier.
_HEADS = ("head", "head.fc", "fc", "classifier")
_SHOWN = 4  # keys listed in an error


def require_file(path: Path) -> None:
    """Raise :class:`BackboneError` unless ``path`` is a file with a known ending."""
    if not path.is_file():
        raise BackboneError("no such weight file", where=str(path), remedy="Check the path given as weights")
    if path.suffix not in (*SUFFIXES, ".npz"):
        known = ", ".join((*SUFFIXES, ".npz"))
        raise BackboneError(f"unknown kind of weight file {path.suffix!r}", where=str(path), remedy=f"Known: {known}")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read ``.safetensors``, or a pickle with ``weights_only=True``; nothing in the file is executed.

    The usual wrappers are taken off: ``state_dict_ema``, ``model_ema``, ``state_dict`` and ``model`` (averaged
    weights are preferred), and the key prefixes ``module.`` and ``_orig_mod.``.

    Raises:
        BackboneError: the file cannot be read or holds no tensors.
    """
    from timm.models import load_state_dict

    require_file(path)
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a broken file fails inside zipfile, pickle, struct or safetensors
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"cannot be read as weights ({first})",
            where=str(path),
            remedy="The file must be complete and hold tensors only; save it again as safetensors, or as "
            "torch.save(model.state_dict(), path)",
        ) from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BackboneError(
            f"holds no tensors at its top level (keys: {some(state)})",
            where=str(path),
            remedy="Save the model's state_dict() alone",
        )
    return tensors


def class_count(shapes: Mapping[str, tuple[int, ...]], classifiers: Iterable[str]) -> int:
    """Number of classes of the head in a checkpoint, 0 if it has none.

    Args:
        shapes: parameter name -> shape.
        classifiers: the architecture's own names for its head, looked up first.
    """
    for name in (*classifiers, *_HEADS):
        shape = shapes.get(f"{name}.weight")
        if shape is not None and len(shape) in (2, 4):  # 4: a 1x1 convolution
            return shape[0]
    return 0


@dataclass(frozen=True)
class NpzLayout:
    """What a Google ``.npz`` checkpoint says about its architecture: classes of the head (0: none), and blocks."""

    classes: int
    blocks: int


def read_npz_layout(path: Path) -> NpzLayout:
    """Look into an ``.npz`` checkpoint, whose arrays are named ``[prefix/]head/bias`` and so on.

    A head behind a ``pre_logits`` layer counts as none: today's architectures lack that layer, and without it
    such a head is meaningless.

    Raises:
        BackboneError: the file is no complete ``.npz`` archive.
    """
    import numpy as np

    require_file(path)
    try:
        # Opened here, because numpy leaves the file open when it turns out to be no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = {name.removeprefix("opt/target/").removeprefix("params/"): name for name in archive.files}
            usable = "head/bias" in names and "pre_logits/kernel" not in names
            classes = archive[names["head/bias"]].shape[-1] if usable else 0
    except Exception as error:  # zipfile, zlib, struct and numpy each have their own
        raise BackboneError(
            f"cannot be read as an .npz checkpoint ({type(error).__name__}: {error})",
            where=str(path),
            remedy="The file is damaged or of another kind; download it again",
        ) from error
    indices = {int(match[1]) for name in names if (match := re.search(r"encoderblock_(\d+)/", name))}
    return NpzLayout(classes, len(indices))


def describe_mismatch(error: Exception) -> str:
    """The first few missing, unexpected and misshapen keys of a failed strict ``load_state_dict``."""
    parts = []
    misshapen = []
    for line in str(error).split("\n\t"):
        names = re.findall(r'"([^"]+)"', line)
        if line.startswith("Missing key"):
            parts.append(f"missing {some(names)}")
        elif line.startswith("Unexpected key"):
            parts.append(f"unexpected {some(names)}")
        elif match := re.match(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", line):
            misshapen.append(f"{match[1]} is {match[2]}, not {match[3]}")
    if misshapen:
        parts.append(f"of another shape: {some(misshapen)}")
    return "; ".join(parts) if parts else f"{type(error).__name__}: {error}"


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
