"""Scores from a confusion matrix: by hand, and against torchmetrics."""

from __future__ import annotations

import pytest
import torch

from refold.errors import DataError
from refold.segmentation import PixelConfusion

CLASSES = ["road", "sky", "car", "dog"]


def test_by_hand() -> None:
    #  truth      prediction
    #  0 0 1 1    0 1 1 1      road: 2 true, 1 hit, 1 called -> union 2; sky: 2 true, 2 hits, 3 called -> union 3
    #  2 2 2 -    0 2 2 3      car: 3 true, 2 hits, 2 called -> union 3; road is also called on a car: union 3
    masks = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 255]])
    predictions = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 3]])
    confusion = PixelConfusion(CLASSES)
    confusion.update(predictions, masks)
    scores = confusion.metrics()
    # dog is predicted under an unlabelled pixel only, so it occurs nowhere and does not count.
    assert scores["miou"] == pytest.approx((1 / 3 + 2 / 3 + 2 / 3) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(5 / 7)
    assert scores["mean_accuracy"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)
    rows = confusion.per_class()
    assert [row["class"] for row in rows] == CLASSES
    assert [row["pixels"] for row in rows] == [2, 2, 3, 0]
    assert [row["iou"] for row in rows] == [pytest.approx(1 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), None]
    assert [row["accuracy"] for row in rows] == [pytest.approx(1 / 2), 1.0, pytest.approx(2 / 3), None]
    assert confusion.counts.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    confusion = PixelConfusion(CLASSES)
    confusion.update(torch.tensor([0, 3]), torch.tensor([0, 0]))
    scores = confusion.metrics()
    assert scores["miou"] == pytest.approx((1 / 2 + 0) / 2)
    assert scores["mean_accuracy"] == pytest.approx(1 / 2)
    assert confusion.per_class()[3] == {"class": "dog", "pixels": 0, "iou": 0.0, "accuracy": None}


def test_batches_equal_torchmetrics_on_the_whole() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

    masks = torch.randint(0, 4, (6, 9, 7))
    predictions = torch.where(torch.rand(6, 9, 7) < 0.6, masks, torch.randint(0, 4, (6, 9, 7)))
    masks[torch.rand(6, 9, 7) < 0.2] = 255
    confusion = PixelConfusion(CLASSES)
    for part in range(3):
        confusion.update(predictions[2 * part : 2 * part + 2], masks[2 * part : 2 * part + 2])
    scores = confusion.metrics()
    ious = multiclass_jaccard_index(predictions, masks, num_classes=4, average="none", ignore_index=255)
    kept = masks != 255
    assert scores["miou"] == pytest.approx(float(ious.mean()), abs=1e-6)
    torch.testing.assert_close(torch.tensor([row["iou"] for row in confusion.per_class()]), ious)
    for name, average in (("pixel_accuracy", "micro"), ("mean_accuracy", "macro")):
        expected = multiclass_accuracy(predictions[kept], masks[kept], num_classes=4, average=average)
        assert scores[name] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("predictions", "masks", "complaint"),
    [
        ([0, 1], [0, 4], "a mask holds an index beyond the 4 classes"),
        ([0, 4], [0, 1], "a prediction holds an index beyond the 4 classes"),
        ([0, 1, 2], [0, 1], r"predictions of shape \(3,\) and masks of \(2,\)"),
    ],
)
def test_nonsense_is_refused(predictions: list[int], masks: list[int], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        PixelConfusion(CLASSES).update(torch.tensor(predictions), torch.tensor(masks))


def test_nothing_labelled_has_no_score() -> None:
    confusion = PixelConfusion(CLASSES)
    confusion.update(torch.zeros(2, 2, dtype=torch.long), torch.full((2, 2), 255))
    with pytest.raises(DataError, match="no labelled pixel"):
        confusion.metrics()
