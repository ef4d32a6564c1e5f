"""Training, evaluation and prediction."""

from __future__ import annotations

from refold.training.build import Ready, resolve
from refold.training.config import TrainConfig
from refold.training.evaluation import Evaluation, evaluate
from refold.training.job import TrainResult, train
from refold.training.loop import Fit, fit
from refold.training.prediction import Predictions, predict
from refold.training.recipe import Recipe
from refold.training.run import RunFolder
from refold.training.zeroshot import Interpolated, interpolate_run, zeroshot

__all__ = [
    "Evaluation",
    "Fit",
    "Interpolated",
    "Predictions",
    "Ready",
    "Recipe",
    "RunFolder",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "fit",
    "interpolate_run",
    "predict",
    "resolve",
    "train",
    "zeroshot",
]
