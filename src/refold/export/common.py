"""What the exporters share: probe inputs, comparison, silence, and the facts written into a file."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.attachment import attached_part
from refold.errors import RefoldError
from refold.inspection import description
from refold.preprocessing import Preprocessing
from refold.state import state_of

__all__ = [
    "CHECKED_BATCHES",
    "Difference",
    "Exported",
    "FromPixels",
    "evaluating",
    "facts",
    "first_line",
    "normalise",
    "probe",
    "quiet",
    "run",
]

#: Batch sizes at which an exported model is compared: one, and one the exporter has not seen.
CHECKED_BATCHES = (1, 3)
_EXAMPLE_BATCH = 2  # the exporter takes a batch of one for a constant


@dataclass(frozen=True)
class Exported:
    """A written file, and how far its outputs are from the model's.

    Attributes:
        path: the file.
        bytes: its size.
        max_abs: largest absolute difference of an output value over the checked inputs; None if not checked.
        max_rel: the same, divided by the largest absolute output value of the model.
    """

    path: Path
    bytes: int
    max_abs: float | None
    max_rel: float | None


@dataclass
class Difference:
    """The largest difference seen so far between outputs and their references.

    ``tolerance`` bounds ``max_rel``; kernels of another runtime add and multiply in another order.
    """

    where: str
    tolerance: float = 1e-3
    max_abs: float = 0.0
    max_rel: float = 0.0

    def add(self, output: Tensor, reference: Tensor) -> None:
        """Compare one output; raises :class:`RefoldError` if it differs in shape, or by more than allowed."""
        if output.shape != reference.shape:
            reason = f"the exported model returns shape {tuple(output.shape)}, the model {tuple(reference.shape)}"
            raise RefoldError(reason, where=self.where, remedy="This model cannot be exported in this format")
        output, reference = output.double().cpu(), reference.double().cpu()
        gap = (output - reference).abs().max().item()
        self.max_abs = max(self.max_abs, gap)
        self.max_rel = max(self.max_rel, gap / max(reference.abs().max().item(), torch.finfo(torch.float32).tiny))
        if not self.max_rel <= self.tolerance:  # also catches NaN
            raise RefoldError(
                f"the exported model's outputs differ from the model's by {self.max_rel:.1e} of the largest",
                where=self.where,
                remedy="Nothing was written; this model cannot be exported in this format",
            )

    def exported(self, path: Path, *, checked: bool) -> Exported:
        """The record of the file these differences belong to."""
        return Exported(path, path.stat().st_size, *((self.max_abs, self.max_rel) if checked else (None, None)))


def first_line(error: Exception) -> str:
    """Kind and first line of an exporter's error, whose text may go on for pages, or of the one that caused it."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def probe(model: nn.Module, preprocessing: Preprocessing, batch: int = _EXAMPLE_BATCH, *, raw: bool = False) -> Tensor:
    """Seeded random images (batch, C, H, W) on the model's device: normalised float32, or uint8 if ``raw``.

    Raises:
        RefoldError: the model is not in float32, in which files are exchanged.
    """
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32:
        remedy = "Call model.float() before"
        raise RefoldError(f"the model is in {parameter.dtype}, not float32", where="export", remedy=remedy)
    generator = torch.Generator().manual_seed(batch)
    images = torch.randint(0, 256, (batch, preprocessing.channels, *preprocessing.size), generator=generator)
    images = images.to(parameter.device, torch.uint8)
    return images if raw else normalise(images, preprocessing)


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 images (B, C, H, W) as the model's float32 input."""
    mean = torch.tensor(preprocessing.mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(1, -1, 1, 1)
    return (images.float() / 255 - mean) / std


class FromPixels(nn.Module):
    """A model with its normalisation in front: uint8 RGB (or grey) images (B, C, H, W) in, the model's output out.

    Images must have the model's size already. Resizing stays outside on purpose: the resize used in training
    (with antialiasing) is not reproduced by the operators of the exchange formats, and another one would cost
    accuracy in silence.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64, device=device).view(1, -1, 1, 1)
        std = torch.tensor(preprocessing.std, dtype=torch.float64, device=device).view(1, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.float() * self.scale + self.shift)


def run(model: nn.Module, images: Tensor) -> Tensor:
    """The model's one output tensor, without gradients; :class:`RefoldError` if it returns something else."""
    with torch.no_grad():
        output = model(images)
    if not isinstance(output, Tensor):
        reason = f"the model returns a {type(output).__name__}, not one tensor"
        remedy = "Export a model whose forward returns one tensor, or the weights (export_weights)"
        raise RefoldError(reason, where="export", remedy=remedy)
    return output


def facts(model: nn.Module, preprocessing: Preprocessing | None) -> dict[str, str]:
    """What a user of the file needs to know, as JSON texts: ``preprocessing``, ``classes``, ``backbone``, ``task``.

    Only what is known: from the argument, and from :func:`refold.describe`.
    """
    backbone = model.get_submodule(attached_part(model))
    known: dict[str, Any] = {} if state_of(backbone) is None else description(backbone)
    if preprocessing is not None:
        known["preprocessing"] = preprocessing
    keys = ("preprocessing", "classes", "backbone", "task")
    values = {key: known[key] for key in keys if known.get(key) is not None}
    return {key: json.dumps(v.to_json() if isinstance(v, Preprocessing) else v) for key, v in values.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own mode is restored after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow what an exporter prints, logs and warns: dozens of lines about its own internals."""
    level = logging.root.manager.disable
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
