"""A run that is stopped in the middle of an epoch ends, to the bit, as if it had not been; steps divided into parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import refold
from dense_runs import settings
from refold import Preprocessing
from refold.data import ImageSet
from refold.dense.shapes import shapes
from refold.errors import DataError
from refold.training import Recipe, RunFolder, fit, train
from refold.training.checkpoint import Checkpoint
from refold.training.trainer import trained_tensors
from stopping import Stopped, interrupt_at

SIZE = Preprocessing(size=(32, 32))
RECIPE = Recipe(
    epochs=3, batch_size=6, lr=5e-3, attention="default", precision="fp32", augment="light", checkpoint_every=2
)  # fmt: skip
METHOD = refold.RepAdapter(rank=4, dropout=0.3)


def image_set(count: int, seed: int = 0) -> ImageSet:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=random, dtype=torch.uint8)
    return ImageSet(map(str, range(count)), torch.arange(count) % 2, classes=["a", "b"], decoded=pixels.numpy())


def attached(method: refold.Method = METHOD, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=2, img_size=32, **options)
    return refold.attach(model, method)


def run(folder: Path, recipe: Recipe = RECIPE, stop_at: int | None = None, **options: Any) -> tuple[Any, nn.Module]:
    """45 images in steps of 6: seven an epoch."""
    model = attached(drop_path_rate=0.1)

    def before_step(step: int) -> None:
        if step == stop_at:
            raise Stopped

    folder.mkdir(exist_ok=True)
    result = fit(
        model, image_set(45), image_set(12, seed=1), SIZE, recipe, classes=["a", "b"], folder=RunFolder(folder),
        before_step=before_step, **options,
    )  # fmt: skip
    return result, model


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def require_same(folders: tuple[Path, Path], runs: tuple[Any, Any], models: tuple[nn.Module, nn.Module]) -> None:
    one, other = (trained_tensors(model) for model in models)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert without_times(runs[0].history) == without_times(runs[1].history)
    assert runs[0].best_epoch == runs[1].best_epoch
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders]
    assert without_times(lines[0]) == without_times(lines[1])


@pytest.mark.parametrize(
    ("changes", "stop_at", "resumed_at"),
    [
        ({}, 12, 12),  # a checkpoint at steps 2, 4, 6, (7), 8, 10 and 12: the step after a checkpoint
        ({}, 5, 4),  # and a step later, in the first epoch
        ({"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}, 19, 18),
        ({"consistency": 0.5, "consistency_noise": 0.5}, 10, 10),
        ({"workers": 1, "augment": "randaugment"}, 9, 8),
        ({"accumulate": 3}, 13, 12),
        ({"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.01}, 12, 12),
        ({"checkpoint_every": 7}, 9, 7),  # where the end of the epoch is
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, changes: dict[str, Any], stop_at: int, resumed_at: int
) -> None:
    recipe = RECIPE.replace(**changes)
    whole, whole_model = run(tmp_path / "whole", recipe.replace(checkpoint_every=None))
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", recipe, stop_at=stop_at)
    torch.manual_seed(99)  # nothing of this process's random state matters
    seen: list[int] = []
    model = attached(drop_path_rate=0.1)
    resumed = fit(
        model, image_set(45), image_set(12, seed=1), SIZE, recipe, classes=["a", "b"], resume=True,
        folder=RunFolder(tmp_path / "stopped"), before_step=seen.append,
    )  # fmt: skip
    assert seen == list(range(resumed_at, 21))
    require_same((tmp_path / "whole", tmp_path / "stopped"), (whole, resumed), (whole_model, model))


def test_several_stops(tmp_path: Path) -> None:
    whole, whole_model = run(tmp_path / "whole")
    for stop_at in (3, 4, 5, 11, 16):
        with pytest.raises(Stopped):
            run(tmp_path / "stopped", stop_at=stop_at, resume=True)
    resumed, model = run(tmp_path / "stopped", resume=True)
    require_same((tmp_path / "whole", tmp_path / "stopped"), (whole, resumed), (whole_model, model))


def test_the_note_says_how_far_it_came(tmp_path: Path) -> None:
    model = attached()

    def stop(step: int) -> None:
        if step == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(
            model, image_set(45), None, SIZE, RECIPE, classes=["a", "b"], folder=RunFolder(tmp_path), before_step=stop
        )  # fmt: skip
    assert "Stopped after 1 of 3 epochs and 3 of 7 steps" in caught.value.__notes__[0]


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=4)
    path = tmp_path / "checkpoint.pt"
    saved = Checkpoint.read(path)
    assert saved.midway is not None
    assert (saved.epoch, len(saved.midway), len(saved.midway[0].losses)) == (0, 1, 4)
    dataclasses.replace(saved, midway=saved.midway * 2).write(path)
    with pytest.raises(DataError, match="begun by 2 processes and cannot be finished by 1"):
        run(tmp_path, resume=True)


def test_a_setting_that_came_later_has_its_default(tmp_path: Path) -> None:
    """Checkpoints of the first format know neither of the settings nor of the middle of an epoch."""
    whole, whole_model = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "old", RECIPE.replace(checkpoint_every=None), stop_at=8)
    path = tmp_path / "old" / "checkpoint.pt"
    record = torch.load(path, weights_only=True)
    assert record.pop("midway") is None
    record["format"] = 1
    for name in ("accumulate", "checkpoint_every", "consistency", "optimizer"):
        del record["settings"][name]
    torch.save(record, path)
    with pytest.raises(DataError, match="accumulate: the run began with 1 and cannot be resumed with 2"):
        run(tmp_path / "old", RECIPE.replace(accumulate=2), resume=True)
    resumed, model = run(tmp_path / "old", resume=True)
    require_same((tmp_path / "whole", tmp_path / "old"), (whole, resumed), (whole_model, model))


# -- steps in parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_parts_of_a_step_add_up(tmp_path: Path, parts: int, clip: float | None) -> None:
    """45 images are no multiple of anything here: what a step leaves out, its parts leave out."""
    recipe = RECIPE.replace(lr=1e-3, clip_grad=clip, checkpoint_every=None)
    runs = []
    for accumulate in (1, parts):
        torch.manual_seed(0)
        model = refold.attach(
            timm.create_model("test_vit", pretrained=False, num_classes=2, img_size=32),
            refold.RepAdapter(rank=4, dropout=0.0),
        )
        train, val = image_set(45), image_set(12, seed=1)
        steps: list[int] = []
        result = fit(
            model, train, val, SIZE, recipe.replace(accumulate=accumulate), classes=["a", "b"], before_step=steps.append
        )
        runs.append((result, trained_tensors(model), steps))
    (one, tensors, steps), (other, found, steps_again) = runs
    assert steps == steps_again == list(range(21))
    for a, b in zip(one.history, other.history, strict=True):
        assert (a["step"], a["split"], a.get("lr")) == (b["step"], b["split"], b.get("lr"))
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4)


def test_the_gradient_of_a_step_is_that_of_all_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: one step of plain cross-entropy over the epoch's first images."""
    from refold.data import Loader

    seen: list[torch.Tensor] = []
    step = torch.optim.AdamW.step
    model: Any = attached(refold.LinearProbe())

    def remember(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(model.head.weight.grad.clone())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", remember)
    reference: Any = attached(refold.LinearProbe()).train()
    train = image_set(12)
    recipe = RECIPE.replace(epochs=1, batch_size=12, accumulate=4, augment="none", checkpoint_every=None)
    fit(model, train, None, SIZE, recipe, classes=["a", "b"])
    images, targets = next(iter(Loader(train, SIZE, batch_size=12)))
    nn.functional.cross_entropy(reference(images), targets).backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], reference.head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{"accumulate": 4}, {"batch_size": 48, "accumulate": 2}])
def test_steps_that_have_no_equal_parts_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="accumulate: a step of"):
        fit(attached(), image_set(45), None, SIZE, RECIPE.replace(**changes), classes=["a", "b"])
    with pytest.raises(DataError, match="accumulate: must be a whole number"):
        Recipe(accumulate=0)


# -- dense tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"method": METHOD, "augment": "standard"},
        {"features": "memory", "views": 2, "augment": "flip"},
        {"task": "detect", "decoder": "fcos", "lr": 1e-3, "augment": "hflip"},
    ],
    ids=["adapter", "features", "boxes"],
)
def test_dense_tasks_go_on_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    data = shapes(tmp_path / "data", counts=(4, 2, 2), side=64).root
    config = settings(data, tmp_path / "whole", batch_size=1, checkpoint_every=3, evaluate_test=False, **changes)
    whole = train(config)
    made = interrupt_at(monkeypatch, 8)
    with pytest.raises(Stopped):
        train(config, output=str(tmp_path / "again"))
    resumed = train(config, output=str(tmp_path / "again"), resume=True)
    assert len(made) == 8 + 2  # six of seven steps are kept
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    assert without_times(resumed.fit.history) == without_times(whole.fit.history)
    assert resumed.metrics == whole.metrics
