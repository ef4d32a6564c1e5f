"""``fit``: every method and kind of backbone, every kind of target, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import refold
from refold import Preprocessing
from refold.data import ImageSet
from refold.errors import DataError
from refold.training import Fit, Recipe, RunFolder, fit
from refold.training.evaluation import score
from refold.training.inference import start_accelerator
from refold.training.tasks import Classification
from refold.training.trainer import trained_tensors

SIZE = Preprocessing(size=(32, 32))
RECIPE = Recipe(epochs=4, batch_size=8, lr=5e-3, attention="default", precision="bf16")


def pictures(n: int, seed: int = 0) -> tuple[Any, Tensor]:
    """Uniform colours with noise, (n, 32, 32, 3) uint8, and their red and green, (n, 2) in [0, 1]."""
    random = torch.Generator().manual_seed(seed)
    colour = torch.rand(n, 3, generator=random)
    pixels = 255 * colour[:, None, None] + 20 * torch.randn(n, 32, 32, 3, generator=random)
    return pixels.clamp(0, 255).byte().numpy(), colour[:, :2]


def image_set(n: int, kind: str = "classify", seed: int = 0) -> ImageSet:
    pixels, colour = pictures(n, seed)
    names = [f"{i}.png" for i in range(n)]
    if kind == "regress":
        return ImageSet(names, 100 + 50 * colour[:, 0], task="regress", decoded=pixels)
    if kind == "multilabel":
        return ImageSet(names, (colour > 0.5).float(), task="multilabel", classes=["red", "green"], decoded=pixels)
    return ImageSet(names, (colour[:, 0] > 0.5).long(), classes=["other", "red"], decoded=pixels)


def attached(name: str, method: refold.Method, outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=outputs)
    if "vit" in name:
        model = timm.create_model(name, pretrained=False, num_classes=outputs, img_size=32)
    return refold.attach(model, method, example=torch.randn(1, 3, 32, 32))


def run(model: nn.Module, recipe: Recipe = RECIPE, kind: str = "classify", **options: Any) -> Fit:
    train_set, val_set = image_set(48, kind), image_set(16, kind, seed=1)
    return fit(model, train_set, val_set, SIZE, recipe, task=kind, classes=train_set.classes, **options)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("test_vit", refold.RepAdapter(rank=4)),
        ("test_vit", refold.LoRA(rank=4)),
        ("test_vit", refold.BitFit()),
        ("test_vit", refold.LinearProbe()),
        ("test_vit", refold.FullFineTune()),
        ("test_convnext", refold.RepAdapter(rank=4)),
        ("test_efficientnet", refold.RepAdapter(rank=4)),
        ("test_efficientnet", refold.FullFineTune()),
    ],
)
def test_only_what_the_method_trains_changes(name: str, method: refold.Method) -> None:
    """In bfloat16 with held weights: afterwards every frozen tensor has its float32 bits."""
    model = attached(name, method)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainable = set(refold.trainable_parameters(model))
    found = run(model)
    after = model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {key for key in before if key.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert moved <= trainable | (statistics if isinstance(method, refold.FullFineTune) else set())
    assert len(moved & trainable) > len(trainable) / 2
    assert bool(moved & statistics) == (isinstance(method, refold.FullFineTune) and bool(statistics))
    assert all(value.dtype == before[key].dtype for key, value in after.items())
    assert not model.training
    losses = [row["loss"] for row in found.history if row["split"] == "train"]
    assert losses[-1] < losses[0]
    assert found.precision == "bf16"


def test_the_model_is_left_at_its_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation metric is scripted: epoch 2 wins over a tie in epoch 4 by its loss, and 3 is worse."""
    worth = iter([0.0, 0.5, 0.9, 0.7, 0.9])  # the first call asks which metrics there are
    monkeypatch.setattr(Classification, "metrics", lambda self, scores, targets: {"accuracy": next(worth)})
    losses = iter([3.0, 1.0, 0.5, 2.0])
    monkeypatch.setattr(Classification, "loss", lambda self, logits, targets: torch.tensor(next(losses)))
    model = attached("test_vit", refold.RepAdapter(rank=4))
    snapshots: list[dict[str, Tensor]] = []

    def remember(row: dict[str, Any]) -> None:
        if row["split"] == "val":
            snapshots.append(trained_tensors(model))

    found = run(model, on_epoch=remember)
    assert found.best_epoch == 2
    assert found.metrics == {"loss": 1.0, "accuracy": 0.9}
    now = trained_tensors(model)
    assert all(torch.equal(now[key], value) for key, value in snapshots[1].items())
    assert not all(torch.equal(now[key], value) for key, value in snapshots[3].items())


@pytest.mark.parametrize(("select", "worst_first"), [("loss", True), ("auroc", False)])
def test_the_selected_metric_decides(select: str, worst_first: bool) -> None:
    found = run(attached("test_vit", refold.RepAdapter(rank=4)), RECIPE.replace(select=select))
    rows = [row for row in found.history if row["split"] == "val"]
    values = [row[select] for row in rows]
    assert found.metrics[select] == (min(values) if worst_first else max(values))


def test_without_validation_the_last_epoch_stays() -> None:
    model = attached("test_vit", refold.LinearProbe())
    train_set = image_set(16)
    found = fit(model, train_set, None, SIZE, RECIPE, classes=train_set.classes)
    assert found.best_epoch == RECIPE.epochs
    assert found.metrics == {}
    assert {row["split"] for row in found.history} == {"train"}


def test_an_undefined_selection_is_refused_before_training() -> None:
    with pytest.raises(DataError, match=r"select: 'map' is not defined .* Defined: loss, accuracy"):
        run(attached("test_vit", refold.LinearProbe()), RECIPE.replace(select="map"))


def test_everything_at_once_trains() -> None:
    recipe = RECIPE.replace(
        mixup=0.4, cutmix=1.0, label_smoothing=0.1, class_weights="balanced", clip_grad=0.5, augment="light",
        attention="auto", precision="auto", head_lr=1e-2,
    )  # fmt: skip
    found = run(attached("test_vit", refold.RepAdapter(rank=4)), recipe)
    losses = [row["loss"] for row in found.history if row["split"] == "val"]
    assert losses[-1] < losses[0]
    assert found.attention in ("default", "math")


class Attending(nn.Module):
    """BatchNorm on the image, attention over its rows, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(96, 2)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.norm(images).permute(0, 2, 1, 3).flatten(2)[:, None]
        return self.fc(nn.functional.scaled_dot_product_attention(rows, rows, rows).mean(dim=(1, 2)))


def test_choosing_the_kernel_leaves_moving_statistics_alone() -> None:
    """The choice runs the model on noise in training mode; its BatchNorm must see the images alone."""
    found = {}
    for attention in ("default", "auto"):
        torch.manual_seed(0)
        model = refold.attach(Attending(), refold.FullFineTune(), example=torch.randn(2, 3, 32, 32))
        run(model, RECIPE.replace(epochs=1, attention=attention, precision="fp32"))
        found[attention] = model.norm.running_mean, model.norm.num_batches_tracked
    assert int(found["auto"][1]) == 6
    assert torch.equal(found["auto"][0], found["default"][0])


def test_clipping_bounds_the_gradient() -> None:
    """The optimizer sees gradients whose norm is at most the limit."""
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([grad.norm() for grad in grads]).norm()))

    handle = register_optimizer_step_pre_hook(look)
    try:
        run(attached("test_vit", refold.RepAdapter(rank=4)), RECIPE.replace(epochs=1))
        free = max(norms)
        norms.clear()
        run(attached("test_vit", refold.RepAdapter(rank=4)), RECIPE.replace(epochs=1, clip_grad=free / 10))
    finally:
        handle.remove()
    assert max(norms) <= free / 10 * 1.001


def test_a_multilabel_head_learns_and_is_scored_by_average_precision() -> None:
    model = attached("test_vit", refold.RepAdapter(rank=4))
    found = run(model, RECIPE.replace(epochs=8), kind="multilabel")
    assert found.task.kind == "multilabel"
    assert set(found.metrics) == {"loss", "map", "f1", "auroc"}
    assert found.metrics["map"] == max(row["map"] for row in found.history if row["split"] == "val")
    assert found.metrics["auroc"] > 0.8


def test_a_regression_ends_in_the_targets_unit() -> None:
    """Targets between 100 and 150: the model alone, without any record of mean and spread, answers in them."""
    model = attached("test_vit", refold.RepAdapter(rank=4), outputs=1)
    found = run(model, RECIPE.replace(epochs=10, precision="fp32"), kind="regress")
    val_set = image_set(16, "regress", seed=1)
    result = score(
        model, val_set, val_set.targets, SIZE, found.task, accelerator=start_accelerator(), batch_size=8
    )  # fmt: skip
    assert result.metrics["mae"] == pytest.approx(found.metrics["mae"], rel=1e-4)
    assert result.metrics["loss"] == pytest.approx(found.metrics["loss"], rel=1e-4)
    assert result.metrics["mae"] < 8  # guessing the mean gives 12.5
    assert result.correct is None
    assert result.confidence == pytest.approx([-abs(r["prediction"] - r["target"]) for r in result.rows], rel=1e-5)
    folded = [row for row in found.history if row["split"] == "val"]
    assert found.metrics["mae"] == min(row["mae"] for row in folded)


def test_random_state_and_denormals_are_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = attached("test_vit", refold.LinearProbe())
    torch.set_rng_state(state)
    run(model, RECIPE.replace(epochs=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert float((torch.full((1,), 1e-39) * 1.0).item()) != 0


def test_a_failed_fit_gives_the_frozen_weights_back() -> None:
    model = attached("test_vit", refold.RepAdapter(rank=4))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}

    def stop(row: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, on_epoch=stop)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def test_a_bare_recipe_can_be_resumed_too(tmp_path: Path) -> None:
    whole = attached("test_vit", refold.RepAdapter(rank=4))
    wanted = run(whole)

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(attached("test_vit", refold.RepAdapter(rank=4)), folder=RunFolder(tmp_path), on_epoch=stop)
    resumed = attached("test_vit", refold.RepAdapter(rank=4))
    found = run(resumed, folder=RunFolder(tmp_path), resume=True)
    assert found.metrics == wanted.metrics
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(DataError, match="seed: the run began with 0"):
        run(resumed, RECIPE.replace(seed=1), folder=RunFolder(tmp_path), resume=True)


def test_a_head_of_another_size_is_named() -> None:
    with pytest.raises(DataError, match=r"the model gives \[5\] outputs an image and the task needs 2"):
        run(attached("test_vit", refold.LinearProbe(), outputs=5))


def test_a_head_that_only_the_user_knows() -> None:
    """The regression's unit goes into whatever ``trainable=`` named."""
    torch.manual_seed(0)
    body = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32)
    model = nn.Sequential(body, nn.Linear(64, 1))
    refold.attach(model, refold.RepAdapter(rank=4), example=torch.randn(1, 3, 32, 32), trainable=("1",))
    found = run(model, RECIPE.replace(epochs=6), kind="regress")
    with torch.no_grad():
        assert 90 < float(model(torch.zeros(1, 3, 32, 32))) < 160
    assert found.metrics["mae"] < 12.5
