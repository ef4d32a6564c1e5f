"""ONNX: one self-contained file, dynamic in the batch, compared with onnxruntime before it is put in place."""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike
from pathlib import Path

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

__all__ = ["export_onnx"]

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
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check else [])):
        if find_spec(package) is None:
            raise MissingExtraError.of(package, "export")
    target = Path(path)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > _LIMIT:
        remedy = "Use export_program or export_weights"
        raise RefoldError(
            f"{size / 2**30:.1f} GiB of weights do not fit in one ONNX file", where=str(path), remedy=remedy
        )

    example = probe(model, preprocessing, raw=with_preprocessing)
    difference = Difference(target.name)
    graph = FromPixels(model, preprocessing) if with_preprocessing else model
    with evaluating(model), atomic_path(target) as temporary:
        try:
            with quiet(), torch.no_grad():
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
        except Exception as error:  # any layer of torch.export, torch.onnx or onnxscript
            raise RefoldError(
                f"cannot be exported to ONNX ({first_line(error)})",
                where=type(model).__name__,
                remedy="Export the merged model, or use export_program or export_weights",
            ) from error
        if check:
            _compare(model, temporary, preprocessing, with_preprocessing, difference)
    return difference.exported(target, checked=check)


def _compare(model: nn.Module, path: Path, preprocessing: Preprocessing, raw: bool, difference: Difference) -> None:
    """Run the file at each checked batch size; raises :class:`RefoldError` if it does not run, or differs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    for batch in CHECKED_BATCHES:
        pixels = probe(model, preprocessing, batch, raw=True)
        images = normalise(pixels, preprocessing)
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            (output,) = session.run(None, {"images": (pixels if raw else images).cpu().numpy()})
        except Exception as error:  # onnxruntime's errors share no base class
            reason = f"onnxruntime cannot run the exported model at batch {batch} ({first_line(error)})"
            raise RefoldError(reason, where=difference.where, remedy="Use export_program or export_weights") from error
        difference.add(torch.from_numpy(output), run(model, images))
