"""``"name(key=value)"``: how methods and decoders are named with their settings, on a command line and in files."""

from __future__ import annotations

import ast
from typing import Any

__all__ = ["read_call"]

_LONGEST = 2000  # letters: texts also come from files, which are not trusted


def read_call(text: str) -> tuple[str, dict[str, Any]]:
    """A name and its arguments.

    Args:
        text: ``"name"`` or ``"name(key=value, ...)"`` with numbers, texts, tuples and so on as values.

    Raises:
        ValueError: it is something else.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"cannot read {len(text)} letters")
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read {text!r}") from error
    if isinstance(call, ast.Name):
        return call.id, {}
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError(f"cannot read {text!r}")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(f"cannot read {text!r}")
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise ValueError(f"cannot read {text!r}") from error
    return call.func.id, values
