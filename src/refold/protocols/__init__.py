"""The evaluation protocols of the literature, on anybody's data: tasks, what is chosen on which split, and tables."""

from __future__ import annotations

from refold.protocols.corruptions import CORRUPTIONS, corrupt
from refold.protocols.fewshot import PUBLISHED_RECIPE, FewShotResult, run_few_shot
from refold.protocols.generalization import DomainResult, load_other, run_domains
from refold.protocols.points import Point, parse_grid, points
from refold.protocols.robustness import RobustnessResult, examine
from refold.protocols.suite import SuiteResult, run_suite
from refold.protocols.trial import Standing
from refold.protocols.vtab import TASKS, VtabTask, find_tasks
from refold.protocols.vtab_prepare import prepare
from refold.protocols.vtab_run import VtabResult, run_vtab

__all__ = [
    "CORRUPTIONS",
    "PUBLISHED_RECIPE",
    "TASKS",
    "DomainResult",
    "FewShotResult",
    "Point",
    "RobustnessResult",
    "Standing",
    "SuiteResult",
    "VtabResult",
    "VtabTask",
    "corrupt",
    "examine",
    "find_tasks",
    "load_other",
    "parse_grid",
    "points",
    "prepare",
    "run_domains",
    "run_few_shot",
    "run_suite",
    "run_vtab",
]
