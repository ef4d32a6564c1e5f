"""Scoring a trained dense model on labelled images: its own run's, or other ones of the same classes."""

from __future__ import annotations

from pathlib import Path

from refold.dense.job import Scored, load_labelled, load_parts, score
from refold.detection import BoxSet
from refold.errors import DataError
from refold.segmentation import IGNORE, Inference, Labels, MaskSet
from refold.training.build import Ready
from refold.training.evaluation import refuse_others
from refold.training.inference import start_accelerator

__all__ = ["evaluate_dense"]


def evaluate_dense(
    ready: Ready,
    data: str | Path | None,
    split: str,
    *,
    inference: Inference | None = None,
    short_side: int | None = None,
    workers: int = 0,
) -> Scored:
    """:func:`refold.training.evaluate` of a dense model; the arguments are described there.

    Raises:
        DataError: no such split, a class that the model does not know, or an argument that is not for its task.
    """
    if ready.kind != "segment":
        refuse_others(ready.kind, {"inference": inference, "short_side": short_side})
    if data is not None:
        parts = load_labelled(ready.kind, data, fractions=(1.0, 0.0, 0.0))
        undivided = parts.val is None and parts.test is None
        chosen = parts.train if undivided else getattr(parts, split)
    elif ready.config is not None:
        chosen = getattr(load_parts(ready.config), split)
    else:
        raise DataError("is needed: only a run folder knows its data", where="data")
    if chosen is None:
        raise DataError(f"the data has no {split} split", where="split")
    part = _aligned(chosen, list(ready.classes or ()))
    accelerator = start_accelerator()
    return score(
        ready.model.to(accelerator.device),
        part,
        ready.preprocessing,
        accelerator,
        workers=workers,
        inference=inference,
        short_side=short_side,
    )


def _aligned(part: MaskSet | BoxSet, classes: list[str]) -> MaskSet | BoxSet:
    """The set with its labels counted in the order of the model's classes.

    Raises:
        DataError: a class that the model does not know.
    """
    unknown = [name for name in part.classes if name not in classes]
    if unknown:
        known = f"It knows: {', '.join(classes)}"
        raise DataError(f"has classes the model does not know: {', '.join(unknown)}", where="data", remedy=known)
    places = [classes.index(name) for name in part.classes]
    if isinstance(part, MaskSet):
        indices = {v: k if k == IGNORE else places[k] for v, k in part.labels.indices.items()}
        return MaskSet(part.images, part.masks, Labels(classes, indices))
    ids = dict(zip(part.classes, part.category_ids, strict=True))
    free = max(ids.values()) + 1
    return BoxSet(
        part.paths,
        part.sizes,
        [[one._replace(label=places[one.label - 1] + 1) for one in some] for some in part.objects],
        classes=classes,
        category_ids=[ids.get(name, free + k) for k, name in enumerate(classes)],
        image_ids=part.image_ids,
        source=part.source,
    )
