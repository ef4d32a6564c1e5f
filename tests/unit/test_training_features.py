"""Whole images with cached features: the run without them, the backbone seen once, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from cached import Counted
from refold import Preprocessing
from refold.data import ImageSet
from refold.data.streams import StreamSet
from refold.dense.features import Features
from refold.errors import DataError, RefoldError, SiteError
from refold.training import Fit, Recipe, RunFolder, TrainConfig, fit
from refold.training.trainer import trained_tensors

SIDE, TRAINED, VALIDATED = 32, 20, 7
SIZE = Preprocessing(size=(SIDE, SIDE))
RECIPE = Recipe(epochs=3, batch_size=8, lr=5e-3, warmup_epochs=0, attention="default", precision="fp32")


def pixels(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)


def image_set(count: int, seed: int = 0, kind: str = "classify") -> ImageSet:
    images = pixels(count, seed)
    targets: dict[str, Tensor] = {
        "classify": torch.arange(count) % 2,
        "multilabel": (images.float().mean((1, 2))[:, :2] > 127).float(),
        "regress": images.float().mean((1, 2, 3)),
    }
    return ImageSet(
        [f"{seed}/{k}" for k in range(count)], targets[kind], task=kind,  # type: ignore[arg-type]
        classes=None if kind == "regress" else ["a", "b"], decoded=images.numpy(),
    )  # fmt: skip


def swin(**options: Any) -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=SIDE, strict_img_size=False, window_size=4, depths=(1, 2, 1),
        embed_dim=16, num_heads=(1, 2, 2), **options,
    )  # fmt: skip


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **options: timm.create_model("test_vit", img_size=SIDE, **options),
    "vit, mean of tokens": lambda **options: timm.create_model("test_vit", img_size=SIDE, global_pool="avg", **options),
    "vit, attention pool": lambda **options: timm.create_model(
        "test_vit", img_size=SIDE, global_pool="map", class_token=False, **options
    ),
    "swin": swin,
    "convnext": lambda **options: timm.create_model("test_convnext", **options),
    "resnet": lambda **options: timm.create_model("test_resnet", **options),
}


def attached(name: str, method: refold.Method, *, outputs: int = 2, seed: int = 0, drop_path: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    model: Any = MODELS[name](num_classes=2, drop_path_rate=drop_path)
    if outputs != 2:
        model.reset_classifier(outputs)
    return refold.attach(model, method, example=torch.randn(1, 3, SIDE, SIDE))


def train(model: nn.Module, features: Features | None, recipe: Recipe = RECIPE, **options: Any) -> Fit:
    kind = options.pop("kind", "classify")
    train_set = options.pop("train_set", None) or image_set(TRAINED, kind=kind)
    val_set = image_set(VALIDATED, 1, kind)
    return fit(
        model, train_set, val_set, options.pop("size", SIZE), recipe, task=kind, classes=train_set.classes,
        features=features, **options,
    )  # fmt: skip


def losses(found: Fit, split: str = "train") -> list[float]:
    return [row["loss"] for row in found.history if row["split"] == split]


def assert_same(one: tuple[Fit, nn.Module], other: tuple[Fit, nn.Module], rel: float = 1e-5) -> None:
    for split in ("train", "val"):
        assert losses(one[0], split) == pytest.approx(losses(other[0], split), rel=rel)
    theirs = trained_tensors(other[1])
    for name, tensor in trained_tensors(one[1]).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=name)


# -- the run without ----------------------------------------------------------------------------------------------

CASES = [(name, method) for name in ("vit", "swin", "convnext") for method in ("E3VA", "LST", "LinearProbe")]
CASES += [("vit, mean of tokens", "E3VA"), ("vit, attention pool", "LST"), ("resnet", "LST")]
METHODS = {"E3VA": refold.E3VA(rank=2), "LST": refold.LST(), "LinearProbe": refold.LinearProbe()}


@pytest.mark.parametrize(("name", "method"), CASES)
def test_losses_and_weights_are_those_without(name: str, method: str, tmp_path: Path) -> None:
    """In memory, in a folder, and from that folder, where the backbone has DropPath: in training mode all the time."""
    plain = attached(name, METHODS[method])
    expected = train(plain, None), plain
    assert abs(losses(expected[0])[-1] - losses(expected[0])[0]) > 1e-5
    for where in ("memory", str(tmp_path / "features"), str(tmp_path / "features")):
        model = attached(name, METHODS[method], drop_path=0.0 if name == "resnet" else 0.5)
        assert_same((train(model, Features(where)), model), expected)


@pytest.mark.parametrize("kind", ["multilabel", "regress"])
def test_labels_and_numbers(kind: str) -> None:
    outputs = 1 if kind == "regress" else 2
    plain, model = (attached("convnext", METHODS["E3VA"], outputs=outputs) for _ in range(2))
    assert_same((train(model, Features("memory"), kind=kind), model), (train(plain, None, kind=kind), plain))


@pytest.mark.parametrize("method", ["E3VA", "LinearProbe"])
def test_in_bfloat16_records_are_rounded(method: str) -> None:
    recipe = RECIPE.replace(precision="bf16")
    plain, model = attached("vit", METHODS[method]), attached("vit", METHODS[method])
    found, expected = train(model, Features("memory"), recipe), train(plain, None, recipe)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-2)


def test_steps_in_parts_and_a_head_with_dropout() -> None:
    """What draws in the head draws the same numbers as without."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MODELS["vit"](num_classes=0)
            self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    recipe, runs = RECIPE.replace(accumulate=2), []
    for features in (None, Features("memory")):
        torch.manual_seed(0)
        model = refold.attach(Dropped(), METHODS["E3VA"], example=torch.randn(1, 3, SIDE, SIDE))
        runs.append((train(model, features, recipe), model))
    assert_same(runs[1], runs[0])


# -- the backbone and the images are seen once -----------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 2])
def test_the_backbone_sees_each_view_of_each_image_once(views: int) -> None:
    model = attached("vit", METHODS["E3VA"])
    counted, seen, proofs = Counted(model), [], []
    recipe = RECIPE.replace(epochs=12, augment="none" if views == 1 else "light")
    train(
        model, Features("memory", views), recipe, on_epoch=lambda row: seen.append(counted.images),
        before_step=lambda step: proofs.append(counted.images),
    )  # fmt: skip
    by_epoch = [number - proofs[0] for number in seen[1::2]]  # after each validation
    # Full batches alone are trained on, so that the first epoch leaves four images out.
    assert by_epoch[0] == TRAINED // 8 * 8 + VALIDATED
    assert by_epoch[-1] == views * TRAINED + VALIDATED


def test_views_are_the_same_each_time(tmp_path: Path) -> None:
    """The learning rate is next to nothing: losses depend on the images alone, and epoch 3 shows the first view."""
    recipe = RECIPE.replace(epochs=4, lr=1e-12, warmup_lr=0, min_lr=0, batch_size=10, augment="light")
    without = losses(train(attached("vit", METHODS["E3VA"]), None, recipe))
    for where in ("memory", str(tmp_path), str(tmp_path)):
        found = losses(train(attached("vit", METHODS["E3VA"]), Features(where, 2), recipe))
        assert found[:2] == pytest.approx(without[:2], rel=1e-6)
        assert found[2:] == pytest.approx(without[:2], rel=1e-6)
        assert abs(found[0] - found[1]) > 1e-4 * found[0]


def test_images_with_a_record_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPE.replace(epochs=8)
    first = losses(train(attached("vit", METHODS["LST"]), Features(str(tmp_path)), recipe))

    def unreadable(*args: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(ImageSet, "_render", unreadable)
    assert losses(train(attached("vit", METHODS["LST"]), Features(str(tmp_path)), recipe)) == first


@pytest.mark.parametrize("stop_at", [3, 8, 10])
def test_a_run_goes_on_from_the_middle_of_an_epoch(stop_at: int, tmp_path: Path) -> None:
    """Records in memory are lost, and made again: five epochs of four steps, in two views."""
    recipe = RECIPE.replace(epochs=5, batch_size=5, checkpoint_every=2, augment="light")

    class Stopped(Exception):
        pass

    def stop(step: int) -> None:
        if step == stop_at:
            raise Stopped

    def run(folder: Path, **options: Any) -> tuple[Fit, nn.Module]:
        folder.mkdir(exist_ok=True)
        model = attached("vit", METHODS["E3VA"])
        return train(model, Features("memory", 2), recipe, folder=RunFolder(folder), **options), model

    whole = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "halves", before_step=stop)
    resumed = run(tmp_path / "halves", resume=True)
    assert losses(resumed[0]) == losses(whole[0])
    theirs = trained_tensors(whole[1])
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trained_tensors(resumed[1]).items())


# -- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_serves_other_ranks_heads_and_recipes(tmp_path: Path) -> None:
    folder = tmp_path / "features"
    train(attached("vit", METHODS["E3VA"]), Features(str(folder)), RECIPE.replace(epochs=12))
    bits = (folder / "features.bin").read_bytes()
    other = attached("vit", refold.E3VA(rank=3), outputs=1)
    counted, proofs = Counted(other), []
    recipe = RECIPE.replace(lr=1e-3, seed=1, batch_size=4)
    train(other, Features(str(folder)), recipe, kind="regress", before_step=lambda step: proofs.append(counted.images))
    assert (folder / "features.bin").read_bytes() == bits
    assert counted.images == proofs[0]


def changed() -> ImageSet:
    images = pixels(TRAINED, 0)
    images[3, 0, 0, 0] ^= 1
    targets = torch.arange(TRAINED) % 2
    return ImageSet([f"0/{k}" for k in range(TRAINED)], targets, classes=["a", "b"], decoded=images.numpy())


STALE: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"seed": 1}, "the backbone, .* has other values"),
    "method": ({"method": refold.LST()}, "reads"),
    "image": ({"train_set": changed()}, "image 3 has another content"),
    "preprocessing": ({"size": Preprocessing(size=(SIDE, SIDE), mean=(0.1, 0.2, 0.3))}, "preprocessing"),
    "size": ({"model": "convnext", "size": Preprocessing(size=(64, 64))}, "preprocessing"),
    "seed": ({"recipe": {"seed": 1}}, "seed 0, not 1"),
    "augmentation": ({"recipe": {"augment": "flip"}}, "augment light, not flip"),
    "views": ({"views": 3}, "2 views of image 0, not 3"),
    "precision": ({"recipe": {"precision": "bf16"}}, "precision torch.float32, not autocast to torch.bfloat16"),
}


@pytest.mark.parametrize("name", list(STALE))
def test_a_stale_folder_is_refused(name: str, tmp_path: Path) -> None:
    changes, reason = STALE[name]
    folder, recipe = str(tmp_path / "features"), RECIPE.replace(epochs=1, augment="light")
    backbone = changes.get("model", "vit")
    train(attached(backbone, METHODS["E3VA"]), Features(folder, 2), recipe)
    model = attached(backbone, changes.get("method", METHODS["E3VA"]), seed=changes.get("seed", 0))
    options = {key: value for key, value in changes.items() if key in ("train_set", "size")}
    with pytest.raises(RefoldError, match=reason):
        train(model, Features(folder, changes.get("views", 2)), recipe.replace(**changes.get("recipe", {})), **options)


def test_images_are_known_by_their_files_or_pixels(tmp_path: Path) -> None:
    for k in range(6):
        (tmp_path / f"{k}.png").write_bytes(bytes([k]))
    files = ImageSet([tmp_path / f"{k}.png" for k in range(6)], torch.zeros(6), classes=["a"])
    assert [files.source_bytes(k) for k in range(6)] == [bytes([k]) for k in range(6)]
    assert files.subset([5]).source_bytes(0) == bytes([5])
    assert image_set(3).subset([2]).source_bytes(0) == pixels(3, 0)[2].numpy().tobytes()


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [refold.RepAdapter(), refold.LoRA(), refold.DTL(), refold.VPT()])
def test_methods_that_change_the_backbone(method: refold.Method) -> None:
    with pytest.raises(SiteError, match=f"{type(method).__name__} changes what the backbone computes"):
        train(attached("vit", method), Features("memory"))


def test_a_backbone_that_trains() -> None:
    with pytest.raises(SiteError, match="it trains, and what the backbone computes changes with it"):
        train(attached("vit", refold.BitFit()), Features("memory"))


class Doubled(nn.Module):
    """Does in front of its head what no layout and no pooling does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = MODELS["vit"](num_classes=0), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(2 * self.inner(x))


class Scaled(Doubled):
    """Does something behind its head."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(self.inner(x))


def test_what_lies_around_the_head() -> None:
    example = torch.randn(1, 3, SIDE, SIDE)
    with pytest.raises(SiteError, match="map 0 is not what the adapters give"):
        train(refold.attach(Doubled(), METHODS["E3VA"], example=example), Features("memory"))
    with pytest.raises(SiteError, match="head: the model returns something else"):
        train(refold.attach(Scaled(), METHODS["LinearProbe"], example=example), Features("memory"))
    runs = []
    for features in (None, Features("memory")):  # a probe needs to know of nothing in front
        torch.manual_seed(0)
        model = refold.attach(Doubled(), METHODS["LinearProbe"], example=example)
        runs.append((train(model, features), model))
    assert_same(runs[1], runs[0])


def test_a_model_with_two_heads_or_none() -> None:
    for trainable in ((), ("head", "norm")):
        model = MODELS["vit"](num_classes=2)
        refold.attach(model, METHODS["E3VA"], example=torch.randn(1, 3, SIDE, SIDE), trainable=trainable)
        with pytest.raises(SiteError, match="for a head, and what one module is given is to be kept"):
            train(model, Features("memory"))


BAD = {"mixup": 0.2, "cutmix": 1.0, "consistency": 1.0}


@pytest.mark.parametrize("name", list(BAD))
def test_what_draws_anew_at_each_step(name: str, tmp_path: Path) -> None:
    changes = {name: BAD[name], **({"consistency_noise": 0.1} if name == "consistency" else {})}
    with pytest.raises(DataError, match=f"{name}: draws anew at every step"):
        train(attached("vit", METHODS["E3VA"]), Features("memory"), RECIPE.replace(**changes))
    with pytest.raises(DataError, match=f"{name}: draws anew at every step"):
        config(tmp_path, **changes)


def config(folder: Path, **changes: Any) -> TrainConfig:
    base = {"data": "photos", "model": "timm/test_vit", "method": METHODS["E3VA"], "output": str(folder / "run")}
    return TrainConfig.of(**base | {"features": "memory"} | changes)


def test_settings_that_contradict_features(tmp_path: Path) -> None:
    assert config(tmp_path).drop_path == 0
    assert config(tmp_path, features=None).drop_path == 0.1
    for changes, reason in (
        ({"drop_path": 0.1}, "drop_path: draws anew"),
        ({"task": "video"}, "features: is for images"),
        ({"features": None, "views": 2}, "views: is for cached features"),
    ):
        with pytest.raises(DataError, match=reason):
            config(tmp_path, **changes)


def test_views_without_augmentation() -> None:
    with pytest.raises(DataError, match="2 views of images that are not augmented"):
        train(attached("vit", METHODS["E3VA"]), Features("memory", 2))


def test_streams_are_refused(tmp_path: Path) -> None:
    stream = StreamSet.__new__(StreamSet)
    vars(stream).update(vars(image_set(TRAINED)))
    with pytest.raises(DataError, match="a stream's images are not told apart"):
        train(attached("vit", METHODS["E3VA"]), Features("memory"), train_set=stream)
