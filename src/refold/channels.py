"""Which dimension of features holds their channels: the last, or the one behind the batch.

Mostly their number tells. Where the height or width of a map happens to equal it (ConvNeXt-T has 96 channels at 96 x 96
positions of a 384-pixel image), modules that take such maps are asked.
"""

from __future__ import annotations

import torch
from torch import nn

from refold.errors import SiteError
from refold.fold import KINDS, kind_of
from refold.probe import preserved
from refold.residuals import Branch
from refold.survey import Survey

__all__ = ["channel_dim"]

_POSITIONS = (8, 9)  # of the maps a module is tried with, unless it has as many channels


def channel_dim(survey: Survey, path: str, shape: tuple[int, ...], width: int, branch: Branch | None) -> int:
    """The channels' position, from the end, in what the module at ``path`` returns.

    Args:
        survey, path: of the module.
        shape: of what it returns.
        width: how many channels; 0 where this is not known.
        branch: the residual branch that it is, or ends with; None for neither.

    Raises:
        SiteError: it cannot be told.
    """
    kind = kind_of(survey.modules[path])
    if kind is not None and kind.returns_product:
        dims = {kind.operator(survey.modules[path]).channel_dim}
    else:
        dims = {-1} if len(shape) == 3 else {-1, 1 - len(shape)}
    found = {dim for dim in dims if len(shape) >= -dim and shape[dim] == (width or shape[-1])}
    if len(shape) < 3 or not found:
        raise SiteError(f"features of shape {shape} have no known channels", where=path, remedy="Choose other sites")
    if len(found) > 1:
        found &= _asked(survey, path, shape, branch)
    if len(found) != 1:
        raise SiteError(
            f"nothing tells which dimension of its features, of shape {shape}, holds the channels",
            where=path,
            remedy="Pass example= with images of another size",
        )
    return found.pop()


def _asked(survey: Survey, path: str, shape: tuple[int, ...], branch: Branch | None) -> set[int]:
    """Where the channels of ``shape`` are, by what takes such features."""
    # What reads the very features that the branch's result is added to; then the module itself.
    for reader in (branch.source if branch is not None else "", path):
        if reader and survey.trace.inputs.get(reader) == shape and (taken := _taken(survey, reader, shape)):
            return taken
    # All layers of the module that see features of this shape have to agree.
    inside = (la for p, la in survey.layers.items() if p == path or p.startswith(f"{path}."))
    return {
        layer.operator.channel_dim
        for layer in inside
        if KINDS[layer.kind].returns_product
        and shape in (survey.trace.inputs.get(layer.path), survey.trace.shapes.get(layer.path))
    }


def _taken(survey: Survey, path: str, shape: tuple[int, ...]) -> set[int]:
    """Which layouts a module can take: small maps of both are passed through its forward."""
    module, width = survey.modules[path], shape[-1]
    kind = kind_of(module)
    if kind is not None and (kind.returns_product or kind.is_plain(module)):
        dim = kind.operator(module).channel_dim
        return {dim if dim < 0 else dim - len(shape)}
    positions = [n + width if width in _POSITIONS else n for n in _POSITIONS][: len(shape) - 2]
    positions = [1] * (len(shape) - 2 - len(positions)) + positions
    reference = next(module.parameters(), torch.empty(0))
    with torch.no_grad(), preserved(module):
        return {
            dim
            for dim, sizes in ((-1, (*positions, width)), (1 - len(shape), (width, *positions)))
            if _runs(module, torch.zeros(1, *sizes, device=reference.device, dtype=reference.dtype))
        }


def _runs(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the module's own forward, without hooks, takes ``x`` and keeps its shape."""
    try:
        return type(module).forward(module, x).shape == x.shape
    except Exception:  # whatever a stranger's module says to maps that are not for it
        return False
