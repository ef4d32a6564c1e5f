"""The ``refold`` command. Thin: every command is a few calls of the library and a table."""

from __future__ import annotations

import sys

import typer

from refold.cli import adapt, clip, demo, protocols, robustness, search, shelf, ship, sweep
from refold.cli.console import error
from refold.errors import RefoldError

__all__ = ["app", "main"]

app = typer.Typer(
    name="refold",
    help="Adapt a pretrained vision model to your own images with a tiny adapter, then fold it into the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for command in (
    demo.demo,
    adapt.train,
    adapt.evaluate,
    adapt.predict,
    clip.zeroshot,
    clip.interpolate,
    search.search,
    sweep.sweep,
    protocols.vtab,
    protocols.fewshot,
    protocols.dg,
    protocols.suite,
    robustness.robustness,
    ship.merge,
    ship.export,
    ship.explain,
    shelf.models,
    shelf.methods,
):
    app.command()(command)


def main() -> None:
    """Run the command line: a refold error is one line on stderr and exit code 1, never a traceback."""
    try:
        app()
    except RefoldError as problem:
        error(str(problem))
        sys.exit(1)
    except SystemExit as end:
        if not end.code:
            _leave_the_others()
        raise


def _leave_the_others() -> None:
    """End the connections to the launch's other processes, which torch asks for before the interpreter ends.

    Not after an error: the others may be waiting for this process, and so would it for them.
    """
    torch = sys.modules.get("torch")  # not loaded for that: most commands' help needs it not
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
