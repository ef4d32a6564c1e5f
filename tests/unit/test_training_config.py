"""Recipe and TrainConfig: checks that name the field, JSON round trip, schedule."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import refold
from refold.errors import DataError
from refold.training import Recipe, TrainConfig
from refold.training.schedule import build_optimizer, build_schedule


def config(**changes: Any) -> TrainConfig:
    settings = {"data": "d", "model": "timm/test_vit", "method": refold.RepAdapter(rank=4), "output": "o"}
    return TrainConfig(**(settings | changes))


@pytest.mark.parametrize(("task", "size"), [(None, 64), ("segment", 16), ("detect", 2), ("instance", 2)])
def test_a_batch_is_as_large_as_the_task_allows_unless_told(task, size):
    assert config(task=task).batch_size == size
    assert config(task=task, batch_size=5).batch_size == 5
    assert TrainConfig.from_json(config(task=task).to_json()).batch_size == size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("batch_size", True),
        ("optimizer", "lars"),
        ("optimizer", None),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", "1e-3"),
        ("head_lr", -1.0),
        ("weight_decay", -0.1),
        ("warmup_epochs", 100),
        ("warmup_lr", 1.0),
        ("min_lr", 1e-2),
        ("label_smoothing", 1.0),
        ("mixup", -1.0),
        ("cutmix", -1.0),
        ("augment", ""),
        ("class_weights", "inverse"),
        ("clip_grad", 0.0),
        ("consistency", -1.0),
        ("consistency_noise", -0.5),
        ("precision", "fp16"),
        ("attention", "flash"),
        ("select", 3),
        ("seed", -1),
        ("workers", -1),
        ("data", ""),
        ("model", 3),
        ("fractions", (0.5, 0.5)),
        ("fractions", (0.5, -0.5, 1.0)),
        ("fractions", (800.5, 200, 0)),
        ("fractions", ("a", 0, 0)),
        ("skip_bad_images", "yes"),
        ("in_chans", 0),
        ("image_size", 0.5),
        ("normalize", "zero"),
        ("crop", "random"),
        ("drop_path", 1.0),
        ("method", "RepAdapter"),
        ("evaluate_test", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(DataError) as caught:
        config(**{field: value})
    assert caught.value.where == field
    assert repr(value) in caught.value.reason


@pytest.mark.parametrize(
    ("settings", "field", "other"),
    [
        ({"consistency": 0.5}, "consistency_noise", "consistency"),
        ({"consistency_noise": 1.0}, "consistency", "consistency_noise"),
    ],
)
def test_consistency_needs_a_weight_and_a_noise(settings: dict[str, float], field: str, other: str) -> None:
    with pytest.raises(DataError, match=rf"{field}: must be positive beside {other}, not 0\.0"):
        Recipe(**settings)
    assert Recipe(consistency=0.5, consistency_noise=1.0).consistency == 0.5


def test_json_round_trip_keeps_every_field() -> None:
    original = config(
        method=refold.LoRA(rank=2, sites=("attention",)),
        fractions=(800, 200, 0.0),
        lr=3e-4,
        clip_grad=1.0,
        mixup=0.2,
        optimizer="sgd",
    )
    assert TrainConfig.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_configs_from_before_there_was_a_choice_are_of_adamw() -> None:
    data = config(optimizer="sgd").to_json()
    del data["optimizer"]
    assert TrainConfig.from_json(data).optimizer == "adamw"


def test_unknown_and_missing_settings_are_named() -> None:
    data = config().to_json()
    with pytest.raises(DataError, match="learning_rate"):
        TrainConfig.from_json({**data, "learning_rate": 1.0})
    with pytest.raises(DataError, match="learning_rate"):
        config().replace(learning_rate=1.0)
    del data["model"]
    with pytest.raises(DataError, match="model: is missing"):
        TrainConfig.from_json(data)


def test_a_folder_without_a_config_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match=r"config\.json"):
        TrainConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(DataError, match="holds no settings"):
        TrainConfig.load(tmp_path)


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(100, None, 150), (8, None, 12), (1, None, 2), (4, 1.5, 22)])
def test_warm_up_is_a_tenth_unless_set(epochs: int, warmup: float | None, steps: int) -> None:
    assert Recipe(epochs=epochs, warmup_epochs=warmup).warmup_steps(15) == steps


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_follows_its_formula(name: str) -> None:
    """Five steps in float64, two groups with rates and decays of their own."""
    torch.manual_seed(0)
    starts = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    settings = [{"lr": 0.1, "weight_decay": 0.02}, {"lr": 0.03, "weight_decay": 0.0}]
    trained = [start.clone().requires_grad_(True) for start in starts]
    optimizer = build_optimizer([{"params": [t], **s} for t, s in zip(trained, settings, strict=True)], name)
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(5)]
    for step in gradients:
        for tensor, gradient in zip(trained, step, strict=True):
            tensor.grad = gradient.clone()
        optimizer.step()
    for k, (start, group) in enumerate(zip(starts, settings, strict=True)):
        w, lr, decay = start.clone(), group["lr"], group["weight_decay"]
        momentum, square = torch.zeros_like(w), torch.zeros_like(w)
        for t, step in enumerate(gradients, start=1):
            if name == "sgd":
                momentum = 0.9 * momentum + step[k] + decay * w
                w = w - lr * momentum
            else:
                momentum, square = 0.9 * momentum + 0.1 * step[k], 0.999 * square + 0.001 * step[k] ** 2
                w = w - lr * decay * w
                w = w - lr * (momentum / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(trained[k].detach(), w, rtol=1e-12, atol=1e-12)


def test_schedule_is_linear_then_cosine_in_each_group() -> None:
    recipe = Recipe(epochs=10, warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-5)
    peaks = (1e-3, 5e-4)
    optimizer = build_optimizer([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in peaks])
    schedule = build_schedule(optimizer, recipe, steps_per_epoch=5)
    for step in range(50):
        schedule.step_update(step)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            warm = 1e-6 + (peak - 1e-6) * step / 10
            cosine = 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * step / 50)) / 2
            assert group["lr"] == pytest.approx(warm if step < 10 else cosine, rel=1e-12)
