"""torch.export: a program that runs without the model's Python code, dynamic in the batch."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import nn

from refold.backbones.files import atomic_path
from refold.errors import RefoldError
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

__all__ = ["export_program"]


def export_program(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    preprocessing: Preprocessing,
    with_preprocessing: bool = False,
    check: bool = True,
) -> Exported:
    """Write ``model`` as a ``torch.export`` program (``.pt2``) over images (batch, C, H, W).

    It is loaded with ``torch.export.load(path).module()``, needs torch alone, and runs on the device the model was
    on. Preprocessing, class names, backbone spec and task are stored, where known, as JSON in the extra files
    ``preprocessing``, ``classes``, ``backbone`` and ``task``.

    Args:
        model: in float32, merged or not; its modes are left as they are.
        path: of the file, ending in ``.pt2``; replaced only when the export has succeeded.
        preprocessing: the model's input.
        with_preprocessing: take uint8 images of ``preprocessing.size``, and scale and normalise them inside.
        check: reload the file and compare at batch 1 and 3.

    Returns:
        The file and the measured differences.

    Raises:
        RefoldError: another ending, the model cannot be exported, or the outputs differ.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise RefoldError("a torch.export program must end in .pt2", where=str(path), remedy="Rename the file")
    example = probe(model, preprocessing, raw=with_preprocessing)
    graph = FromPixels(model, preprocessing) if with_preprocessing else model
    difference = Difference(target.name)
    with evaluating(model), atomic_path(target) as temporary:
        try:
            with quiet(), torch.no_grad():
                shapes = ({0: torch.export.Dim("batch")},)
                program = torch.export.export(graph.eval(), (example,), dynamic_shapes=shapes)
                torch.export.save(program, temporary, extra_files=facts(model, preprocessing))
                reloaded = torch.export.load(temporary).module() if check else None
        except Exception as error:  # any layer of torch.export
            raise RefoldError(
                f"cannot be exported by torch.export ({first_line(error)})",
                where=type(model).__name__,
                remedy="Export the merged model, or use export_weights",
            ) from error
        if reloaded is not None:
            for batch in CHECKED_BATCHES:
                pixels = probe(model, preprocessing, batch, raw=True)
                images = normalise(pixels, preprocessing)
                difference.add(run(reloaded, pixels if with_preprocessing else images), run(model, images))
    return difference.exported(target, checked=check)
