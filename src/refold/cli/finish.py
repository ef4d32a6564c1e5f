"""What follows training in ``train``, ``search`` and ``demo``: certificate, cost, and the report that shows them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import nn

import refold
from refold.attachment import attached_part
from refold.certificate import certify
from refold.cli.console import console, error
from refold.inspection import description

if TYPE_CHECKING:
    from refold.training import TrainResult

_MOST_CLASSES = 40  # of which the terminal shows a row each

__all__ = ["measure_cost", "show_result", "stopped", "write_certificate"]


def show_result(result: TrainResult, method: refold.Method, folder: Path) -> None:
    """Certify and measure what was trained, print its results, and write the report of its run folder."""
    from refold.report import tables, write_report
    from refold.report.grids import per_class_grid
    from refold.training.config import DENSE_TASKS

    for entry in result.summary["skipped"]:
        error(f"skipped {entry['path']}: {entry['reason']}")
    backbone = result.model.get_submodule(attached_part(result.model))
    if method.mergeable:
        write_certificate(backbone, folder)
    measure_cost(backbone, result.preprocessing, folder, batches=(1,), mergeable=method.mergeable)
    dense = result.summary["task"] in DENSE_TASKS
    console.print(tables.results_table({method.describe(): result.summary}))
    if dense and 1 < len(result.summary.get("per_class", ())) <= _MOST_CLASSES:
        console.print(tables.rich_table(per_class_grid(result.summary["per_class"])))
    written = {"Report": write_report(folder), "Adapter": folder / "adapter.safetensors"}
    written |= {"Overlays": folder / "overlays.png", "Predictions": folder / "predictions.json"} if dense else {}
    console.print("\n".join(f"{name}: {path}" for name, path in written.items() if path.is_file()), highlight=False)


def stopped(interrupt: KeyboardInterrupt) -> typer.Exit:
    """What ends the command after Ctrl-C, its notes told."""
    for note in getattr(interrupt, "__notes__", ["Stopped."]):
        error(note)
    return typer.Exit(130)


def write_certificate(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Certify copies of ``model``, print the result and keep it in the run folder."""
    from refold.report import tables

    certificate = certify(model)
    (folder / "certificate.json").write_text(json.dumps(certificate, indent=2))
    console.print(tables.certificate_table(certificate))
    return certificate


def measure_cost(
    model: nn.Module,
    preprocessing: refold.Preprocessing,
    folder: Path,
    batches: tuple[int, ...],
    *,
    mergeable: bool = True,
) -> None:
    """Latency of the untouched backbone, the unmerged and, where it merges, the merged model, side by side, here."""
    from refold.backbones import fold_text
    from refold.bench import measure
    from refold.report import tables

    models = {"backbone": fold_text(refold.detach(copy.deepcopy(model))).eval(), "unmerged": model.eval()}
    if mergeable:
        merged = copy.deepcopy(model)
        refold.merge(merged, check=False)
        models["merged"] = fold_text(merged).eval()
    device = next(model.parameters()).device
    seen = description(model).get("views")  # of videos
    clip = [seen["sampling"]["frames"]] if seen else []
    rows = []
    for batch in batches:
        images = torch.randn(batch, *clip, preprocessing.channels, *preprocessing.size, device=device)
        with torch.inference_mode():
            timings = measure.latency({name: _call(m, images) for name, m in models.items()}, rounds=15)
        rows += measure.cost_rows(timings, batch=batch, reference="backbone")
    cost = {"rows": rows, "environment": measure.environment()}
    (folder / "cost.json").write_text(json.dumps(cost, indent=2))
    console.print(tables.cost_table(cost))


def _call(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    return lambda: model(images)
