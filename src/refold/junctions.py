"""Where a path beside the backbone leaves it: blocks whose features are read out, and what lies between two stages."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from refold.errors import SiteError
from refold.hosting import silenced
from refold.probe import Example, forward, preserved, tensors_of
from refold.sites import Site
from refold.survey import Survey

__all__ = ["between_stages", "continuing", "read_out", "require_unseen"]


def read_out(survey: Survey, blocks: list[str]) -> list[str]:
    """The blocks whose results the model, or its head, makes its output from, in the order of the forward.

    The last block alone in a classifier, the last one of each stage where a backbone returns maps of several sizes.

    Raises:
        SiteError: there is none, or one whose result no module gives as one tensor.
    """
    found = survey.trace.flow.read_out(blocks)
    if not found:
        raise SiteError("the model's output is made of no block's", where=type(survey.model).__name__)
    return [path for path in blocks if path in found]


def continuing(survey: Survey, path: str, following: str) -> tuple[str, ...]:
    """The outermost modules that are given the result of ``path``, change it and lead to the block ``following``."""
    flow = survey.trace.flow
    # A stage around the following block is no step to it, and what gives back what it was given (Identity) is none.
    apart = [r for r in flow.readers(path) if not following.startswith(f"{r}.") and flow.made.get(r) != flow.made[path]]
    found = [reader for reader in apart if flow.leads(reader, following)]
    return tuple(r for r in found if not any(r.startswith(f"{other}.") for other in found))


def between_stages(survey: Survey, pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """For each pair of successive blocks the modules, in a row, that make the second one's input of the first's result.

    A plain ``nn.Sequential`` counts as its children. That they do so, exactly, is proved by one forward.

    Raises:
        SiteError: they do not, because the backbone changes the shape of its features inside a block or by itself.
    """
    found = {at: list(_expanded(survey, _steps(survey, at, following))) for at, following in pairs}
    paths = {path for steps in found.values() for path in steps} | {path for pair in pairs for path in pair}
    calls = _record(survey.model, paths, survey.example)
    with preserved(survey.model), torch.no_grad():
        for at, following in pairs:
            features = calls[at][2]
            for path in found[at]:
                args, kwargs, _ = calls[path]
                features = next(tensors_of(survey.modules[path](features, *args[1:], **kwargs)))
            args, kwargs, result = calls[following]
            exact = torch.equal(features, next(tensors_of((args, kwargs))))
            if not exact or features.numel() != result.numel():  # it changes the shape itself
                raise SiteError(
                    f"no module alone turns the features of {at} into what enters here",
                    where=following,
                    remedy="Choose a method that needs no down-sampling layers, such as RepAdapter or LST",
                )
    return found


def _steps(survey: Survey, at: str, following: str) -> list[str]:
    """The modules between two blocks, each given the result of the one before."""
    steps: list[str] = []
    while True:
        readers = continuing(survey, steps[-1] if steps else at, following)
        if not readers or any(r == following or r.startswith(f"{following}.") for r in readers):
            return steps
        steps.append(readers[0])


def _expanded(survey: Survey, steps: Iterable[str]) -> Iterable[str]:
    for path in steps:
        module = survey.modules[path]
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _expanded(survey, (f"{path}.{name}" for name, _ in module.named_children()))
        elif isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            raise SiteError("a container would call an adapter among its children", where=path)
        else:
            yield path


def require_unseen(model: nn.Module, sites: Iterable[Site], example: Example) -> None:
    """Refuse adapters at slots ``"readout"`` whose results the backbone reads itself.

    Raises:
        SiteError: the blocks behind them, with the adapters, do not return what they return without.
    """
    ends = [site.path for site in sites if site.slot == "readout"]
    if not ends:
        return
    with silenced(model):
        plain = _record(model, ends, example)
    adapted = _record(model, ends, example)
    for before, path in pairwise(ends):
        if not torch.equal(plain[path][2], adapted[path][2]):
            raise SiteError("the backbone goes on from what is read out here", where=before)


def _record(
    model: nn.Module, paths: Iterable[str], example: Example
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Path -> what the module was given in one forward, and the first tensor that it returned itself."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
    handles = []
    for path in paths:

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            found[path] = args, kwargs, next(tensors_of(output))

        # First of all hooks: before an adapter's.
        handles.append(model.get_submodule(path).register_forward_hook(note, with_kwargs=True, prepend=True))
    try:
        with preserved(model), torch.no_grad():
            forward(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found
