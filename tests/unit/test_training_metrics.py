"""Metrics against values worked out by hand, tasks, and mixing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refold.errors import DataError
from refold.training import Recipe
from refold.training.metrics import classification_metrics, confusion_matrix, multilabel_metrics, regression_metrics
from refold.training.mixing import make_mixer
from refold.training.tasks import Regression, make_task

# Five samples of three classes, of which class 2 never occurs but is predicted once.
SCORES = torch.tensor(
    [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3], [0.5, 0.4, 0.1]]
)  # fmt: skip
TARGETS = torch.tensor([0, 0, 0, 1, 1])


def test_classification_metrics_by_hand() -> None:
    result = classification_metrics(SCORES, TARGETS)
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    # F1: class 0 has 2 hits of 3 true and 3 predicted, class 1 has 1 of 2 and 1, class 2 has none of 0 and 1.
    assert result["f1"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    # Class 0 scores .7 .6 .1 against .2 .5: 4 of 6 pairs in order. Class 1: .5 .4 against .2 .3 .2: all 6.
    assert result["auroc"] == pytest.approx((4 / 6 + 1) / 2)


def test_binary_auroc_is_that_of_the_second_class() -> None:
    second = torch.tensor([0.1, 0.4, 0.35, 0.8])
    result = classification_metrics(torch.stack([1 - second, second], dim=1), torch.tensor([0, 0, 1, 1]))
    assert result["auroc"] == pytest.approx(3 / 4)


def test_auroc_is_left_out_where_one_class_is_all_there_is() -> None:
    result = classification_metrics(torch.tensor([[0.4, 0.6]]), torch.tensor([1]))
    assert result == {"accuracy": 1.0, "balanced_accuracy": 1.0, "f1": 1.0}


def test_multilabel_metrics_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.2, 0.6], [0.8, 0.7, 0.1], [0.3, 0.6, 0.2]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    result = multilabel_metrics(scores, targets)
    # Average precision of label 0: hits at ranks 1 and 3 -> (1/1 + 2/3) / 2; of label 1: 1; label 2 has none.
    assert result["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    # F1 of label 0: 1 hit, 2 true, 2 predicted; of label 1: 2, 2, 2; of label 2: 0 hits, 1 predicted.
    assert result["f1"] == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert result["auroc"] == pytest.approx((1 / 2 + 1) / 2)


def test_regression_metrics_by_hand() -> None:
    result = regression_metrics(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 3.0, 3.0]))
    assert result["mae"] == pytest.approx(1.0)
    assert result["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert result["r2"] == pytest.approx(1 - 5 / (8 / 3))
    assert "r2" not in regression_metrics(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))


def test_confusion_matrix_and_table_agree() -> None:
    task = make_task("classify", ["a", "b", "c"], TARGETS, Recipe())
    details = task.details(SCORES, TARGETS)
    assert details["confusion"] == [[2, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert confusion_matrix(TARGETS, TARGETS, 3) == [[3, 0, 0], [0, 2, 0], [0, 0, 0]]
    first, second, third = details["per_class"]
    assert (first["class"], first["support"], first["precision"]) == ("a", 3, pytest.approx(2 / 3))
    assert (second["recall"], second["f1"]) == (pytest.approx(1 / 2), pytest.approx(2 / 3))
    assert third == {"class": "c", "support": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_balanced_class_weights_and_smoothing_enter_the_training_loss_alone() -> None:
    targets = torch.tensor([0, 0, 0, 1])
    task = make_task("classify", ["a", "b"], targets, Recipe(class_weights="balanced", label_smoothing=0.2))
    logits = torch.randn(4, 2)
    log = logits.log_softmax(dim=1)
    weights = torch.tensor([4 / (2 * 3), 4 / (2 * 1)])
    soft = F.one_hot(targets, 2) * 0.8 + 0.1
    expected = -(soft * log * weights).sum() / weights[targets].sum()
    torch.testing.assert_close(task.training_loss(logits, targets), expected)
    torch.testing.assert_close(task.loss(logits, targets), -log.gather(1, targets[:, None]).mean())


def test_multilabel_weights_and_smoothing() -> None:
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    task = make_task("multilabel", ["a", "b"], targets, Recipe(class_weights="balanced", label_smoothing=0.1))
    logits = torch.randn(4, 2)
    p, soft = logits.sigmoid(), targets * 0.9 + 0.05
    expected = -(torch.tensor([1.0, 3.0]) * soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    torch.testing.assert_close(task.training_loss(logits, targets), expected)
    assert task.labels(torch.tensor([[0.9, 0.1], [0.6, 0.7]])) == [["a"], ["a", "b"]]


def test_regression_folds_its_unit_into_the_head() -> None:
    targets = torch.tensor([10.0, 20.0, 60.0])
    task = make_task("regress", None, targets, Recipe())
    assert isinstance(task, Regression)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    inputs = torch.randn(5, 4)
    expected = task.scores(model(inputs))
    task.finish(model, ("2",))
    torch.testing.assert_close(model(inputs)[:, 0], expected)
    standardised = (targets - 30.0) / targets.std(correction=0)
    torch.testing.assert_close(task.training_loss(standardised[:, None], targets), torch.tensor(0.0))
    with pytest.raises(DataError, match="one output and a bias"):
        task.finish(nn.Sequential(nn.Linear(4, 1, bias=False)), ("0",))


@pytest.mark.parametrize(
    ("kind", "classes", "targets", "recipe", "where"),
    [
        ("regress", None, torch.ones(3), Recipe(), "target"),
        ("regress", None, torch.rand(3), Recipe(mixup=0.1), "mixup"),
        ("regress", None, torch.rand(3), Recipe(class_weights="balanced"), "class_weights"),
        ("regress", None, torch.rand(3), Recipe(label_smoothing=0.1), "label_smoothing"),
        ("classify", ["a"], torch.zeros(3, dtype=torch.long), Recipe(), "classes"),
        ("multilabel", [], torch.zeros(3, 0), Recipe(), "classes"),
        ("segment", ["a", "b"], torch.zeros(3, dtype=torch.long), Recipe(), "task"),
    ],
)
def test_tasks_that_make_no_sense(kind, classes, targets, recipe, where) -> None:
    with pytest.raises(DataError) as caught:
        make_task(kind, classes, targets, recipe)
    assert caught.value.where == where


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_keeps_images_and_targets_together(settings: dict[str, float]) -> None:
    """Images of one colour each: what the target says is what the pixels say."""
    mixer = make_mixer(Recipe(**settings), classes=4)
    assert mixer is not None
    targets = torch.arange(4)
    images = F.one_hot(targets, 4).float()[:, :, None, None].expand(4, 4, 32, 32)
    torch.manual_seed(0)
    mixed, soft = mixer(images, targets)
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), soft)
    assert not torch.equal(soft, F.one_hot(targets, 4).float())
    torch.manual_seed(0)
    again, _ = mixer(images, targets)
    assert torch.equal(mixed, again)


def test_no_mixing_by_default() -> None:
    assert make_mixer(Recipe(), classes=3) is None
