"""Where commands print: tables on stdout, errors on stderr."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

__all__ = ["console", "error", "is_main"]

#: Into a file or a pipe, tables get the room they need instead of the 80 columns of a terminal nobody sees.
console = Console(width=None if sys.stdout.isatty() else 160)


def is_main() -> bool:
    """Whether this process is the one that reports, under ``accelerate launch``; the only one without it."""
    from accelerate import PartialState

    return PartialState().is_main_process


def error(message: str) -> None:
    """One line on stderr, as plain text: messages hold paths and class names that are no markup."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), " ".join(message.split())))
