"""``refold robustness``: how trained adapters stand up to what they were not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from refold.cli.console import console, is_main
from refold.cli.options import Weights, parse_numbers

__all__ = ["robustness"]


def robustness(
    adapters: Annotated[
        list[str], typer.Argument(help="Run folders or adapter files, on one backbone.", metavar="ADAPTER...")
    ],
    data: Annotated[
        str | None, typer.Option(help="Labelled images; those of the first run folder if not given.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    corruptions: Annotated[
        str | None, typer.Option(help="Names with commas between, or none; all if not given.")
    ] = None,
    severities: Annotated[str, typer.Option(help="1 to 5, with commas between.")] = "1,2,3,4,5",
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.")] = 64,
    weights: Weights = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")] = None,
) -> None:
    """Common corruptions, calibration, whose mistakes differ, and the ensemble of adapters on one backbone.

    Example: refold robustness runs/repadapter runs/lora -o robustness.json

    Example: refold robustness runs/a --corruptions gaussian_noise,motion_blur,fog --severities 3
    """
    from refold.protocols import examine
    from refold.report.protocols import pairs_grid, robustness_grid
    from refold.report.tables import rich_table

    names = None if corruptions is None else [name.strip() for name in corruptions.split(",")]
    result = examine(
        adapters,
        data,
        split=split,
        corruptions=[] if names == ["none"] else names,
        severities=parse_numbers(severities, "--severities"),
        batch_size=batch_size,
        weights=weights,
        output=output,
    )
    if not is_main():
        return
    console.print(rich_table(robustness_grid(result)))
    if result.pairs:
        console.print(rich_table(pairs_grid(result)))
    if output is not None:
        console.print(f"Results: {output}", highlight=False)
