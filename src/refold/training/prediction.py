"""Predictions for images without labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from refold.training.build import resolve
from refold.training.evaluation import prediction_rows, refuse_others
from refold.training.inference import compute_logits, evaluation_loader, start_accelerator
from refold.training.progress import showing

if TYPE_CHECKING:
    from refold.segmentation import Inference

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
    batch_size: int | None = None,
    workers: int = 0,
    output: str | Path | None = None,
    threshold: float | None = None,
    inference: Inference | None = None,
    short_side: int | None = None,
    clips: int | None = None,
    crops: int | None = None,
    progress: bool | None = None,
) -> Predictions:
    """What a trained model sees in images, in float32.

    Args:
        source: a model with an adapter attached or merged, a run folder, an adapter file, or
            ``"hf-hub:user/repo"``.
        images: a file, a folder (searched with its subfolders), or several files; of a model of videos these.
        weights, force: as for :func:`refold.training.resolve`.
        skip_bad_images: leave out files that cannot be decoded instead of stopping.
        batch_size: images of a forward pass; None is 64. Dense tasks take images one by one.
        workers: processes that decode whole images.
        output: of a dense task: an empty or new folder for what :func:`refold.dense.predicting.predict_dense` writes:
            ``masks/`` or ``predictions.json``, and ``overlays/``.
        threshold: of detection: the lowest score of what is drawn on the overlays; None is 0.5.
        inference, short_side, clips, crops: of segmentation and videos, as for :func:`refold.training.evaluate`.
        progress: bars on standard error; None shows them on a terminal.

    Returns:
        one dictionary an image, in the order given or sorted by path: ``path``; ``prediction``, a class name, a
        list of names (multi-label) or a number (regression); and ``score CLASS`` for each class. Of segmentation
        ``prediction`` is a mask, (H, W) uint8 class indices, or with ``output`` its file; of detection a list of rows
        of a COCO results file.

    Raises:
        DataError: no image, one that cannot be decoded, an argument that is not for the model's task, or an output
            folder in use.
        StoreError, BackboneError: the model cannot be loaded.
    """
    from refold.data import load_images

    ready = resolve(source, weights=weights, force=force)
    given = {"output": output, "threshold": threshold, "inference": inference, "short_side": short_side}
    if ready.kind == "video":
        from refold.video.using import predict_videos

        refuse_others(ready.kind, given)
        with showing(progress):
            return Predictions(
                *predict_videos(
                    ready, images, skip_bad_images=skip_bad_images, clips=clips, crops=crops, batch_size=batch_size,
                    workers=workers,
                )
            )  # fmt: skip
    refuse_others(ready.kind, {"clips": clips, "crops": crops})
    # Each image is read once: nothing is gained by holding it.
    image_set, skipped = load_images(images, skip_bad_images=skip_bad_images, cache="stream")
    if ready.dense:
        from refold.dense.predicting import predict_dense

        refuse_others(ready.kind, {"batch_size": batch_size, "workers": workers or None})
        with showing(progress):
            rows = predict_dense(
                ready, image_set.paths, output, threshold=threshold, inference=inference, short_side=short_side
            )
        return Predictions(rows, skipped)
    refuse_others(ready.kind, given)
    accelerator = start_accelerator()
    loader = evaluation_loader(
        image_set, ready.preprocessing, accelerator, batch_size=batch_size or 64, workers=workers
    )
    with showing(progress):
        logits = compute_logits(ready.model.to(accelerator.device), loader, len(image_set), accelerator)
    return Predictions(prediction_rows(image_set.paths, ready.task.scores(logits), ready.task), skipped)
