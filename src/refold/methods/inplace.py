"""The baselines that add nothing: they train some of the backbone's own parameters in place, and the head.

* ``LinearProbe``: the head alone.
* ``BitFit`` (arXiv 2106.10199): every bias, those of norms included. 102,912 on ViT-B/16.
* ``LayerNormTune`` (arXiv 2304.01917): the scale and shift of every norm. 38,400 on ViT-B/16.
* ``Partial`` (partial-k of arXiv 2203.12119): the last k blocks and what is behind them. 7,089,408 on ViT-B/16.
* ``FullFineTune``: everything.

A BatchNorm's statistics stay those of the backbone, also in training mode: its scale and bias train like any other
norm's. They move in ``FullFineTune`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from refold.errors import SiteError
from refold.fold import NORMS
from refold.methods.base import Method, Plan, body_parameters, is_count, require
from refold.places import blocks
from refold.probe import preserved
from refold.sites import Skipped
from refold.survey import Survey

__all__ = ["BitFit", "FullFineTune", "LayerNormTune", "LinearProbe", "Partial"]

#: Torch's own norms; timm's LayerNorm2d and BatchNormAct2d, for example, derive from them.
_NORMS = (*NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass(frozen=True)
class LinearProbe(Method):
    """Train the head on the frozen backbone's features.

    Use it first: it is the cheapest there is, and what it reaches tells how well the features fit the task.
    """

    summary: ClassVar[str] = "the head alone"
    paper: ClassVar[str] = "-"

    def plan(self, survey: Survey) -> Plan:
        return Plan()


@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias of the backbone, and the head.

    A parameter is a bias if its module calls it one: its own name is ``bias``, ``in_proj_bias``, ``q_bias``,
    ``k_bias`` or ``v_bias``.

    Use it as a baseline that changes no weight matrix, or where a few hundred kilobytes a task are too many.
    """

    summary: ClassVar[str] = "every bias"
    paper: ClassVar[str] = "arXiv 2106.10199"
    tasks: ClassVar[str] = "language, classification"

    def plan(self, survey: Survey) -> Plan:
        names = ("bias", "in_proj_bias", "q_bias", "k_bias", "v_bias")
        trained = tuple(n for n in body_parameters(survey) if n.rpartition(".")[2] in names)
        if not trained:
            raise SiteError("the backbone has no bias to train", where=type(survey.model).__name__)
        return Plan(trained=trained)


@dataclass(frozen=True)
class LayerNormTune(Method):
    """Train the scale and shift of every norm of the backbone, and the head.

    A norm is one of torch's (LayerNorm, RMSNorm, GroupNorm, BatchNorm, InstanceNorm), one derived from it, or a layer
    of any class that gives the same for ten times the input. A BatchNorm keeps its statistics.

    Use it when almost nothing may be stored for a task, or as the baseline that every method with more parameters has
    to beat.
    """

    summary: ClassVar[str] = "every norm's scale and shift"
    paper: ClassVar[str] = "arXiv 2304.01917"

    def plan(self, survey: Survey) -> Plan:
        others, skipped = _other_norms(survey)
        norms = [m for m in survey.modules.values() if isinstance(m, _NORMS)] + others
        own = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
        trained = tuple(n for n, p in body_parameters(survey).items() if id(p) in own)
        if not trained:
            raise SiteError("the backbone has no norm with parameters", where=type(survey.model).__name__)
        return Plan(skipped=tuple(skipped), trained=trained)


def _other_norms(survey: Survey) -> tuple[list[nn.Module], list[Skipped]]:
    """Norms of no class of torch's, and the layers that may be some but cannot be tried."""
    body, found, skipped = {id(p) for p in body_parameters(survey).values()}, [], []
    with preserved(survey.model), torch.no_grad():
        for path, module in survey.modules.items():
            own = list(module.parameters())
            vectors = all(p.dim() and p.numel() == max(p.shape) and id(p) in body for p in own)
            leaf = not any(True for _ in module.children())
            if not (own and vectors and leaf) or isinstance(module, _NORMS) or path not in survey.trace.calls:
                continue
            shape = survey.trace.inputs.get(path)
            if shape is None:
                skipped.append(Skipped(path, f"{type(module).__name__} is called more than once, so it was not tried"))
            elif shape == survey.trace.shapes[path]:
                try:
                    found += [module] if _normalises(module, shape, own[0]) else []
                except Exception as error:  # it may take more than one tensor
                    skipped.append(Skipped(path, f"{type(module).__name__} cannot be tried: {error}"))
    return found, skipped


def _normalises(module: nn.Module, shape: tuple[int, ...], like: nn.Parameter) -> bool:
    """Whether the module gives the same for ten times its input, as no scale and no activation does."""
    x = torch.randn(shape, device=like.device, dtype=like.dtype)
    nothing = module(torch.zeros_like(x))  # its bias
    once, tenfold = module(x) - nothing, module(10 * x) - nothing
    return bool((tenfold - once).norm() <= 0.1 * once.norm() > 0)


@dataclass(frozen=True)
class Partial(Method):
    """Train the last blocks of the backbone with what is behind them (a final norm, say), and the head.

    Blocks are what lies around whole residual branches, in the order of the forward, as in the probing forward.

    Args:
        blocks: k, how many of them; what comes before them stays frozen.

    Raises:
        SiteError: a hyper-parameter is out of range, or the backbone has fewer blocks.

    Use it when the task needs new features, not another view of the old ones, and memory is short: nothing below the
    trained blocks keeps activations for the backward pass.
    """

    blocks: int = 1

    summary: ClassVar[str] = "the last blocks"
    paper: ClassVar[str] = "arXiv 2203.12119"

    def __post_init__(self) -> None:
        require(self, "blocks", is_count(self.blocks), "a positive integer")

    def plan(self, survey: Survey) -> Plan:
        found, order = blocks(survey), survey.trace.order
        if self.blocks > len(found):
            raise SiteError(
                f"blocks={self.blocks}, and the backbone has {len(found)}",
                where=type(survey.model).__name__,
                remedy="Use fewer, or FullFineTune",
            )
        first = order[found[-self.blocks]]
        trained = (n for n in body_parameters(survey) if order.get(_reader(survey, n), -1) >= first)
        return Plan(trained=tuple(trained))


def _reader(survey: Survey, name: str) -> str:
    """Path of the module that a parameter belongs to, or of the nearest around it that the forward called."""
    path = name.rpartition(".")[0]
    while path and path not in survey.trace.order:
        path = path.rpartition(".")[0]
    return path


@dataclass(frozen=True)
class FullFineTune(Method):
    """Train every parameter of the backbone, BatchNorm's statistics included, and the head.

    Use it when there are many labelled images and a whole model to store for each task is no matter.
    """

    summary: ClassVar[str] = "every parameter"
    paper: ClassVar[str] = "-"

    def plan(self, survey: Survey) -> Plan:
        return Plan(trained=tuple(body_parameters(survey)), trains_statistics=True)
