"""Where commands print: tables on stdout, errors on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

__all__ = ["console", "error"]

console = Console()


def error(message: str) -> None:
    """One line on stderr, as plain text: messages hold paths and class names that are no markup."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), " ".join(message.split())))
