"""Training from class names and from a text tower, the way from zero-shot to adapted, and the commands for it."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import refold
from commands import run
from image_text import registered, saved, write_photos
from refold import DataError, MergeError, backbones
from refold.backbones import Classifier, Prompts, TextClassifier
from refold.data import Loader
from refold.protocols import examine
from refold.training import TrainConfig, TrainResult, evaluate, interpolate_run, train, zeroshot
from refold.training.build import resolve
from refold.training.evaluation import load_splits

TEMPLATES = ("a photo of a {}.", "the {}")


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Photos of two classes, further photos, and weights of a tiny image-text model, in one folder."""
    folder = tmp_path_factory.mktemp("place")
    for _ in registered():
        write_photos(folder / "photos", count=16)
        write_photos(folder / "others", count=4)
        saved("tiny", folder)
        yield folder


def _config(place: Path, output: str, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": place / "photos",
        "model": f"open_clip/tiny/{place / 'clip.safetensors'}",
        "method": refold.RepAdapter(rank=2, groups=1),
        "output": str(place / output),
        "fractions": (16, 8, 8),
        "epochs": 3,
        "batch_size": 8,
        "lr": 1e-2,
        "warmup_epochs": 0.0,
        "precision": "fp32",
        "attention": "default",
        "head": "zeroshot",
        "templates": TEMPLATES,
    }
    return TrainConfig.of(**(settings | changes))


@pytest.fixture(scope="module")
def frozen(place: Path) -> TrainResult:
    return train(_config(place, "frozen", freeze_head=True))


@pytest.fixture(scope="module")
def text(place: Path) -> TrainResult:
    return train(_config(place, "text", head="text"))


def _zero(place: Path) -> torch.nn.Module:
    spec = f"open_clip/tiny/{place / 'clip.safetensors'}"
    return backbones.load(spec, head=Prompts(("cat", "dog"), TEMPLATES)).model


def test_a_zero_shot_head_is_the_start_and_stays_where_it_is_frozen(place: Path, frozen: TrainResult) -> None:
    start = _zero(place).state_dict()
    trained = refold.trainable_parameters(frozen.model)
    assert trained
    assert all(name.startswith("backbone.") for name in trained)
    adapters = sum(parameter.numel() for parameter in trained.values())
    found = resolve(frozen.output).model
    merged = copy.deepcopy(found)
    refold.merge(merged)
    for model in (frozen.model, found, merged):
        told = refold.explain(model)
        assert told.trainable == told.adapter_parameters == adapters
        assert [(row.parameters, row.reason) for row in told.rows if row.slot == "head"] == [(0, "left as it is")]
    assert torch.equal(found.state_dict()["head.linear.weight"], start["head.linear.weight"])
    free = train(_config(place, "free", epochs=1, lr=1e-3))
    told, head = refold.explain(free.model), free.model.get_submodule("head")
    assert told.trainable - told.adapter_parameters == sum(parameter.numel() for parameter in head.parameters())
    moved = (free.model.state_dict()["head.linear.weight"] - start["head.linear.weight"]).abs().max()
    assert 0 < float(moved) < 0.02  # two steps of Adam at 1e-3 from there
    probe = train(_config(place, "probe", epochs=1, method=refold.LinearProbe()))
    assert all(torch.equal(probe.model.state_dict()[key], start[key]) for key in start if key.startswith("backbone."))


def test_a_run_is_scored_again_from_its_folder_and_its_file_alone(frozen: TrainResult, text: TrainResult) -> None:
    for result in (frozen, text):
        for source in (result.output, result.adapter):
            again = evaluate(source, None if source == result.output else result.output.parent / "photos", split="test")
            if source == result.output:
                assert again.metrics == pytest.approx(result.metrics["test"])
            else:
                assert len(again.details["per_class"]) == 2
        names = json.loads((result.output / "config.json").read_text())
        assert names["templates"] == list(TEMPLATES)


def test_a_text_towers_run_moves_the_classes_embeddings(place: Path, text: TrainResult) -> None:
    assert isinstance(text.model, TextClassifier)
    start = _zero(place).state_dict()["head.linear.weight"]
    now = text.model.logit_scale.exp() * text.model.embeddings()
    assert float((now - start).detach().abs().max()) > 0.05
    towers = {name.partition(".")[0] for name in refold.trainable_parameters(text.model)}
    assert towers == {"backbone", "text"}


def test_adapters_of_text_towers_that_take_turns_have_embeddings_of_their_own(place: Path, text: TrainResult) -> None:
    train(_config(place, "slower", head="text", lr=1e-3, epochs=1))
    sources = [text.output, place / "slower"]
    together = examine(sources, corruptions=["contrast"], severities=[3]).rows[:2]
    alone = [examine([source], corruptions=["contrast"], severities=[3]).rows[0] for source in sources]
    assert together == alone
    assert together[0].calibration_error != together[1].calibration_error


def test_predictions_of_many_images_are_made_without_the_text_tower(text: TrainResult) -> None:
    from refold.sweeps.batches import _merged

    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = text.model(images)
        plain = _merged(copy.deepcopy(text.model))
        assert isinstance(plain, Classifier)
        torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-4)


def test_resuming_knows_the_prompts(place: Path, frozen: TrainResult) -> None:
    again = train(_config(place, "frozen", freeze_head=True), resume=True)
    assert again.metrics == frozen.metrics
    with pytest.raises(DataError, match="templates"):
        train(_config(place, "frozen", freeze_head=True, templates=("a {}",)), resume=True)


def test_the_way_from_zero_shot_to_adapted(
    place: Path, frozen: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    others = {"others": place / "others"}
    found = interpolate_run(frozen.output, others=others, progress=True)
    shown = capsys.readouterr().err
    assert "validation images" in shown
    assert "test images" in shown
    assert len(found.validation) == 11
    assert found.validation[1.0]["accuracy"] == pytest.approx(frozen.metrics["val"]["accuracy"])
    assert found.metrics["test"][1.0]["loss"] == pytest.approx(frozen.metrics["test"]["loss"], rel=1e-4)
    zero = zeroshot(
        f"open_clip/tiny/{place / 'clip.safetensors'}", place / "others", templates=TEMPLATES, crop="squash"
    )
    assert found.metrics["others"][0.0] == pytest.approx(zero.metrics)
    best = max(row["accuracy"] for row in found.validation.values())
    assert found.validation[found.alpha]["accuracy"] == best
    assert set(found.metrics["test"]) == set(found.metrics["others"]) == {0.0, found.alpha, 1.0}
    adapted = resolve(frozen.output).model
    refold.merge(adapted)
    expected = refold.interpolate(_zero(place), adapted, found.alpha)
    assert all(torch.equal(found.model.state_dict()[key].cpu(), value) for key, value in expected.items())
    assert type(found.model) is Classifier
    capsys.readouterr()
    given = interpolate_run(frozen.adapter, 0.5, data=place / "others")
    assert capsys.readouterr().err == ""
    assert (given.alpha, given.select, given.validation, given.metrics) == (0.5, None, {}, {})


def test_random_weights_have_the_zero_shot_model_of_their_seed_at_the_other_end(place: Path) -> None:
    config = _config(place, "random", model="open_clip/tiny", pretrained=False, head="text", epochs=1)
    train(config)
    found = interpolate_run(place / "random", 0.0)
    ready = resolve(place / "random")
    refold.detach(ready.model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(found.model(images), ready.model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "zero-shot"}, "head: must be one of linear, zeroshot, text"),
        ({"head": "linear"}, "templates: is for prompts"),
        ({"head": "linear", "templates": None, "class_names": "names.csv"}, "class_names: is for prompts"),
        ({"head": "linear", "templates": None, "freeze_head": True}, "freeze_head: is for a zero-shot head"),
        ({"head": "text", "freeze_head": True}, "freeze_head: is for a zero-shot head, not 'text'"),
        ({"freeze_head": True, "method": refold.LinearProbe()}, "freeze_head: leaves nothing to train"),
        ({"task": "segment"}, "head: 'zeroshot' is for classes of whole images"),
        ({"templates": ("a photo",)}, "templates with {} for the name"),
        ({"class_names": "absent.csv"}, "absent.csv: cannot be read"),
    ],
)
def test_settings_that_make_no_sense(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(_config(place, "unused", **changes))
    assert not (place / "unused").exists()


def test_a_head_of_its_own_has_no_zero_shot_model_at_the_other_end(place: Path, frozen: TrainResult) -> None:
    plain = train(_config(place, "linear", head="linear", templates=None, epochs=1))
    with pytest.raises(DataError, match="no zero-shot model at the other end"):
        interpolate_run(plain.output)
    with pytest.raises(DataError, match="no validation split to choose alpha by"):
        interpolate_run(frozen.output, data=place / "others")
    with pytest.raises(DataError, match="only a run folder knows its data"):
        interpolate_run(frozen.adapter)
    with pytest.raises(DataError, match="alpha: must be between 0 and 1, not 2"):
        interpolate_run(frozen.output, 2)
    train(_config(place, "beside", method=refold.AdaptFormer(), epochs=1))
    with pytest.raises(MergeError, match=r"AdaptFormer.* does not fold"):
        interpolate_run(place / "beside")


def test_the_commands(place: Path) -> None:
    with (place / "names.csv").open("w", newline="") as file:
        csv.writer(file).writerow(("dog", "red bus"))
    model = ("--model", f"open_clip/tiny/{place / 'clip.safetensors'}", "--template", "a photo of a {}.")
    names = ("--class-names", "names.csv")
    done = run("zeroshot", "photos", *model, *names, cwd=place)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert "dog" in done.stdout
    done = run(
        "train", "photos", *model, *names, "--head", "text", "--template", "the {}", "--split", "16", "8", "8",
        "--method", "RepAdapter(rank=2, groups=1)", "--epochs", "1", "--batch-size", "8", "-o", "command", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = TrainConfig.load(place / "command")
    assert (config.head, config.templates) == ("text", ("a photo of a {}.", "the {}"))
    assert refold.store.read_header(place / "command" / "adapter.safetensors").extra["prompts"] == {
        "names": ["cat", "red bus"], "templates": ["a photo of a {}.", "the {}"], "tower": True,
    }  # fmt: skip
    done = run("interpolate", "command", "--other", "others=others", "-o", "between.safetensors", cwd=place)
    assert done.returncode == 0, done.stderr
    kept = json.loads((place / "command" / "interpolation.json").read_text())
    assert f"Weights at alpha {kept['alpha']:g}" in done.stdout
    done = run("merge", "command", "-o", "merged.safetensors", cwd=place)
    assert done.returncode == 0, done.stderr
    zero = _zero(place).state_dict()
    for file in ("between.safetensors", "merged.safetensors"):
        written = load_file(place / file)
        assert {key: value.shape for key, value in written.items()} == {k: v.shape for k, v in zero.items()}
    merged = backbones.load("open_clip/tiny", weights=place / "merged.safetensors").model
    ready, images = resolve(place / "command"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), ready.model(images), rtol=1e-4, atol=1e-4)
    done = run("zeroshot", "photos", "--model", "timm/test_vit", cwd=place)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no text tower" in done.stderr


def test_few_shots_may_start_from_class_names(place: Path) -> None:
    """One tiny step from the zero-shot head predicts as it does."""
    spec, output = f"open_clip/tiny/{place / 'clip.safetensors'}", place / "shots"
    run(
        "fewshot", str(place / "photos"), "--model", spec, "--method", "LinearProbe", "--head", "zeroshot",
        "--template", "the {}", "--shots", "1", "--seeds", "0", "--epochs", "1", "--lr", "1e-5", "--precision", "fp32",
        "--split", "16", "0", "16", "-o", str(output), cwd=place,
    )  # fmt: skip
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    (record,) = (json.loads(path.read_text()) for path in output.rglob("test-*.json"))
    assert (record["settings"]["head"], record["settings"]["templates"]) == ("zeroshot", ["the {}"])
    model = backbones.load(spec, head=Prompts(("cat", "dog"), ("the {}",)))
    images = load_splits(_config(place, "unused", fractions=(16, 0, 16))).test
    assert images is not None
    with torch.no_grad():
        logits = model.model(torch.cat([image for image, _ in Loader(images, model.preprocessing, batch_size=16)]))
    assert row["accuracy"] == [pytest.approx(float((logits.argmax(1) == images.targets).float().mean()))]
