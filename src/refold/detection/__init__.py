"""Detection and instance segmentation: torchvision's detectors on refold's encoders, COCO and VOC data, COCO's AP."""

from __future__ import annotations

from refold.detection.boxes import BoxSet, Object
from refold.detection.coco import read_coco
from refold.detection.evaluation import AveragePrecision, average_precision, to_results, write_results
from refold.detection.loader import BoxLoader
from refold.detection.models import KINDS, MASK_KINDS, Detector, build_detector
from refold.detection.sources import BoxSplits, load_boxes
from refold.detection.voc import read_voc
from refold.detection.voc_masks import read_voc_masks

__all__ = [
    "KINDS",
    "MASK_KINDS",
    "AveragePrecision",
    "BoxLoader",
    "BoxSet",
    "BoxSplits",
    "Detector",
    "Object",
    "average_precision",
    "build_detector",
    "load_boxes",
    "read_coco",
    "read_voc",
    "read_voc_masks",
    "to_results",
    "write_results",
]
