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
from refold.certificate import certify
from refold.cli.console import console, error

if TYPE_CHECKING:
    from refold.training import TrainResult

__all__ = ["measure_cost", "show_result", "stopped", "write_certificate"]


def show_result(result: TrainResult, method: refold.Method, folder: Path) -> None:
    """Certify and measure what was trained, print its results, and write the report of its run folder."""
    from refold.report import tables, write_report

    for entry in result.summary["skipped"]:
        error(f"skipped {entry['path']}: {entry['reason']}")
    if method.mergeable:
        write_certificate(result.model, folder)
    measure_cost(result.model, result.preprocessing, folder, batches=(1,), mergeable=method.mergeable)
    console.print(tables.results_table({method.describe(): result.summary}))
    console.print(f"Report: {write_report(folder)}\nAdapter: {folder / 'adapter.safetensors'}")


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
    from refold.bench import measure
    from refold.report import tables

    models = {"backbone": refold.detach(copy.deepcopy(model)).eval(), "unmerged": model.eval()}
    if mergeable:
        merged = copy.deepcopy(model)
        refold.merge(merged, check=False)
        models["merged"] = merged.eval()
    device = next(model.parameters()).device
    rows = []
    for batch in batches:
        images = torch.randn(batch, preprocessing.channels, *preprocessing.size, device=device)
        with torch.inference_mode():
            timings = measure.latency({name: _call(m, images) for name, m in models.items()}, rounds=15)
        rows += measure.cost_rows(timings, batch=batch, reference="backbone")
    cost = {"rows": rows, "environment": measure.environment()}
    (folder / "cost.json").write_text(json.dumps(cost, indent=2))
    console.print(tables.cost_table(cost))


def _call(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    return lambda: model(images)
