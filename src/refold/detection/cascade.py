"""Cascade R-CNN and Cascade Mask R-CNN on torchvision's RoIHeads (arXiv 1712.00726 and 1906.09756).

Three heads in a row. Stage t takes boxes whose overlap with an object is at least 0.5, 0.6, 0.7 as that object, and
regresses them, the same way for every class, with codes of the weights (10, 10, 5, 5), (20, 20, 10, 10),
(30, 30, 15, 15); the refined boxes are what the next stage is given. The losses of the stages count 1, 0.5, 0.25.

Where the papers leave a choice, or released code differs:

* Training: each stage gets the true boxes beside the boxes handed to it, assigns anew, and samples (512, a quarter of
  them objects); true boxes are not handed on, for there are none at test. Boxes without area after refinement and
  clipping are dropped. At test nothing is dropped before the end, so that each box has three scores.
* The score of a detection is the mean, over the stages, of the class probabilities that each gave the box it was
  handed. (The paper's own code lets all three heads score the last stage's boxes, which costs two more heads.)
* Masks: one head a stage, each trained on its stage's objects and under its stage's weight: the variant (d) of arXiv
  1906.09756, the best there and the one in use. At test the three look at the final boxes, and their probabilities are
  averaged.
* The losses are torchvision's Faster R-CNN's: cross-entropy, and smooth L1 with beta 1/9.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from refold.detection.pyramid import ExactBoxCoder, Pyramid, roi_align_on

__all__ = ["CODE_WEIGHTS", "LOSS_WEIGHTS", "OVERLAPS", "CascadeRoIHeads", "mask_parts", "refine"]

OVERLAPS = (0.5, 0.6, 0.7)
CODE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)

_LEAST_SIDE = 1e-2  # pixels; torchvision's own bound at the end

Targets = list[dict[str, Tensor]]
Features = dict[str, Tensor]
Sizes = list[tuple[int, int]]


class CascadeRoIHeads(nn.Module):
    """The three stages; takes the place of torchvision's ``roi_heads``.

    Args:
        pyramid: what the features come from.
        classes: without background.
        hidden: width of each box head.
        masks: with mask heads.
        rois: boxes a stage samples per image in training.
        score_threshold: detections of a lower score are dropped.
        detections: most of an image.

    In training it returns no detections, and for each stage k = 0, 1, 2 ``loss_classifier_k``, ``loss_box_reg_k`` and
    ``loss_mask_k``, weighted. In evaluation it returns what torchvision's returns, and no losses.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        classes: int,
        *,
        hidden: int,
        masks: bool,
        rois: int,
        score_threshold: float,
        detections: int,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for overlap, weights in zip(OVERLAPS, CODE_WEIGHTS, strict=True):
            stage = RoIHeads(
                box_roi_pool=roi_align_on(pyramid, 7),
                box_head=TwoMLPHead(pyramid.out_channels * 7**2, hidden),
                box_predictor=_agnostic_predictor(hidden, classes),
                fg_iou_thresh=overlap,
                bg_iou_thresh=overlap,
                batch_size_per_image=rois,
                positive_fraction=0.25,
                bbox_reg_weights=weights,
                score_thresh=score_threshold,
                nms_thresh=0.5,
                detections_per_img=detections,
                **(mask_parts(pyramid, classes) if masks else {}),
            )
            stage.box_coder = ExactBoxCoder(weights)
            self.stages.append(stage)

    def forward(
        self, features: Features, proposals: list[Tensor], image_shapes: Sizes, targets: Targets | None = None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's RoIHeads.

        Args:
            features: level name -> (B, C, H, W).
            proposals: boxes (n, 4) of each image, x1 y1 x2 y2, in pixels of the resized images.
            image_shapes: (height, width) of each resized image.
            targets: in training, ``boxes``, ``labels`` (from 1) and, with mask heads, ``masks`` of each image.
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self, features: Features, proposals: list[Tensor], image_shapes: Sizes, targets: Targets | None
    ) -> dict[str, Tensor]:
        losses = {}
        for k, (stage, weight) in enumerate(zip(self._stages(), LOSS_WEIGHTS, strict=True)):
            proposals, matched, labels, codes = stage.select_training_samples(proposals, targets)
            logits, deltas = _heads(stage, features, proposals, image_shapes)
            classify, regress = fastrcnn_loss(logits, _for_each_class(deltas, logits), labels, codes)
            losses |= {f"loss_classifier_{k}": weight * classify, f"loss_box_reg_{k}": weight * regress}
            if stage.has_mask() and targets is not None:
                losses[f"loss_mask_{k}"] = weight * _mask_loss(
                    stage, features, proposals, image_shapes, targets, labels, matched
                )
            refined = refine(stage, deltas, proposals, image_shapes)
            # A sampled object whose code is zero is one of the true boxes.
            invented = [(label == 0) | code.ne(0).any(dim=1) for label, code in zip(labels, codes, strict=True)]
            proposals = [boxes[mask] for boxes, mask in zip(refined, invented, strict=True)]
            proposals = [boxes[remove_small_boxes(boxes, _LEAST_SIDE)] for boxes in proposals]
        return losses

    def _detect(self, features: Features, proposals: list[Tensor], image_shapes: Sizes) -> list[dict[str, Tensor]]:
        stages, probabilities = self._stages(), []
        logits, deltas = _heads(stages[0], features, proposals, image_shapes)
        probabilities.append(logits.float().softmax(-1))
        for before, stage in pairwise(stages):
            proposals = refine(before, deltas, proposals, image_shapes)
            logits, deltas = _heads(stage, features, proposals, image_shapes)
            probabilities.append(logits.float().softmax(-1))
        # The softmax of their logarithm gives the mean back.
        logits = torch.stack(probabilities).mean(dim=0).log()
        found = stages[-1].postprocess_detections(logits, _for_each_class(deltas, logits), proposals, image_shapes)
        result = [
            {"boxes": boxes, "labels": labels, "scores": scores} for boxes, scores, labels in zip(*found, strict=True)
        ]
        if stages[-1].has_mask():
            boxes, labels = [r["boxes"] for r in result], [r["labels"] for r in result]
            votes = [maskrcnn_inference(_mask_logits(s, features, boxes, image_shapes), labels) for s in stages]
            for r, masks in zip(result, zip(*votes, strict=True), strict=True):
                r["masks"] = torch.stack(masks).mean(dim=0)
        return result

    def _stages(self) -> list[RoIHeads]:
        return list(self.stages)  # type: ignore[arg-type]


def refine(stage: RoIHeads, deltas: Tensor, proposals: list[Tensor], image_shapes: Sizes) -> list[Tensor]:
    """The boxes that ``deltas`` (n, 4) make of all ``proposals``, clipped to their images; without gradient."""
    boxes = stage.box_coder.decode(deltas.detach(), proposals).reshape(-1, 4)
    split = boxes.split([len(p) for p in proposals])
    return [clip_boxes_to_image(b, shape) for b, shape in zip(split, image_shapes, strict=True)]


def _agnostic_predictor(width: int, classes: int) -> FastRCNNPredictor:
    predictor = FastRCNNPredictor(width, classes + 1)
    predictor.bbox_pred = nn.Linear(width, 4)
    return predictor


def mask_parts(pyramid: Pyramid, classes: int) -> dict[str, nn.Module]:
    """A mask branch as Mask R-CNN's: what torchvision calls its three parts, by its names."""
    width = pyramid.out_channels
    return {
        "mask_roi_pool": roi_align_on(pyramid, 14),
        "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(width, width, classes + 1),
    }


def _heads(stage: RoIHeads, features: Features, boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Class logits (n, K + 1) and class-agnostic deltas (n, 4) of all boxes."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, sizes)))


def _for_each_class(deltas: Tensor, logits: Tensor) -> Tensor:
    """(n, 4) -> (n, 4 (K + 1)): torchvision's functions expect a box for every class."""
    return deltas.repeat(1, logits.shape[1])


def _mask_logits(stage: RoIHeads, features: Features, boxes: list[Tensor], sizes: Sizes) -> Tensor:
    pool, head, predictor = stage.mask_roi_pool, stage.mask_head, stage.mask_predictor
    return predictor(head(pool(features, boxes, sizes)))  # type: ignore[misc]


def _mask_loss(
    stage: RoIHeads,
    features: Features,
    proposals: list[Tensor],
    sizes: Sizes,
    targets: Targets,
    labels: list[Tensor],
    matched: list[Tensor],
) -> Tensor:
    """Of the sampled boxes that are objects."""
    objects = [label > 0 for label in labels]
    boxes = [p[chosen] for p, chosen in zip(proposals, objects, strict=True)]
    logits = _mask_logits(stage, features, boxes, sizes)
    indices = [m[chosen] for m, chosen in zip(matched, objects, strict=True)]
    return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], indices)
