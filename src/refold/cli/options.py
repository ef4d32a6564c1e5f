"""What several commands share: the options' texts, and how a method is named."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from refold.errors import SiteError
from refold.methods import METHODS, Compose, Method

__all__ = ["Adapter", "Force", "Weights", "parse_method"]

Adapter = Annotated[
    str,
    typer.Argument(help="A run folder, an adapter file, or hf-hub:user/repo.", metavar="ADAPTER", show_default=False),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Local checkpoint of the backbone (.safetensors, .npz, .pth), instead of its published weights."),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Load the adapter although the backbone's weights are not those it was trained on."),
]


def parse_method(text: str) -> Method:
    """``"RepAdapter"``, ``"RepAdapter(rank=8, scale=5)"`` or ``"VPT + LoRA"`` as a method; class names in any case.

    Raises:
        SiteError: an unknown name, a misspelt or invalid hyper-parameter, or text that is no call.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as problem:
        raise _unreadable(text) from problem
    if isinstance(call, ast.BinOp) and isinstance(call.op, ast.Add):
        return Compose([parse_method(ast.unparse(side)) for side in (call.left, call.right)])
    if isinstance(call, ast.Name):
        call = ast.Call(func=call, args=[], keywords=[])
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise _unreadable(text)
    names = {name.lower(): name for name in METHODS}
    if call.func.id.lower() not in names:
        raise SiteError(f"unknown method {call.func.id!r}", where="--method", remedy=f"Known: {', '.join(METHODS)}")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _unreadable(text)
        try:
            values[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as problem:
            raise _unreadable(text) from problem
    return METHODS[names[call.func.id.lower()]].from_json(values)


def _unreadable(text: str) -> SiteError:
    return SiteError(
        f"cannot read {text!r}", where="--method", remedy="Write for example 'RepAdapter(rank=8, scale=5)'"
    )
