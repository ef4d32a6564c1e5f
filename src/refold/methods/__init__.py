"""Methods, one file per paper. A new one is one file and one line in ``METHODS``."""

from __future__ import annotations

from typing import Any

from refold.errors import SiteError
from refold.methods.base import Method, Plan
from refold.methods.dora import DoRA
from refold.methods.inplace import BitFit, FullFineTune, LinearProbe
from refold.methods.lora import LoRA
from refold.methods.oft import OFT
from refold.methods.repadapter import RepAdapter
from refold.methods.ssf import SSF

__all__ = [
    "METHODS",
    "OFT",
    "SSF",
    "BitFit",
    "DoRA",
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
    "DoRA": DoRA,
    "OFT": OFT,
    "SSF": SSF,
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
