"""Plain weights: a merged model's state dict as safetensors, for timm without refold."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.attachment import attached_part, is_attached
from refold.backbones.files import atomic_path
from refold.errors import MergeError, RefoldError
from refold.export.common import Exported, facts
from refold.preprocessing import Preprocessing

__all__ = ["export_weights"]


def export_weights(
    model: nn.Module, path: str | PathLike[str], *, preprocessing: Preprocessing | None = None
) -> Exported:
    """Write the model's state dict as safetensors; its keys, shapes and dtypes are those of the plain architecture.

    The metadata says how to rebuild it: ``architecture`` and, as JSON, ``arguments``, so that ::

        model = timm.create_model(architecture, **arguments)
        model.load_state_dict(safetensors.torch.load_file(path), strict=True)

    needs no refold. It also holds, where known, ``classes``, ``preprocessing``, ``backbone`` and ``task`` as JSON.

    Args:
        model: plain or merged.
        path: of the file; replaced only when it is complete.
        preprocessing: the model's input; None takes what :func:`refold.describe` was told.

    Returns:
        The file; both differences are those between the written and the model's tensors, read back: 0.

    Raises:
        MergeError: adapters are attached and not merged.
        RefoldError: what was read back is not what was written.
    """
    from safetensors.torch import load_file, save_file

    if is_attached(model.get_submodule(attached_part(model))):
        raise MergeError(
            "adapters are attached and not merged: plain weights would leave them out",
            where=type(model).__name__,
            remedy="Call refold.merge before, on the part that has them",
        )
    target = Path(path)
    # Clones, because tensors that share memory (tied weights, views) are refused by the format.
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    known = facts(model, preprocessing)
    metadata = {"format": "pt", **_architecture(model, known), **known}
    with atomic_path(target) as temporary:
        save_file(state, temporary, metadata=metadata)
        written = load_file(temporary)
        if written.keys() != state.keys() or not all(_same(written[key], state[key]) for key in state):
            raise RefoldError("what was read back is not what was written", where=str(path), remedy="Check the disk")
    return Exported(target, target.stat().st_size, 0.0, 0.0)


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left.double(), right.double(), rtol=0, atol=0, equal_nan=True)


def _architecture(model: nn.Module, known: dict[str, str]) -> dict[str, str]:
    """``architecture``, ``num_classes`` and the ``arguments`` that rebuild a timm model; else the class's name."""
    record = getattr(model, "pretrained_cfg", None)
    classes = _class_count(model)
    found = {} if classes is None else {"num_classes": str(classes)}
    if not isinstance(record, dict) or "architecture" not in record:
        return {"architecture": f"{type(model).__module__}.{type(model).__qualname__}", **found}
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if "preprocessing" in known:
        preprocessing = Preprocessing.from_json(json.loads(known["preprocessing"]))
        arguments["in_chans"] = preprocessing.channels
        if record.get("fixed_input_size"):
            arguments["img_size"] = preprocessing.size
    return {"architecture": record["architecture"], "arguments": json.dumps(arguments), **found}


def _class_count(model: nn.Module) -> int | None:
    """Outputs of the head as it is now, 0 for none; None where the model does not say which its head is."""
    classifier = getattr(model, "get_classifier", None)
    head = classifier() if callable(classifier) else getattr(model, "head", None)
    if isinstance(head, (tuple, list)):  # distilled models have two alike
        head = head[0]
    if isinstance(head, nn.Identity):
        return 0
    width = getattr(head, "out_features", getattr(head, "out_channels", None))
    return width if isinstance(width, int) else None
