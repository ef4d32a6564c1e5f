"""COCO's average precision, by faster-coco-eval, and predictions in COCO's format of results.

AP is the mean over the overlaps (IoU) 0.50, 0.55 ... 0.95 and over the classes of the area under the curve of
precision against recall, at 101 recalls, of the 100 best detections of each image. Small, medium and large objects have
areas under 32 x 32, under 96 x 96 and above. Ignored objects (crowds, VOC's difficult ones) are no misses, and
detections on them no errors: COCO's rule for crowds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from refold.backbones.files import atomic_path
from refold.detection.boxes import BoxSet
from refold.detection.masks import encode_mask
from refold.errors import DataError, MissingExtraError

__all__ = ["AveragePrecision", "average_precision", "to_results", "write_results"]

Row = dict[str, Any]
Measured = Literal["bbox", "segm"]

_NAMES = {"AP_all": "ap", "AP_50": "ap50", "AP_75": "ap75"}
_NAMES |= {f"AP_{size}": f"ap_{size}" for size in ("small", "medium", "large")}
_UNDEFINED = -1.0  # what COCO's code calls an average over nothing


@dataclass(frozen=True)
class AveragePrecision:
    """Results on one set, in [0, 1].

    Attributes:
        metrics: ``ap``, ``ap50``, ``ap75``, ``ap_small``, ``ap_medium``, ``ap_large``; those are left out for which
            the set has no object.
        per_class: rows of ``class``, ``support`` (objects) and, where there are any, ``ap`` and ``ap50``.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]


def to_results(
    predictions: Sequence[Mapping[str, Tensor]], indices: Sequence[int] | Tensor, box_set: BoxSet
) -> list[Row]:
    """Predictions of a batch as rows of a COCO results file, with the ids of ``box_set``.

    Args:
        predictions: one an image, as torchvision's detectors return them in evaluation: ``boxes`` (n, 4) x1 y1 x2 y2,
            ``labels`` (n,) from 1, ``scores`` (n,) and perhaps ``masks`` (n, 1, H, W), of which 0.5 and more is mask.
        indices: of these images in ``box_set``.

    Returns:
        rows of ``image_id``, ``category_id``, ``bbox`` [x, y, width, height], ``score`` and, where predicted,
        ``segmentation``, a compressed RLE.

    Raises:
        DataError: a label that ``box_set`` has no class for.
    """
    rows = []
    for one, index in zip(predictions, torch.as_tensor(indices).tolist(), strict=True):
        labels = one["labels"].tolist()
        if labels and not 1 <= min(labels) <= max(labels) <= len(box_set.classes):
            reason = f"labels {min(labels)} to {max(labels)} of {len(box_set.classes)} classes"
            raise DataError(reason, where="predictions", remedy="Labels count from 1")
        boxes = one["boxes"].double()
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        found = [
            {
                "image_id": box_set.image_ids[index],
                "category_id": box_set.category_ids[label - 1],
                "bbox": box,
                "score": score,
            }
            for label, box, score in zip(labels, boxes, one["scores"].tolist(), strict=True)
        ]
        if "masks" in one:
            for row, mask in zip(found, one["masks"], strict=True):
                row["segmentation"] = encode_mask(mask[0] >= 0.5)
        rows += found
    return rows


def write_results(rows: Iterable[Row], path: str | Path) -> None:
    """Write rows of :func:`to_results` as a COCO results file, which COCO's own tools and servers read."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(json.dumps(list(rows)), encoding="utf-8")


def average_precision(box_set: BoxSet, rows: Iterable[Row], measured: Measured = "bbox") -> AveragePrecision:
    """COCO's AP of ``rows`` on all images of ``box_set``; an image without rows is one on which nothing was found.

    Args:
        box_set: the truth.
        rows: of :func:`to_results`; not changed.
        measured: the overlap of boxes, ``"bbox"``, or of masks, ``"segm"``.

    Raises:
        DataError: ``"segm"``, and the truth or a row has no mask; or a row of an image that the set does not have.
        MissingExtraError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("faster-coco-eval", "dense") from error
    if measured == "segm" and not box_set.has_masks:
        raise DataError("have no masks to measure against", where=box_set.source or "annotations")
    truth = COCO(_truth(box_set, measured))
    known = set(box_set.image_ids)
    found = truth.loadRes([_measured(row, measured, known) for row in rows])  # type: ignore[arg-type]
    evaluation = COCOeval_faster(truth, found, measured, print_function=_silent)
    evaluation.run()
    stats = evaluation.stats_as_dict
    metrics = {short: stats[name] for name, short in _NAMES.items() if stats[name] != _UNDEFINED}
    # (overlaps, recalls, classes, areas, most detections)
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    columns = {id_: k for k, id_ in enumerate(sorted(box_set.category_ids))}
    support = dict.fromkeys(range(1, len(box_set.classes) + 1), 0)
    for one in (one for some in box_set.objects for one in some if not one.ignored):
        support[one.label] += 1
    per_class = []
    for label, (name, id_) in enumerate(zip(box_set.classes, box_set.category_ids, strict=True), start=1):
        row: dict[str, Any] = {"class": name, "support": support[label]}
        curve = precision[:, :, columns[id_]]
        if support[label]:
            row |= {"ap": float(curve.mean()), "ap50": float(curve[0].mean())}
        per_class.append(row)
    return AveragePrecision(metrics, per_class)


def _truth(box_set: BoxSet, measured: Measured) -> dict[str, Any]:
    """``box_set`` as COCO's annotation file."""
    annotations = [
        {
            "id": 0,
            "image_id": image_id,
            "category_id": box_set.category_ids[one.label - 1],
            "bbox": [one.box[0], one.box[1], one.box[2] - one.box[0], one.box[3] - one.box[1]],
            "area": one.area,
            "iscrowd": int(one.ignored),
            **({"segmentation": one.rle} if measured == "segm" else {}),
        }
        for image_id, some in zip(box_set.image_ids, box_set.objects, strict=True)
        for one in some
    ]
    for number, one in enumerate(annotations, start=1):
        one["id"] = number
    return {
        "images": [
            {"id": id_, "file_name": path, "height": height, "width": width}
            for id_, path, (height, width) in zip(box_set.image_ids, box_set.paths, box_set.sizes, strict=True)
        ],
        "categories": [
            {"id": id_, "name": name} for id_, name in zip(box_set.category_ids, box_set.classes, strict=True)
        ],
        "annotations": annotations,
    }


def _measured(row: Row, measured: Measured, known: set[int]) -> Row:
    """A copy with what is measured alone: given a box, COCO's code would size masks by it."""
    if row["image_id"] not in known:
        raise DataError(f"image_id {row['image_id']} is none of the set's images", where="results")
    if measured == "segm" and "segmentation" not in row:
        raise DataError("a detection has no mask", where="results")
    left_out = "segmentation" if measured == "bbox" else "bbox"
    return {key: value for key, value in row.items() if key != left_out}


def _silent(*_: Any) -> None:
    pass
