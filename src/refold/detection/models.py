"""``build_detector``: torchvision's detectors, and Cascade (Mask) R-CNN, on any refold encoder.

==================  ============================================================  ==================================
kind                paper                                                         levels, anchors
==================  ============================================================  ==================================
faster_rcnn         Faster R-CNN (1506.01497) with FPN (1612.03144)               P2 to P6, 8 strides, 3 ratios
mask_rcnn           Mask R-CNN (1703.06870)                                       the same
cascade_rcnn        Cascade R-CNN (1712.00726)                                    the same
cascade_mask_rcnn   Cascade Mask R-CNN (1906.09756)                               the same
retinanet           RetinaNet (1708.02002)                                        P3 to P7, 4 strides, 9 anchors
fcos                FCOS (1904.01355)                                             P3 to P7, points
==================  ============================================================  ==================================

All follow torchvision's interface. In training, ``model(images, targets)`` returns a dict of losses, to be summed; in
evaluation ``model(images)`` returns ``boxes`` (n, 4), x1 y1 x2 y2 in pixels of the image given, ``labels`` (n,) from 1,
``scores`` (n,) and, of the mask kinds, ``masks`` (n, 1, H, W), probabilities. Images are a list of (3, H, W) in [0, 1],
*not* normalised: the model resizes and normalises. Labels count from 1; 0 is the background, in every kind.
:mod:`refold.detection.cascade` says what the cascade is, and where it chooses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from refold.dense.encoder import Encoder
from refold.detection.cascade import CascadeRoIHeads, mask_parts
from refold.detection.pyramid import ExactBoxCoder, ExactLinearCoder, ExactP6P7, Pyramid, StridedAnchors, roi_align_on
from refold.errors import BackboneError, DataError
from refold.preprocessing import Preprocessing

__all__ = ["KINDS", "MASK_KINDS", "Detector", "build_detector"]

KINDS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "retinanet", "fcos")
MASK_KINDS = ("mask_rcnn", "cascade_mask_rcnn")

_RATIOS = (0.5, 1.0, 2.0)
_OCTAVES = tuple(2 ** (k / 3) for k in range(3))  # RetinaNet's three sizes of a level


class Detector(nn.Module):
    """What all detectors here share; the rest is torchvision's.

    Attributes:
        kind: one of :data:`KINDS`.
        classes: without background.
        backbone: the encoder with its feature pyramid.
    """

    kind: str
    classes: int
    # torchvision's own, typed by it as any module.
    backbone: Any
    transform: Any
    rpn: Any
    roi_heads: Any
    head: Any

    @property
    def encoder(self) -> Encoder:
        """The encoder; its ``body`` is the only part to freeze or adapt."""
        return self.backbone.encoder

    @property
    def has_masks(self) -> bool:
        return self.kind in MASK_KINDS


class _FasterRCNN(Detector, detection.FasterRCNN):
    pass


class _MaskRCNN(Detector, detection.MaskRCNN):
    pass


class _Foreground(Detector):
    """A head with a score for each class and none for the background, whose classes count from 1 outside.

    torchvision's RetinaNet and FCOS take labels as columns: with labels from 1 the first column would be idle.
    """

    def compute_loss(self, targets: list[dict[str, Tensor]], *rest: Any, **named: Any) -> dict[str, Tensor]:
        shifted = [{**target, "labels": target["labels"] - 1} for target in targets]
        return super().compute_loss(shifted, *rest, **named)  # type: ignore[misc]

    def postprocess_detections(self, *arguments: Any, **named: Any) -> list[dict[str, Tensor]]:
        found = super().postprocess_detections(*arguments, **named)  # type: ignore[misc]
        return [{**one, "labels": one["labels"] + 1} for one in found]


class _RetinaNet(_Foreground, detection.RetinaNet):
    pass


class _FCOS(_Foreground, detection.FCOS):
    pass


def build_detector(
    kind: str,
    encoder: Encoder,
    classes: int,
    *,
    preprocessing: Preprocessing,
    min_size: int = 800,
    max_size: int = 1333,
    channels: int = 256,
    hidden: int = 1024,
    anchor_scale: float | None = None,
    rois: int = 512,
    score_threshold: float = 0.05,
    detections: int = 100,
) -> Detector:
    """A detector on ``encoder``, with random heads.

    Args:
        kind: one of :data:`KINDS`.
        encoder: gives maps whose strides double, or one stride (a plain ViT).
        classes: number of classes, without background.
        preprocessing: of the encoder: its mean and standard deviation are what the model normalises by.
        min_size, max_size: images are resized so that the short side has ``min_size`` pixels and the long one no more
            than ``max_size``. COCO's by default; small images need less. Padded to a multiple of 32, and of the patch
            size (224 for 14 pixels). A backbone that takes one size only gets that size.
        channels: of the pyramid and the mask heads. Of FCOS a multiple of 32 from 64 on.
        hidden: width of the box heads; not used by RetinaNet and FCOS.
        anchor_scale: side of a level's (smallest) anchor in units of its stride. None is the paper's: 8 for the R-CNN
            kinds, 4 for RetinaNet. Objects smaller than an anchor of the first level are found badly: lower it, or
            raise ``min_size``. FCOS has no anchors.
        rois: boxes sampled per image in training; not used by RetinaNet and FCOS.
        score_threshold: detections of a lower score are dropped.
        detections: most of an image. COCO's AP counts 100 at most.

    Raises:
        DataError: an argument out of range, or a kind that is not known.
        BackboneError: an encoder without the maps that the kind needs.
    """
    if kind not in KINDS:
        raise DataError(f"unknown detector {kind!r}", where="kind", remedy=f"Known: {', '.join(KINDS)}")
    counts = {"classes": classes, "channels": channels, "hidden": hidden, "rois": rois, "detections": detections}
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"must be positive, not {value}", where=name)
    if not 0 <= score_threshold < 1:
        raise DataError(f"must be in [0, 1), not {score_threshold}", where="score_threshold")
    if not 0 < min_size <= max_size:
        raise DataError(f"must be positive and at most max_size ({max_size}), not {min_size}", where="min_size")
    if preprocessing.channels != 3:
        raise DataError(f"detectors take 3 channels, not {preprocessing.channels}", where="preprocessing")
    if kind == "fcos" and (channels % 32 or channels < 64):  # a group of one channel cannot be normalised on one pixel
        raise DataError(f"of FCOS must be a multiple of 32 from 64 on, not {channels}", where="channels")
    if kind == "fcos" and anchor_scale is not None:
        raise DataError("FCOS has no anchors", where="anchor_scale")
    if anchor_scale is not None and anchor_scale <= 0:
        raise DataError(f"must be positive, not {anchor_scale}", where="anchor_scale")
    one_stage = kind in ("retinanet", "fcos")
    pyramid = Pyramid(
        encoder,
        channels,
        finest=8 if one_stage else 4,
        extra=ExactP6P7(channels, channels) if one_stage else LastLevelMaxPool(),
        extra_levels=2 if one_stage else 1,
    )
    shared: dict[str, Any] = {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "size_divisible": pyramid.multiple,
        "fixed_size": _fixed_size(encoder, pyramid),
    }
    if one_stage:
        shared |= {"score_thresh": score_threshold, "detections_per_img": detections}
        model = (
            _fcos(pyramid, classes, shared) if kind == "fcos" else _retinanet(pyramid, classes, anchor_scale, shared)
        )
    else:
        limits = {"rois": rois, "score_threshold": score_threshold, "detections": detections}
        model = _two_stages(kind, pyramid, classes, hidden, anchor_scale, limits, shared)
    model.kind, model.classes = kind, classes
    return model


def _fixed_size(encoder: Encoder, pyramid: Pyramid) -> tuple[int, int] | None:
    """(width, height) to which torchvision shall squash all images, for an encoder that takes no other."""
    if encoder.fixed_size is None:
        return None
    height, width = encoder.fixed_size
    if height % pyramid.multiple or width % pyramid.multiple:
        raise BackboneError(
            f"the backbone takes {height}x{width} images only, and a detector's pyramid needs multiples of "
            f"{pyramid.multiple}",
            where="encoder",
            remedy="Load it with image_size set to such a size",
        )
    return width, height


def _fcos(pyramid: Pyramid, classes: int, shared: dict[str, Any]) -> Detector:
    points = StridedAnchors(tuple((stride,) for stride in pyramid.strides), (1.0,), pyramid.strides)
    model = _FCOS(pyramid, classes, anchor_generator=points, **shared)
    model.box_coder = model.head.box_coder = ExactLinearCoder(normalize_by_size=True)
    return model


def _retinanet(pyramid: Pyramid, classes: int, scale: float | None, shared: dict[str, Any]) -> Detector:
    sizes = tuple(tuple((scale or 4.0) * stride * octave for octave in _OCTAVES) for stride in pyramid.strides)
    anchors = StridedAnchors(sizes, _RATIOS, pyramid.strides)
    model = _RetinaNet(pyramid, classes, anchor_generator=anchors, **shared)
    model.box_coder = model.head.regression_head.box_coder = ExactBoxCoder((1.0, 1.0, 1.0, 1.0))
    return model


def _two_stages(
    kind: str,
    pyramid: Pyramid,
    classes: int,
    hidden: int,
    scale: float | None,
    limits: dict[str, Any],
    shared: dict[str, Any],
) -> Detector:
    """The R-CNN kinds."""
    sizes = tuple(((scale or 8.0) * stride,) for stride in pyramid.strides)
    shared |= {
        "rpn_anchor_generator": StridedAnchors(sizes, _RATIOS, pyramid.strides),
        "box_roi_pool": roi_align_on(pyramid, 7),
    }
    masks = kind in MASK_KINDS
    if kind.startswith("cascade"):
        model = _FasterRCNN(pyramid, box_head=nn.Identity(), box_predictor=nn.Identity(), **shared)
        model.roi_heads = CascadeRoIHeads(pyramid, classes, hidden=hidden, masks=masks, **limits)
    else:
        model = (_MaskRCNN if masks else _FasterRCNN)(
            pyramid,
            box_head=TwoMLPHead(pyramid.out_channels * 7**2, hidden),
            box_predictor=FastRCNNPredictor(hidden, classes + 1),
            box_batch_size_per_image=limits["rois"],
            box_score_thresh=limits["score_threshold"],
            box_detections_per_img=limits["detections"],
            **(mask_parts(pyramid, classes) if masks else {}),
            **shared,
        )
        model.roi_heads.box_coder = ExactBoxCoder((10.0, 10.0, 5.0, 5.0))
    model.rpn.box_coder = ExactBoxCoder((1.0, 1.0, 1.0, 1.0))
    return model
