"""``refold models`` and ``refold methods``: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from refold.cli.console import console
from refold.cli.options import parse_method
from refold.errors import MissingExtraError, SiteError
from refold.methods import METHODS, Method

if TYPE_CHECKING:
    from refold.bench.shelf import Cost, Shelf

__all__ = ["methods", "models"]

_WIDE = 120  # columns of a terminal that has room for all of a table


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


def methods(
    method: Annotated[
        str | None, typer.Argument(help="Only this one, in full; with other settings as 'LoRA(rank=16)'.")
    ] = None,
) -> None:
    """List the methods, or show one: what it does, what it costs on a ViT-B/16, whether it merges, its paper.

    Example: refold methods RepAdapter
    """
    from refold.bench.shelf import Shelf

    chosen = None if method is None else parse_method(method, "METHOD")
    try:
        shelf = Shelf()
    except MissingExtraError as problem:
        shelf = None
        console.print(f"Parameters and extra compute are left out: {problem}")
    if chosen is None:
        _table(shelf)
    else:
        _page(chosen, shelf)


def _table(shelf: Shelf | None) -> None:
    from refold.report import methods as texts
    from refold.training.progress import show_count

    wide = console.width >= _WIDE
    counted = [Column("parameters", max_width=11), Column("extra compute", max_width=8)] if shelf else []
    names, what = Column("method", no_wrap=True), Column("what it does", overflow="fold")
    further = ["tasks", "paper"] if wide else []
    table = Table(names, what, *counted[:1], Column("merges", min_width=12, max_width=12), *counted[1:], *further)
    table.title = "Methods with their defaults" + (", counted on ViT-B/16 beside the head" if shelf else "")
    with show_count(None, "counting", total=len(METHODS)) as done:
        for number, (name, kind) in enumerate(METHODS.items(), 1):
            one = kind()
            cost = _cost(one, shelf)
            cells = [texts.parameters(cost), texts.extra(one, cost)] if shelf else []
            summary = kind.summary if wide else f"{kind.summary} ({kind.tasks}; {kind.paper})"
            rest = [kind.tasks, kind.paper] if wide else []
            table.add_row(name, summary, *cells[:1], texts.merges(one), *cells[1:], *rest)
            done(number)
    console.print(table)


def _cost(method: Method, shelf: Shelf | None) -> Cost | None:
    try:
        return shelf.cost(method, operations=not method.mergeable) if shelf else None
    except SiteError:  # it has no place in the backbones that everything is counted on
        return None


def _page(method: Method, shelf: Shelf | None) -> None:
    from refold.report import methods as texts

    kind, cost = type(method), _cost(method, shelf)
    page = texts.page(kind)
    console.print(f"{kind.__name__}: {kind.summary}", style="bold", highlight=False)
    for paragraph in filter(None, (*page.about, page.use, *page.header)):
        console.print(f"\n{paragraph}", markup=False, highlight=False)
    if page.parameters:
        table = Table("hyper-parameter", "default", "meaning", title="Hyper-parameters")
        for one in page.parameters:
            table.add_row(one.name, escape(one.default), escape(one.meaning))
        console.print("", table)
    counted = f"parameters {texts.parameters(cost)}, extra compute {texts.extra(method, cost)}, " if shelf else ""
    console.print(f"{method.describe()}: {counted}merges {texts.merges(method)}, tasks {kind.tasks}", highlight=False)
