"""ONNX of detectors: one image of one size in, its objects out; compared with onnxruntime before it is put in place.

What torchvision does around the network is in the graph: scaling to the model's size, normalisation, padding, choice
of boxes, pasting of masks. Two of its functions ask how many boxes there are, which no graph knows beforehand, and
have another form here. Batched NMS, of whose two equal ways torchvision takes one by that number, always shifts the
boxes of each class apart; masks are pasted by two matrix products an object instead of one after the other.

Outputs are compared object by object. A near tie between boxes that overlap can fall the other way in another runtime,
so a twentieth of the objects may be on one side alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import boxes as box_operations
from torchvision.ops import nms

from refold.attachment import attached_part, is_attached
from refold.backbones.files import atomic_path
from refold.detection.models import Detector
from refold.errors import MergeError, RefoldError
from refold.export.common import Difference, Exported, evaluating, facts, probe
from refold.export.onnx_file import require_onnx, run_file, tracing
from refold.preprocessing import Preprocessing

__all__ = ["compare_objects", "export_detector", "paste"]

_OUTPUTS = ("boxes", "labels", "scores", "masks")
_REMEDY = "Use export_weights (--format weights)"
_ALONE = 0.05  # share of the objects that may be on one side only
_LEAST = torch.finfo(torch.float32).tiny
_BLOBS = 16  # pixels of the smooth probes that are one pixel of noise


def export_detector(
    model: Detector,
    path: str | PathLike[str],
    *,
    preprocessing: Preprocessing,
    size: tuple[int, int] | None = None,
    with_preprocessing: bool = False,
    check: bool = True,
) -> Exported:
    """Write a detector as ONNX, for one image of ``size`` at a time.

    Inputs: ``image`` (3, H, W) float32 in [0, 1], not normalised, or uint8; ``score_threshold`` () float32, which may
    be left out: the model's then. Outputs, best score first: ``boxes`` (n, 4) float32, x1 y1 x2 y2 in pixels of the
    image; ``labels`` (n,) int64, from 1; ``scores`` (n,) float32; of the mask kinds ``masks`` (n, 1, H, W) float32,
    probabilities. Class names, backbone spec and task are stored, where known, as JSON in the file's metadata. The
    backbone of RetinaNet and FCOS may still be unmerged: its adapters then become part of the graph, with their cost.

    Args:
        model: in float32; its modes are left as they are, the file holds its evaluation behaviour.
        path: of the file; replaced only when the export has succeeded.
        preprocessing: the model's input.
        size: (height, width) of the images that the file is for; the graph scales them as the model does. None is
            the size of ``preprocessing``.
        with_preprocessing: take uint8 images.
        check: compare with onnxruntime on three drawn images, at a threshold so low that ``detections`` are found.

    Returns:
        The file and the measured differences of boxes and scores.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        MergeError: adapters are attached to the backbone of an R-CNN, and not merged.
        RefoldError: the model cannot be exported, is too large for one file, or the objects differ.
    """
    require_onnx(model, path, check=check, remedy=_REMEDY)
    if not _is_one_stage(model) and is_attached(model.get_submodule(attached_part(model))):
        raise MergeError(
            f"adapters are attached and not merged, and a {model.kind} cannot be traced with them: torchvision's RoI "
            "pooling takes the number of boxes for a constant (len), so that torch.export must trace in strict mode, "
            "which has been seen to leave out adapters beside the backbone",
            where=type(model).__name__,
            remedy="Call refold.merge before; of a method that does not merge, export retinanet or fcos",
        )
    size = preprocessing.size if size is None else size
    if min(size) < 1:
        raise RefoldError(f"must be a height and a width in pixels, not {size[0]} and {size[1]}", where="size")
    target = Path(path)
    images = _images(model, replace(preprocessing, size=size))
    difference = Difference(target.name)
    threshold = float(_last_stage(model).score_thresh)
    graph = _OneImage(model, raw=with_preprocessing)
    example = graph.input_of(images[0])
    with evaluating(model), atomic_path(target) as temporary:
        with tracing(model.kind, _REMEDY), _batched_nms_of_any_number():
            arguments = (example, torch.tensor(threshold, device=example.device))
            program = torch.onnx.export(
                torch.export.export(graph.eval(), arguments, strict=not _is_one_stage(model)),
                dynamo=True,
                input_names=["image", "score_threshold"],
                output_names=list(_OUTPUTS if model.has_masks else _OUTPUTS[:3]),
                verbose=False,
            )
            if program is None:
                raise ValueError("the exporter returned nothing")
            _set_default(program.model.graph, "score_threshold", threshold)
            known = facts(model, None)
            known.pop("preprocessing", None)  # it is in the graph
            program.model.metadata_props.update(known)
            program.save(temporary, external_data=False)
        if check:
            _compare(graph, temporary, images, difference)
    return difference.exported(target, checked=check)


class _OneImage(nn.Module):
    """A detector as a function of tensors, for the exporter."""

    def __init__(self, model: Detector, *, raw: bool) -> None:
        super().__init__()
        self.model, self.raw = model, raw

    def input_of(self, pixels: Tensor) -> Tensor:
        """What the graph takes for uint8 ``pixels``."""
        return pixels if self.raw else pixels.float() / 255

    def forward(self, image: Tensor, score_threshold: Tensor) -> tuple[Tensor, ...]:
        image = image.float() / 255 if self.raw else image
        holder = _last_stage(self.model)
        before = holder.score_thresh
        holder.score_thresh = score_threshold
        try:
            return self._find(image)
        finally:
            holder.score_thresh = before

    def _find(self, image: Tensor) -> tuple[Tensor, ...]:
        model, size = self.model, (image.shape[-2], image.shape[-1])
        if not model.has_masks:
            (found,) = model([image])
            return tuple(found[name] for name in _OUTPUTS[:3])
        # The model's own forward, but for the pasting.
        images, _ = model.transform([image])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        (found,), _ = model.roi_heads(features, proposals, images.image_sizes)
        masks = found.pop("masks")
        (found,) = model.transform.postprocess([found], images.image_sizes, [size])
        return (*(found[name] for name in _OUTPUTS[:3]), paste(masks, found["boxes"], size))


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's ``paste_masks_in_image`` without a loop: bilinear scaling is a product with hat functions.

    Args:
        masks: (n, 1, m, m) probabilities in their boxes.
        boxes: (n, 4), x1 y1 x2 y2.
        size: (height, width) of the image.

    Returns:
        (n, 1, height, width)
    """
    masks = nn.functional.pad(masks[:, 0], (1, 1, 1, 1))
    side = masks.shape[-1]
    centre, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * (side / (side - 2))
    # Whole pixels, cut towards zero, from the first to the last.
    first, last = (corner.to(torch.int64).to(boxes.dtype) for corner in (centre - half, centre + half))
    across, down = (_hats(first[:, axis], last[:, axis], size[1 - axis], side) for axis in (0, 1))
    return (down @ masks @ across.transpose(1, 2))[:, None]


def _hats(first: Tensor, last: Tensor, length: int, side: int) -> Tensor:
    """(n, length, side): weight of each of ``side`` samples in each pixel; none before ``first``, after ``last``."""
    pixels = torch.arange(length, dtype=first.dtype, device=first.device) - first[:, None]
    count = (last - first + 1).clamp(min=1)[:, None]
    places = ((pixels + 0.5) * (side / count) - 0.5).clamp(0, side - 1)
    samples = torch.arange(side, dtype=first.dtype, device=first.device)
    weights = (1 - (places[:, :, None] - samples).abs()).clamp(min=0)
    return weights * ((pixels >= 0) & (pixels < count))[:, :, None]


def _is_one_stage(model: Detector) -> bool:
    return model.kind in ("retinanet", "fcos")


def _last_stage(model: Detector) -> Any:
    """What holds ``score_thresh``."""
    if _is_one_stage(model):
        return model
    return model.roi_heads.stages[-1] if model.kind.startswith("cascade") else model.roi_heads


@contextmanager
def _batched_nms_of_any_number() -> Iterator[None]:
    """Inside, torchvision's detectors do batched NMS the way they take for few boxes, however many there are."""

    def shifted(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        beyond = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1  # zero: there may be no box
        return nms(boxes + (idxs.to(boxes) * beyond)[:, None], scores, iou_threshold)

    before = box_operations.batched_nms
    box_operations.batched_nms = shifted
    try:
        yield
    finally:
        box_operations.batched_nms = before


def _set_default(graph: Any, name: str, value: float) -> None:
    """Make an input of a graph one that may be left out."""
    import onnx_ir

    (chosen,) = (one for one in graph.inputs if one.name == name)
    chosen.const_value = onnx_ir.tensor(torch.tensor(value).numpy(), name=name)
    graph.register_initializer(chosen)


def _images(model: Detector, preprocessing: Preprocessing) -> list[Tensor]:
    """Seeded uint8 images (3, H, W): noise, and two of soft blobs."""
    height, width = preprocessing.size
    coarse = replace(preprocessing, size=(-(-height // _BLOBS), -(-width // _BLOBS)))
    blobs = nn.functional.interpolate(probe(model, coarse, raw=True).float(), size=(height, width), mode="bilinear")
    return [*probe(model, preprocessing, 1, raw=True), *blobs.round().to(torch.uint8)]


def _compare(graph: _OneImage, path: Path, images: list[Tensor], difference: Difference) -> None:
    """Raise :class:`RefoldError` if the file does not run, or finds other objects than the model, or neither any.

    A threshold only leaves out the last objects of the list: NMS goes by score. So the model runs with none, and the
    file with one just under the lowest score found, which spares it the boxes that are cut anyway.
    """
    shared, alone, holder = 0, 0, _last_stage(graph.model)
    for pixels in images:
        threshold, holder.score_thresh = holder.score_thresh, 0.0
        try:
            with torch.no_grad():
                (found,) = graph.model([pixels.float() / 255])
        finally:
            holder.score_thresh = threshold
        expected = {name: value.cpu() for name, value in found.items()}
        lowest = 0.999 * float(expected["scores"].min()) if len(expected["scores"]) else 0.0
        feeds = {"image": graph.input_of(pixels).cpu().numpy(), "score_threshold": torch.tensor(lowest).numpy()}
        outputs = [torch.from_numpy(value) for value in run_file(path, feeds, difference.where, _REMEDY)]
        counts = compare_objects(dict(zip(_OUTPUTS, outputs, strict=False)), expected, difference)
        shared, alone = shared + counts[0], alone + counts[1]
    if not shared + alone:
        reason = "the model finds no object at any score, so that nothing can be compared"
        raise RefoldError(reason, where=difference.where, remedy="Train it, or export it with check=False")
    if alone > _ALONE * (shared + alone):
        raise RefoldError(
            f"{alone} of {shared + alone} objects are found by the model or by onnxruntime alone, or differ",
            where=difference.where,
            remedy=f"Nothing was written. {_REMEDY}",
        )


def compare_objects(found: dict[str, Tensor], expected: dict[str, Tensor], difference: Difference) -> tuple[int, int]:
    """Add the differences of the objects that are on both sides.

    An object is on the other side if one of its class is there whose box and score, and of the mask kinds whose mask
    on average, are within the tolerance of the largest value.

    Returns:
        how many of both sides' objects have such a partner, and how many have none.
    """
    if not len(found["scores"]) and not len(expected["scores"]):
        return 0, 0
    gaps = {
        "boxes": (expected["boxes"][:, None] - found["boxes"][None]).abs().amax(dim=-1),
        "scores": (expected["scores"][:, None] - found["scores"][None]).abs(),
    }
    largest = {name: torch.cat([expected[name].flatten(), torch.full((1,), _LEAST)]).amax() for name in gaps}
    relative = torch.stack([gap / largest[name] for name, gap in gaps.items()]).amax(dim=0)
    same = (relative <= difference.tolerance) & (expected["labels"][:, None] == found["labels"][None])
    if "masks" in expected:
        for row, column in same.nonzero().tolist():
            ours, theirs = found["masks"][column], expected["masks"][row]
            same[row, column] = bool((ours - theirs).abs().sum() <= _ALONE * theirs.sum().clamp(min=1))
    partners = torch.cat([same.any(dim=1), same.any(dim=0)])
    if same.any():
        rows = same.any(dim=1).nonzero().flatten()
        columns = relative.masked_fill(~same, torch.inf)[rows].argmin(dim=1)  # the nearest partner
        difference.max_rel = max(difference.max_rel, float(relative[rows, columns].max()))
        difference.max_abs = max(difference.max_abs, *(float(gap[rows, columns].max()) for gap in gaps.values()))
    return int(partners.sum()), int((~partners).sum())
