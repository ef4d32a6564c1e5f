"""COCO's AP against numbers worked out by hand, and the rules for crowds, sizes and absent classes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from refold.detection import BoxSet, Object, average_precision, to_results, write_results
from refold.detection.masks import decode_masks, encode_mask, parse_segmentation
from refold.errors import DataError, MissingExtraError

ROWS, COLUMNS = 200, 300


def thing(x1: float, y1: float, x2: float, y2: float, label: int = 1, crowd: bool = False) -> Object:
    rle = parse_segmentation([[x1, y1, x2, y1, x2, y2, x1, y2]], ROWS, COLUMNS)
    return Object((x1, y1, x2, y2), label, crowd, (x2 - x1) * (y2 - y1), rle)


def box_set(*images: list[Object], classes: tuple[str, ...] = ("a", "b")) -> BoxSet:
    count = len(images)
    return BoxSet(
        [f"{k}.jpg" for k in range(count)],
        [(ROWS, COLUMNS)] * count,
        images,
        classes=classes,
        category_ids=[30, 10, 20][: len(classes)],
        image_ids=[100 - k for k in range(count)],
    )


def prediction(*found: tuple[tuple[float, float, float, float], int, float]) -> dict[str, Tensor]:
    masks = torch.zeros(len(found), 1, ROWS, COLUMNS)
    for mask, ((x1, y1, x2, y2), _, _) in zip(masks, found, strict=True):
        mask[0, int(y1) : int(y2), int(x1) : int(x2)] = 0.9
    return {
        "boxes": torch.tensor([box for box, _, _ in found]).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in found], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in found]),
        "masks": masks,
    }


def perfect(some: list[Object]) -> dict[str, Tensor]:
    return prediction(*((one.box, one.label, 0.5) for one in some if not one.ignored))


SCENES = ([thing(10, 10, 30, 30), thing(50, 50, 130, 110, 2)], [thing(5, 5, 150, 150, 2)], [])


@pytest.mark.parametrize("measured", ["bbox", "segm"])
def test_perfect_predictions_score_one(measured) -> None:
    truth = box_set(*SCENES, classes=("a", "b", "never"))
    rows = to_results([perfect(some) for some in SCENES], [0, 1, 2], truth)
    found = average_precision(truth, rows, measured)
    names = {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}
    assert found.metrics == dict.fromkeys(names, 1.0)
    assert found.per_class == [
        {"class": "a", "support": 1, "ap": 1.0, "ap50": 1.0},
        {"class": "b", "support": 2, "ap": 1.0, "ap50": 1.0},
        {"class": "never", "support": 0},
    ]


def test_ap_by_hand() -> None:
    """Four objects; by falling score a hit of overlap 1, a miss, a hit of overlap 0.8, a miss; two not found.

    Precision after each: 1, 1/2, 2/3, 1/2; recall 1/4, 1/4, 2/4, 2/4. The envelope is 1 for the 26 recalls 0 to 0.25,
    2/3 for the 25 recalls 0.26 to 0.5, 0 for the other 50. Above an overlap of 0.8 only the first hit is left.
    """
    objects = [thing(20 * k, 0, 20 * k + 10, 10) for k in range(4)]
    truth = box_set(objects, classes=("a",))
    found = prediction(
        ((0, 0, 10, 10), 1, 0.9),
        ((200, 100, 210, 110), 1, 0.8),
        ((20, 0, 30, 8), 1, 0.7),  # 8 of 10 rows
        ((220, 100, 230, 110), 1, 0.6),
    )
    result = average_precision(truth, to_results([found], [0], truth))
    both, one = (26 * 1 + 25 * 2 / 3) / 101, 26 / 101
    assert result.metrics["ap50"] == pytest.approx(both)
    assert result.metrics["ap75"] == pytest.approx(both)
    assert result.metrics["ap"] == pytest.approx((7 * both + 3 * one) / 10)  # 0.5 to 0.8, and 0.85 to 0.95
    assert result.metrics["ap_small"] == result.metrics["ap"]
    assert "ap_large" not in result.metrics
    assert result.per_class[0]["ap"] == pytest.approx(result.metrics["ap"])


def test_a_better_scored_error_costs_precision_and_a_second_hit_is_an_error() -> None:
    truth = box_set([thing(0, 0, 50, 50)], classes=("a",))
    box = (0.0, 0.0, 50.0, 50.0)
    error_first = prediction(((100, 100, 150, 150), 1, 0.9), (box, 1, 0.8))
    assert average_precision(truth, to_results([error_first], [0], truth)).metrics["ap"] == pytest.approx(0.5)
    twice = prediction((box, 1, 0.9), (box, 1, 0.8))
    assert average_precision(truth, to_results([twice], [0], truth)).metrics["ap"] == pytest.approx(1.0)
    two = box_set([thing(0, 0, 50, 50), thing(200, 100, 250, 150)], classes=("a",))
    found = prediction((box, 1, 0.9), (box, 1, 0.8), ((200, 100, 250, 150), 1, 0.7))
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert average_precision(two, to_results([found], [0], two)).metrics["ap"] == pytest.approx(expected)


@pytest.mark.parametrize("measured", ["bbox", "segm"])
def test_crowds_are_neither_missed_nor_errors(measured) -> None:
    objects = [thing(0, 0, 40, 40), thing(100, 0, 250, 150, crowd=True)]
    truth = box_set(objects, classes=("a",))
    inside = [((110, 10, 130, 30), 1, 0.95), ((150, 50, 180, 80), 1, 0.94)]  # small against the crowd, wholly in it
    found = prediction(*inside, ((0, 0, 40, 40), 1, 0.5))
    result = average_precision(truth, to_results([found], [0], truth), measured)
    assert result.metrics["ap"] == pytest.approx(1.0)
    assert result.per_class[0]["support"] == 1
    elsewhere = prediction(((10, 100, 30, 120), 1, 0.95), ((0, 0, 40, 40), 1, 0.5))
    assert average_precision(truth, to_results([elsewhere], [0], truth), measured).metrics["ap"] == pytest.approx(0.5)


def test_boxes_and_masks_are_measured_apart() -> None:
    truth = box_set([thing(0, 0, 40, 40)], classes=("a",))
    found = prediction(((0, 0, 40, 40), 1, 0.9))
    found["masks"][0, 0, 24:] = 0  # the mask covers 24 of 40 rows: overlap 0.6
    rows = to_results([found], [0], truth)
    assert average_precision(truth, rows, "bbox").metrics["ap"] == pytest.approx(1.0)
    masks = average_precision(truth, rows, "segm").metrics
    assert (masks["ap50"], masks["ap75"], masks["ap"]) == (pytest.approx(1.0), 0.0, pytest.approx(0.3))


def test_a_large_box_around_a_small_mask_is_a_small_object() -> None:
    """Given its box, COCO's code would take an unmatched detection for a medium one."""
    truth = box_set([thing(0, 0, 40, 40)], classes=("a",))
    found = prediction(((0, 0, 40, 40), 1, 0.5), ((100, 100, 160, 160), 1, 0.9))
    found["masks"][1, 0] = 0
    found["masks"][1, 0, 100:110, 100:110] = 1
    metrics = average_precision(truth, to_results([found], [0], truth), "segm").metrics
    assert metrics["ap_medium"] == pytest.approx(1.0)  # the error is small, so no error among the medium
    assert metrics["ap"] == pytest.approx(0.5)


def test_nothing_found_scores_zero() -> None:
    truth = box_set(*SCENES)
    assert average_precision(truth, []).metrics["ap"] == 0.0
    assert to_results([prediction()], [2], truth) == []


def test_results_file_has_cocos_fields_and_ids(tmp_path: Path) -> None:
    truth = box_set(*SCENES)
    rows = to_results([perfect(SCENES[1])], [1], truth)
    write_results(rows, tmp_path / "results.json")
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["image_id"] == 99
    assert row["category_id"] == 10
    assert row["bbox"] == [5.0, 5.0, 145.0, 145.0]
    assert row["score"] == 0.5
    assert row["segmentation"]["size"] == [ROWS, COLUMNS]
    mask = decode_masks([parse_segmentation(row["segmentation"], ROWS, COLUMNS)], ROWS, COLUMNS)[0]
    assert int(mask.sum()) == 145 * 145
    assert mask[5:150, 5:150].all()
    assert average_precision(truth, json.loads((tmp_path / "results.json").read_text())).metrics["ap50"] < 1.0


def test_masks_survive_encoding() -> None:
    mask = torch.from_numpy(np.random.default_rng(0).random((37, 53)) < 0.4)
    rle = encode_mask(mask)
    assert torch.equal(decode_masks([parse_segmentation(rle, 37, 53)], 37, 53)[0].bool(), mask)


def test_refusals() -> None:
    truth = box_set(*SCENES)
    with pytest.raises(DataError, match="labels 0 to 0 of 2 classes"):
        to_results([prediction(((0, 0, 9, 9), 0, 0.5))], [0], truth)
    rows = to_results([perfect(SCENES[1])], [1], truth)
    with pytest.raises(DataError, match="image_id 5 is none"):
        average_precision(truth, [{**rows[0], "image_id": 5}])
    with pytest.raises(DataError, match="a detection has no mask"):
        average_precision(truth, [{k: v for k, v in rows[0].items() if k != "segmentation"}], "segm")
    bare = box_set([thing(0, 0, 9, 9)._replace(rle=None)], classes=("a",))
    with pytest.raises(DataError, match="have no masks"):
        average_precision(bare, [], "segm")


def test_a_missing_extra_is_named(monkeypatch) -> None:
    for name in ("faster_coco_eval", "faster_coco_eval.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'refold\[dense\]'"):
        average_precision(BoxSet(["a"], [(9, 9)], [[]], classes=["x"]), [])
    with pytest.raises(MissingExtraError, match=r"pip install 'refold\[dense\]'"):
        parse_segmentation([[0, 0, 5, 0, 5, 5]], 9, 9)
