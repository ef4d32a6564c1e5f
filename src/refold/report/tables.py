"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from refold.report import grids
from refold.report.grids import Grid

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from refold.inspection import Row

__all__ = ["certificate_table", "cost_table", "explain_table", "markdown_table", "results_table", "rich_table"]

STYLES = {"good": "green", "bad": "bold red", "": ""}


def rich_table(grid: Grid) -> Table:
    """A grid as a rich table; cells are shown as they are, never read as rich's own markup."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(grid.title) if grid.title else None,
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    for index, name in enumerate(grid.columns):
        table.add_column(Text(name), justify="left" if index < grid.text_columns else "right", overflow="fold")
    for i, row in enumerate(grid.rows):
        table.add_row(*(Text(cell, style=STYLES[grid.mark(i, j)]) for j, cell in enumerate(row)))
    return table


def markdown_table(grid: Grid) -> str:
    """A grid as a table of Markdown; its title is left out."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rules = ("---" if index < grid.text_columns else "---:" for index in range(len(grid.columns)))
    return "\n".join([line(grid.columns), line(rules), *map(line, grid.rows)]) + "\n"


def results_table(summaries: Mapping[str, Mapping[str, Any]], *, title: str = "Results") -> Table:
    """Runs side by side. See :func:`refold.report.grids.results_grid`."""
    return rich_table(grids.results_grid(summaries, title=title))


def certificate_table(certificate: Mapping[str, Any]) -> Group:
    """The exactness certificate of ``certificate.json``: verdict, differences, checks."""
    from rich.console import Group
    from rich.text import Text

    verdict = (
        Text("Exactness certificate: holds", style="bold green")
        if grids.certificate_holds(certificate)
        else Text("Exactness certificate: FAILS", style="bold red")
    )
    return Group(
        verdict,
        rich_table(grids.certificate_grid(certificate)),
        rich_table(grids.certificate_checks(certificate)),
    )


def cost_table(cost: Mapping[str, Any]) -> Table:
    """Latency of ``cost.json``."""
    return rich_table(grids.cost_grid(cost))


def explain_table(rows: Sequence[Row]) -> Table:
    """The rows of :func:`refold.explain`."""
    return rich_table(grids.explain_grid(rows))
