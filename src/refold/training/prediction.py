"""Predictions for images without labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from refold.training.build import resolve
from refold.training.evaluation import prediction_rows
from refold.training.inference import compute_logits, evaluation_loader, start_accelerator

__all__ = ["Predictions", "predict"]


class Predictions(list[dict[str, Any]]):
    """Rows of :func:`predict`; ``skipped`` has (path, reason) of the files left out."""

    def __init__(self, rows: list[dict[str, Any]], skipped: list[tuple[str, str]]) -> None:
        super().__init__(rows)
        self.skipped = skipped


def predict(
    source: nn.Module | str | Path,
    images: str | Path | Iterable[str | Path],
    *,
    weights: str | Path | None = None,
    force: bool = False,
    skip_bad_images: bool = False,
    batch_size: int = 64,
    workers: int = 0,
) -> Predictions:
    """What a trained model sees in images, in float32.

    Args:
        source: a model with an adapter attached or merged, a run folder, an adapter file, or
            ``"hf-hub:user/repo"``.
        images: a file, a folder (searched with its subfolders), or several files.
        weights, force: as for :func:`refold.training.resolve`.
        skip_bad_images: leave out files that cannot be decoded instead of stopping.
        batch_size: images of a forward pass.
        workers: processes that decode.

    Returns:
        one dictionary an image, in the order given or sorted by path: ``path``; ``prediction``, a class name, a
        list of names (multi-label) or a number (regression); and ``score CLASS`` for each class.

    Raises:
        DataError: no image, or one that cannot be decoded.
        StoreError, BackboneError: the model cannot be loaded.
    """
    from refold.data import load_images

    # Each image is read once: nothing is gained by holding it.
    image_set, skipped = load_images(images, skip_bad_images=skip_bad_images, cache="stream")
    ready = resolve(source, weights=weights, force=force)
    accelerator = start_accelerator()
    loader = evaluation_loader(image_set, ready.preprocessing, accelerator, batch_size=batch_size, workers=workers)
    logits = compute_logits(ready.model.to(accelerator.device), loader, len(image_set), accelerator)
    return Predictions(prediction_rows(image_set.paths, ready.task.scores(logits), ready.task), skipped)
