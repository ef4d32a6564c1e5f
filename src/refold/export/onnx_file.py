"""ONNX: one self-contained file, dynamic in the batch, compared with onnxruntime before it is put in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from refold.backbones.files import atomic_path
from refold.errors import MissingExtraError, RefoldError
from refold.export.common import (
    CHECKED_BATCHES,
    Difference,
    Exported,
    FromPixels,
    evaluating,
    facts,
    first_line,
    normalise,
    probe,
    quiet,
    run,
)
from refold.preprocessing import Preprocessing

__all__ = ["export_onnx", "require_onnx", "run_file", "tracing"]

_REMEDY = "Use export_program or export_weights"
_LIMIT = 2**31 - 2**20  # protobuf's 2 GiB, less room for the graph


def export_onnx(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    preprocessing: Preprocessing,
    with_preprocessing: bool = False,
    check: bool = True,
) -> Exported:
    """Write ``model`` as ONNX with input ``images`` (batch, C, H, W) and output ``output`` (batch, ...).

    The batch is dynamic, H and W are those of ``preprocessing``. Preprocessing, class names, backbone spec and task
    are stored, where known, as JSON in the file's metadata. The model may still be unmerged: its adapters then
    become part of the graph, with their cost.

    Args:
        model: in float32; its modes are left as they are, the file holds its evaluation behaviour.
        path: of the file; replaced only when the export has succeeded.
        preprocessing: the model's input.
        with_preprocessing: take uint8 images, and scale and normalise them inside. Resizing and cropping stay
            outside: images come in ``preprocessing.size``.
        check: compare with onnxruntime at batch 1 and 3.

    Returns:
        The file and the measured differences.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        RefoldError: the model cannot be exported, is too large for one file, or the outputs differ.
    """
    require_onnx(model, path, check=check)
    target = Path(path)
    example = probe(model, preprocessing, raw=with_preprocessing)
    difference = Difference(target.name)
    graph = FromPixels(model, preprocessing) if with_preprocessing else model
    with evaluating(model), atomic_path(target) as temporary:
        with tracing(type(model).__name__):
            program = torch.onnx.export(
                graph.eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["images"],
                output_names=["output"],
                verbose=False,
            )
            if program is None:
                raise ValueError("the exporter returned nothing")
            shape = program.model.graph.inputs[0].shape
            if shape is None or isinstance(shape[0], int):
                raise ValueError("the batch size became a constant of the graph")
            program.model.metadata_props.update(facts(model, preprocessing))
            program.save(temporary, external_data=False)
        if check:
            _compare(model, temporary, preprocessing, with_preprocessing, difference)
    return difference.exported(target, checked=check)


def require_onnx(model: nn.Module, path: str | PathLike[str], *, check: bool, remedy: str = _REMEDY) -> None:
    """What an export needs.

    Raises:
        MissingExtraError: onnx, onnxscript or, to check, onnxruntime is not installed.
        RefoldError: the model is too large for one file.
    """
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        if find_spec(package) is None:
            raise MissingExtraError.of(package, "export")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > _LIMIT:
        raise RefoldError(
            f"{size / 2**30:.1f} GiB of weights do not fit in one ONNX file", where=str(path), remedy=remedy
        )


@contextmanager
def tracing(name: str, remedy: str = f"Export the merged model, or {_REMEDY.lower()}") -> Iterator[None]:
    """Around the exporter: silence, no gradients, and one error for all of its errors, which names the model."""
    try:
        with quiet(), torch.no_grad():
            yield
    except Exception as error:  # any layer of torch.export, torch.onnx or onnxscript
        raise RefoldError(f"cannot be exported to ONNX ({first_line(error)})", where=name, remedy=remedy) from error


def run_file(path: Path, feeds: dict[str, Any], where: str, remedy: str = _REMEDY) -> list[Any]:
    """Outputs of a file in onnxruntime, NumPy arrays in and out.

    Raises:
        RefoldError: it cannot be loaded, or run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, feeds))
    except Exception as error:  # onnxruntime's errors share no base class
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in feeds.items())
        reason = f"onnxruntime cannot run the exported model on {shapes} ({first_line(error)})"
        raise RefoldError(reason, where=where, remedy=remedy) from error


def _compare(model: nn.Module, path: Path, preprocessing: Preprocessing, raw: bool, difference: Difference) -> None:
    """Run the file at each checked batch size; raises :class:`RefoldError` if it does not run, or differs."""
    for batch in CHECKED_BATCHES:
        pixels = probe(model, preprocessing, batch, raw=True)
        images = normalise(pixels, preprocessing)
        (output,) = run_file(path, {"images": (pixels if raw else images).cpu().numpy()}, difference.where)
        difference.add(torch.from_numpy(output), run(model, images))
