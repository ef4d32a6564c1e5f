"""``refold models`` and ``refold methods``: what there is."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column, Table

from refold.cli.console import console
from refold.methods import METHODS

__all__ = ["methods", "models"]


def models(
    pattern: Annotated[str | None, typer.Argument(help="Only names that match, for example '*swin*'.")] = None,
) -> None:
    """List backbones by the spec that names them.

    Example: refold models '*convnext*'
    """
    from refold import backbones

    table = Table(Column("spec", overflow="fold"), "source", "parameters", "note", title="Backbones")
    for row in backbones.list_models(pattern):
        table.add_row(row.spec, row.source, "" if row.parameters is None else f"{row.parameters:,}", row.note)
    console.print(table)


def methods() -> None:
    """List the methods: what they do, whether they fold, and where they come from.

    Example: refold methods
    """
    table = Table("method", "what it does", "folds away", "paper", "hyper-parameters", title="Methods")
    for name, method in METHODS.items():
        values = {key: value for key, value in method().to_json().items() if key != "name"}
        text = ", ".join(f"{key}={value}" for key, value in values.items())
        table.add_row(name, method.summary, method.folds, method.paper, text or "-")
    console.print(table)
