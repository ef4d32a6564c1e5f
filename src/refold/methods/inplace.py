"""The three baselines that add nothing: they train some of the backbone's own parameters in place.

* ``LinearProbe``: the head alone.
* ``BitFit`` (arXiv 2106.10199): every bias, those of norms included, and the head. 102,912 on ViT-B/16.
* ``FullFineTune``: everything, BatchNorm statistics included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from refold.errors import SiteError
from refold.methods.base import Method, Plan, body_parameters
from refold.survey import Survey

__all__ = ["BitFit", "FullFineTune", "LinearProbe"]


@dataclass(frozen=True)
class LinearProbe(Method):
    """Train the head on the frozen backbone's features."""

    summary: ClassVar[str] = "the head alone"
    paper: ClassVar[str] = "-"

    def plan(self, survey: Survey) -> Plan:
        return Plan()


@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias of the backbone, and the head.

    A parameter is a bias if its module calls it one: its own name is ``bias``, ``in_proj_bias``, ``q_bias`` or
    ``v_bias``.
    """

    summary: ClassVar[str] = "every bias"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def plan(self, survey: Survey) -> Plan:
        names = ("bias", "in_proj_bias", "q_bias", "k_bias", "v_bias")
        trained = tuple(n for n in body_parameters(survey) if n.rpartition(".")[2] in names)
        if not trained:
            raise SiteError("the backbone has no bias to train", where=type(survey.model).__name__)
        return Plan(trained=trained)


@dataclass(frozen=True)
class FullFineTune(Method):
    """Train every parameter of the backbone, and the head."""

    summary: ClassVar[str] = "every parameter"
    paper: ClassVar[str] = "-"

    def plan(self, survey: Survey) -> Plan:
        return Plan(trained=tuple(body_parameters(survey)), trains_statistics=True)
