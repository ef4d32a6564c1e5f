"""The evaluation protocols of the literature, on anybody's data: tasks, what is chosen on which split, and tables."""

from __future__ import annotations

from refold.protocols.points import Point, parse_grid, points
from refold.protocols.vtab import TASKS, VtabTask, find_tasks, prepare
from refold.protocols.vtab_run import VtabResult, run_vtab

__all__ = [
    "TASKS",
    "Point",
    "VtabResult",
    "VtabTask",
    "find_tasks",
    "parse_grid",
    "points",
    "prepare",
    "run_vtab",
]
