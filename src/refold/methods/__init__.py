"""Methods, one file per paper. A new one is one file and one line in ``METHODS``."""

from __future__ import annotations

from typing import Any

from refold.errors import SiteError
from refold.methods.base import Method, Plan
from refold.methods.inplace import BitFit, FullFineTune, LinearProbe
from refold.methods.lora import LoRA
from refold.methods.repadapter import RepAdapter

__all__ = [
    "METHODS",
    "BitFit",
    "FullFineTune",
    "LinearProbe",
    "LoRA",
    "Method",
    "Plan",
    "RepAdapter",
    "method_from_json",
]

METHODS: dict[str, type[Method]] = {
    "RepAdapter": RepAdapter,
    "LoRA": LoRA,
    "BitFit": BitFit,
    "LinearProbe": LinearProbe,
    "FullFineTune": FullFineTune,
}


def method_from_json(data: dict[str, Any]) -> Method:
    """The method that :meth:`Method.to_json` described; raises :class:`SiteError` if it is unknown or invalid."""
    name = data.get("name")
    if name not in METHODS:
        raise SiteError(f"unknown method {name!r}", remedy=f"Known: {', '.join(METHODS)}; a newer refold may know it")
    return METHODS[name].from_json(data)
