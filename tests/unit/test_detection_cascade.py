"""The cascade against formulas written out here: assignment, codes, losses, averaged scores, refinement."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from refold.dense import load_encoder
from refold.detection import build_detector
from refold.detection.cascade import refine


@pytest.fixture
def model():
    torch.manual_seed(0)
    loaded = load_encoder("timm/test_convnext", pretrained=False)
    options = {"min_size": 64, "max_size": 64, "channels": 16, "hidden": 16, "rois": 512, "score_threshold": 0.0}
    return build_detector("cascade_mask_rcnn", loaded.encoder, 2, preprocessing=loaded.preprocessing, **options)


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return shared / (sum(areas) - shared)


def code(box: list[float], truth: list[float], weights: tuple[float, ...]) -> list[float]:
    """R-CNN's code of ``truth`` seen from ``box``."""
    w, h = box[2] - box[0], box[3] - box[1]
    tw, th = truth[2] - truth[0], truth[3] - truth[1]
    shift = [(truth[0] + tw / 2 - box[0] - w / 2) / w, (truth[1] + th / 2 - box[1] - h / 2) / h]
    return [weight * v for weight, v in zip(weights, [*shift, math.log(tw / w), math.log(th / h)], strict=True)]


TRUTH = [10.0, 10.0, 40.0, 40.0]
# Shifted to the right by 8, 6 and 4 of 30 pixels: overlaps of 0.58, 0.67 and 0.76.
SHIFTED = [[10.0 + s, 10.0, 40.0 + s, 40.0] for s in (8, 6, 4)]
FAR = [44.0, 44.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("stage", "least", "weights"),
    [(0, 0.5, (10, 10, 5, 5)), (1, 0.6, (20, 20, 10, 10)), (2, 0.7, (30, 30, 15, 15))],
)
def test_each_stage_assigns_by_its_own_overlap_and_codes_by_its_own_weights(model, stage, least, weights) -> None:
    targets = [{"boxes": torch.tensor([TRUTH]), "labels": torch.tensor([2]), "masks": torch.zeros(1, 64, 64)}]
    given = [*SHIFTED, FAR]
    boxes, _, labels, codes = model.roi_heads.stages[stage].select_training_samples([torch.tensor(given)], targets)
    assert boxes[0].tolist() == [*given, TRUTH]  # the true box is added; fewer than 512: all are sampled
    expected = [2 if overlap(box, TRUTH) >= least else 0 for box in given]
    assert labels[0].tolist() == [*expected, 2]
    assert sum(bool(label) for label in expected) == 3 - stage  # the three stages do differ here
    for box, label, found in zip(boxes[0].tolist(), labels[0], codes[0].tolist(), strict=True):
        if label:
            assert found == pytest.approx(code(box, TRUTH, weights), abs=1e-4)


class _Fixed(nn.Module):
    """A stand-in for box head and predictor: given logits and deltas, and a note of what was asked."""

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.logits, self.deltas = nn.Parameter(logits), nn.Parameter(deltas)
        self.boxes: list[Tensor] = []

    def pool(self, features, boxes, sizes) -> Tensor:
        self.boxes = [b.clone() for b in boxes]
        return torch.cat(boxes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(x), -1), self.deltas.expand(len(x), -1)


def stub(model, logits: list[list[float]], deltas: list[list[float]]) -> list[_Fixed]:
    stubs = []
    for stage, row, delta in zip(model.roi_heads.stages, logits, deltas, strict=True):
        fixed = _Fixed(torch.tensor([row]), torch.tensor([delta]))
        stage.box_roi_pool = _Call(fixed.pool)
        stage.box_head, stage.box_predictor = nn.Identity(), fixed
        stage.mask_roi_pool = None
        stubs.append(fixed)
    return stubs


class _Call(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self._function = function

    def forward(self, *arguments):
        return self._function(*arguments)


def test_test_time_refines_from_stage_to_stage_and_averages_probabilities(model) -> None:
    logits = [[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [0.5, -1.0, 0.0]]
    stubs = stub(model, logits, [[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 15 * math.log(0.5)]])
    heads = model.roi_heads.eval()
    start = torch.tensor([[10.0, 10.0, 30.0, 50.0]])
    (found,), losses = heads({}, [start], [(64, 64)])
    assert losses == {}
    # Stage 1 moves by 1/10 of the width 20; stage 2 by 2/20 of the height 40; stage 3 halves the height.
    first, second, last = [12.0, 10, 32, 50], [12.0, 14, 32, 54], [12.0, 24, 32, 44]
    assert stubs[0].boxes[0].tolist() == start.tolist()
    torch.testing.assert_close(stubs[1].boxes[0], torch.tensor([first]))
    torch.testing.assert_close(stubs[2].boxes[0], torch.tensor([second]))
    torch.testing.assert_close(found["boxes"], torch.tensor([last, last]))
    probabilities = [[math.exp(v) / sum(math.exp(u) for u in row) for v in row] for row in logits]
    mean = [sum(column) / 3 for column in zip(*probabilities, strict=True)]
    assert found["labels"].tolist() == [2, 1]
    assert found["scores"].tolist() == pytest.approx([mean[2], mean[1]], abs=1e-6)


def test_losses_are_weighted_by_stage_and_count_as_published(model) -> None:
    logits, deltas = [[0.3, -0.2, 1.0]] * 3, [[0.0, 0.0, 0.0, 0.0]] * 3
    stubs = stub(model, logits, deltas)
    heads = model.roi_heads.train()
    targets = [{"boxes": torch.tensor([TRUTH]), "labels": torch.tensor([2])}]
    given = [*SHIFTED, FAR]
    found, losses = heads({}, [torch.tensor(given)], [(64, 64)], targets)
    assert found == []
    entropy = {label: math.log(sum(math.exp(v) for v in logits[0])) - logits[0][label] for label in (0, 2)}
    settings = [(0.5, (10, 10, 5, 5), 1.0), (0.6, (20, 20, 10, 10), 0.5), (0.7, (30, 30, 15, 15), 0.25)]
    for k, (least, weights, share) in enumerate(settings):
        # Nothing is refined (zero deltas), so that each stage sees the given boxes and the true one, added anew.
        boxes = [*given, TRUTH]
        assert sorted(stubs[k].boxes[0].tolist()) == sorted(boxes)
        objects = [box for box in boxes if overlap(box, TRUTH) >= least]
        classify = (len(objects) * entropy[2] + (len(boxes) - len(objects)) * entropy[0]) / len(boxes)
        errors = [abs(v) for box in objects for v in code(box, TRUTH, weights)]
        regress = sum(e - 1 / 18 if e > 1 / 9 else 4.5 * e * e for e in errors) / len(boxes)
        assert float(losses[f"loss_classifier_{k}"].detach()) == pytest.approx(share * classify, rel=1e-4)
        assert float(losses[f"loss_box_reg_{k}"].detach()) == pytest.approx(share * regress, rel=1e-4)
    assert set(losses) == {f"loss_{what}_{k}" for k in range(3) for what in ("classifier", "box_reg")}


def test_boxes_refined_to_nothing_are_dropped_in_training_and_harmless_at_test(model) -> None:
    away = [1000.0, 0.0, 0.0, 0.0]  # a hundred widths to the right: no area is left after clipping
    stubs = stub(model, [[0.0, 0.0, 0.0]] * 3, [away] * 3)
    heads = model.roi_heads
    proposals = [torch.tensor([*SHIFTED, FAR]), torch.tensor([FAR])]
    targets = [
        {"boxes": torch.tensor([TRUTH]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    _, losses = heads.train()({}, list(proposals), [(64, 64)] * 2, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert stubs[1].boxes[0].tolist() == [TRUTH]  # the true box alone
    assert stubs[1].boxes[1].tolist() == []
    found, _ = heads.eval()({}, list(proposals), [(64, 64)] * 2)
    assert [len(one["boxes"]) for one in found] == [0, 0]
    assert [len(boxes) for boxes in stubs[2].boxes] == [4, 1]  # every box reaches every stage


def test_refinement_passes_no_gradient_to_the_stage_before(model) -> None:
    stubs = stub(model, [[0.0, 0.0, 0.0]] * 3, [[0.5, 0.0, 0.0, 0.0]] * 3)
    refined = refine(model.roi_heads.stages[0], stubs[0].deltas.expand(2, -1), [torch.tensor(SHIFTED[:2])], [(64, 64)])
    assert not refined[0].requires_grad


def test_masks_are_the_mean_of_the_three_heads_on_the_final_boxes(model) -> None:
    stub(model, [[0.0, 0.0, 4.0]] * 3, [[0.0, 0.0, 0.0, 0.0]] * 3)
    seen = []
    values = (-1.0, 0.0, 2.0)
    for stage, value in zip(model.roi_heads.stages, values, strict=True):
        stage.mask_roi_pool = _Call(lambda features, boxes, sizes: seen.append(boxes) or torch.cat(boxes))
        stage.mask_head = nn.Identity()
        stage.mask_predictor = _Call(lambda x, value=value: torch.full((len(x), 3, 28, 28), value))
    heads = model.roi_heads.eval()
    for stage in heads.stages:
        stage.score_thresh = 0.1
    (found,), _ = heads({}, [torch.tensor([[10.0, 10.0, 30.0, 50.0]])], [(64, 64)])
    expected = sum(1 / (1 + math.exp(-v)) for v in values) / 3
    torch.testing.assert_close(found["masks"], torch.full((1, 1, 28, 28), expected))
    assert all(boxes[0].tolist() == found["boxes"].tolist() for boxes in seen)


def test_mask_losses_are_those_of_each_stages_objects_weighted(model) -> None:
    stub(model, [[0.0, 0.0, 4.0]] * 3, [[0.0, 0.0, 0.0, 0.0]] * 3)
    seen, values = [], (-1.0, 0.0, 2.0)
    for stage, value in zip(model.roi_heads.stages, values, strict=True):
        stage.mask_roi_pool = _Call(lambda features, boxes, sizes: seen.append(boxes[0]) or torch.cat(boxes))
        stage.mask_head = nn.Identity()
        stage.mask_predictor = _Call(lambda x, value=value: torch.full((len(x), 3, 28, 28), value))
    masks = torch.ones(1, 64, 64, dtype=torch.uint8)  # wherever a box lies, all of it is mask
    targets = [{"boxes": torch.tensor([TRUTH]), "labels": torch.tensor([2]), "masks": masks}]
    _, losses = model.roi_heads.train()({}, [torch.tensor([*SHIFTED, FAR])], [(64, 64)], targets)
    assert [len(boxes) for boxes in seen] == [4, 3, 2]  # objects at 0.5, 0.6, 0.7, the true box among them
    for k, (value, share) in enumerate(zip(values, (1.0, 0.5, 0.25), strict=True)):
        assert float(losses[f"loss_mask_{k}"]) == pytest.approx(share * math.log(1 + math.exp(-value)), rel=1e-5)
