"""Methods, one file per paper. A new one is one file and one line in ``shelf.py``."""

from __future__ import annotations

from typing import Any

from refold.errors import SiteError
from refold.methods import shelf
from refold.methods.base import Method, Plan
from refold.methods.compose import Compose

__all__ = ["METHODS", "Compose", "Method", "Plan", "method_from_json"]

#: Class name -> method, in the order of ``shelf.py``.
METHODS: dict[str, type[Method]] = {
    name: value for name, value in vars(shelf).items() if isinstance(value, type) and issubclass(value, Method)
}


def method_from_json(data: dict[str, Any]) -> Method:
    """The method that :meth:`Method.to_json` described; raises :class:`SiteError` if it is unknown or invalid."""
    name = data.get("name")
    if name == Compose.__name__:
        return Compose.from_json(data)
    if name not in METHODS:
        raise SiteError(f"unknown method {name!r}", remedy=f"Known: {', '.join(METHODS)}; a newer refold may know it")
    return METHODS[name].from_json(data)
