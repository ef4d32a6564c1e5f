"""Many runs: their settings compared on validation images alone, one after the other or on Ray."""

from __future__ import annotations

from refold.sweeps.batches import predict_batches
from refold.sweeps.run import SEARCHES, SweepResult, run_sweep
from refold.sweeps.trials import Row, Trial
from refold.sweeps.tune import RayEngine

__all__ = ["SEARCHES", "RayEngine", "Row", "SweepResult", "Trial", "predict_batches", "run_sweep"]
