"""NOAH's search: sub-nets are exactly the small methods, the search is deterministic, resumed, and beats chance."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import refold
from commands import run
from refold.errors import DataError
from refold.hosting import adapters_of
from refold.methods import method_from_json
from refold.search import Candidate, Found, Sizes, Space, SuperNet, evolve, noah
from refold.search import run as search_run
from refold.search.space import Place
from refold.state import state_of
from refold.training import TrainConfig, train
from refold.training.build import build_attached
from refold.training.evaluation import load_splits, score
from refold.training.inference import start_accelerator
from refold.training.tasks import Regression, plain_task
from refold.training.trainer import Trainer
from zoo import build, images, perturb, relative

MAXIMA = {
    "VPT": refold.VPT(tokens=4),
    "LoRA": refold.LoRA(rank=4),
    "Adapter": refold.Adapter(variant="noah", hidden=4),
    "AdaptFormer": refold.AdaptFormer(hidden=4),
    "Houlsby": refold.Adapter(variant="houlsby", hidden=4),
    "Adapter+": refold.Adapter(variant="adapter+", hidden=4),
    "linear Adapter": refold.Adapter(hidden=4, activation="identity"),
    "LoRA on query and value": refold.LoRA(rank=4, rows=("q", "v"), scale=0.5),
}
CHOICES = (0, 1, 2, 4)


def supernet(family: str, *names: str, cap: int | None = None) -> SuperNet:
    parts = [MAXIMA[name] for name in names]
    method = parts[0] if len(parts) == 1 else refold.Compose(parts)
    model = refold.attach(build(family, torch.float64), method)
    perturb(refold.trainable_parameters(model))
    return SuperNet(model, Space.of(model, CHOICES, cap))


def alone(net: SuperNet, sizes: Sizes, family: str) -> nn.Module:
    """A fresh backbone with the sub-net's method and nothing else on it."""
    small = refold.attach(build(family, torch.float64), net.space.method(sizes))
    net.hand_down(sizes, small)
    return small


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("vit", ("LoRA",)),
        ("vit", ("VPT", "LoRA", "Adapter")),
        ("vit_with_layer_scale", ("VPT", "LoRA", "Adapter", "AdaptFormer")),
        ("vit_with_registers", ("VPT", "Adapter")),
        ("swin", ("VPT", "LoRA", "Adapter")),
        ("torchvision_vit", ("VPT", "LoRA")),
        ("convnext", ("LoRA", "Adapter", "AdaptFormer")),
        ("resnet", ("LoRA",)),
        ("vit", ("LoRA on query and value", "linear Adapter")),
        ("vit", ("Houlsby", "Adapter+")),
    ],
    ids=str,
)
def test_a_subnet_is_the_small_method_with_the_first_rows(family, names):
    net, random = supernet(family, *names), Random(0)
    x, whole = images(net.model), net.model(images(net.model))
    state = {name: value.clone() for name, value in net.model.state_dict().items()}
    extremes = [tuple(end(p.choices) for p in net.space.places) for end in (min, max)]
    for sizes in (*extremes, *(net.space.sample(random) for _ in range(3))):
        small = alone(net, sizes, family)
        with net.chosen(sizes):
            assert relative(net.model(x), small(x)) <= 1e-12
        assert refold.explain(small).adapter_parameters == net.space.cost(sizes)
        if any(sizes):
            found = {(site.path, site.slot) for site in state_of(small).record().sites}
            assert found == {
                (p.site.path, p.site.slot) for p, size in zip(net.space.places, sizes, strict=True) if size
            }
    assert torch.equal(net.model(x), whole)
    assert all(torch.equal(value, state[name]) for name, value in net.model.state_dict().items())


def test_gradients_reach_the_rows_in_use_and_no_others():
    net = supernet("vit", "VPT", "LoRA", "Adapter")
    sizes = net.space.sample(Random(3))
    small, x = alone(net, sizes, "vit").train(), images(net.model, 4)
    small(x).square().sum().backward()
    with net.chosen(sizes):
        net.model.train()(x).square().sum().backward()
    record = state_of(small).record()
    others = adapters_of(small, record.sites, "default")
    wanted = {place.site.key: dict(others[key].named_parameters()) for place, _, key in net.space.sites(sizes)}
    adapters = adapters_of(net.model, state_of(net.model).record().sites, "default")
    for place, size in zip(net.space.places, sizes, strict=True):
        for name, parameter in adapters[place.site.key].named_parameters():
            if size == 0:
                assert parameter.grad is None
                continue
            used = tuple(slice(length) for length in place.shapes[size][name])
            assert relative(parameter.grad[used], wanted[place.site.key][name].grad) <= 1e-10
            outside = parameter.grad.clone()
            outside[used] = 0
            assert not outside.any()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (refold.DoRA(rank=4), "DoRA: its adapters do not nest"),
        (refold.VPT(tokens=4, deep=False), "has its adapter from another place"),
        (refold.LoRA(rank=4, overrides=(("blocks.0.attn.qkv", 2, 1.0),)), "LoRA: has overrides already"),
        (refold.LoRA(rank=3), r"rank=3 among them"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_searched_is_refused(method, message):
    model = refold.attach(build("vit"), method)
    with pytest.raises(refold.SiteError, match=message):
        Space.of(model, CHOICES)


def toy(cap: int | None = None) -> Space:
    shapes = {size: {"w": torch.Size([size])} if size else {} for size in CHOICES}
    site = state_of(supernet("vit", "LoRA").model).record().sites[0]
    places = tuple(Place(site, shapes) for _ in range(12))
    return Space((MAXIMA["LoRA"],), places, 48 if cap is None else cap)


def hidden_target(space: Space, seed: int):
    target = Space(space.methods, space.places, 10**9).sample(Random(-seed - 1))

    def score(sizes: Sizes) -> Candidate:
        error = sum(abs(CHOICES.index(a) - CHOICES.index(b)) for a, b in zip(sizes, target, strict=True))
        return Candidate(sizes, space.cost(sizes), {"error": error}, (-error,))

    return score


def test_the_evolution_beats_chance_under_the_cap():
    space = toy(cap=24)
    found, chance = [], []
    for seed in range(10):
        score, random = hidden_target(space, seed), Random(seed)
        tried = evolve(space, score, evaluations=100, population=20, parents=4, seed=seed)
        assert len({c.sizes for c in tried}) == len(tried) == 100
        assert all(c.parameters == space.cost(c.sizes) <= 24 for c in tried)
        assert tried == evolve(space, score, evaluations=100, population=20, parents=4, seed=seed)
        found.append(max(c.worth for c in tried)[0])
        chance.append(max(score(space.sample(random)).worth for _ in range(100))[0])
    assert sum(found) > sum(chance) + 10
    assert all(f >= c for f, c in zip(found, chance, strict=True))


def test_it_ends_when_every_subnet_is_known():
    space = toy()
    space = Space(space.methods, space.places[:2], 10**9)
    tried = evolve(space, hidden_target(space, 0), evaluations=1000, population=5, parents=2)
    assert len(tried) >= 14  # of 16; the last ones are found by chance


# -- from data to a trained sub-net ----------------------------------------------------------------------------

SEARCH: dict[str, Any] = {"choices": (0, 1, 2), "supernet_epochs": 2, "evaluations": 6, "population": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty noisy images, the classes overlapping in brightness."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, brightness in (("dark", 115), ("light", 140)):
        (root / name).mkdir()
        for i in range(20):
            pixels = noise.normal(noise.normal(brightness, 15), 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def config(pictures: Path, output: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        data=str(pictures),
        model="timm/test_vit",
        pretrained=False,
        method=refold.Compose([refold.VPT(tokens=2), refold.LoRA(rank=2), refold.Adapter(variant="noah", hidden=2)]),
        output=str(output),
        fractions=(24, 8, 8),
        image_size=32,
        epochs=2,
        batch_size=8,
        lr=3e-3,
        precision="fp32",
        attention="default",
    )
    return base.replace(**changes)


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """The uninterrupted search that others are compared with."""
    folder = tmp_path_factory.mktemp("searches") / "whole"
    return folder, noah(config(pictures, folder), cap=700, **SEARCH)


def test_the_winner_is_the_best_on_validation_and_trained_from_its_weights(whole, pictures):
    folder, found = whole
    notes = json.loads((folder / "search.json").read_text())
    assert [row["sizes"] for row in notes["candidates"]] == [" ".join(map(str, c.sizes)) for c in found.candidates]
    assert len({c.sizes for c in found.candidates}) == 6
    assert all(c.parameters <= 700 for c in found.candidates)
    assert found.best.worth == max(c.worth for c in found.candidates)
    assert found.best == found.candidates[notes["best"]]
    assert method_from_json(notes["method"]) == found.method == TrainConfig.load(folder / "best").method
    assert refold.explain(found.result.model).adapter_parameters == found.best.parameters
    # What it was trained from, attached on its own, scores as the sub-net did.
    started = TrainConfig.load(folder / "best")
    assert started.start == str(folder / "start.safetensors")
    splits = load_splits(started)
    model, preprocessing = build_attached(started, splits.task, splits.classes)
    assert splits.val is not None
    again = score(
        model.eval(), splits.val, splits.val.targets, preprocessing, plain_task("classify", splits.classes),
        accelerator=start_accelerator(), batch_size=8,
    )  # fmt: skip
    assert again.metrics == pytest.approx(found.best.metrics, rel=1e-5)


def interrupted_at(call: int, function: Any) -> Any:
    """``function``, of which the given call raises KeyboardInterrupt."""
    calls = iter(range(1, 1000))

    def run(*args: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*args, **options)

    return run


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("refold.training.trainer.Trainer._train_epoch", 2),  # the super-net's second
        ("refold.search.run.score", 4),
        ("refold.training.trainer.Trainer._train_epoch", 4),  # the winner's second
    ],
)
def test_a_search_that_was_stopped_goes_on_to_the_same_result(target, call, whole, pictures, tmp_path, monkeypatch):
    settings = config(pictures, tmp_path / "runs")
    with monkeypatch.context() as patch:
        module, _, name = target.rpartition(".")
        owner = {"refold.search.run": search_run, "refold.training.trainer.Trainer": Trainer}[module]
        patch.setattr(owner, name, interrupted_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt) as stop:
            noah(settings, cap=700, **SEARCH)
    assert "--resume" in stop.value.__notes__[0]
    with pytest.raises(DataError, match="not empty"):
        noah(settings, cap=700, **SEARCH)
    with pytest.raises(DataError, match="cannot be resumed with 600"):
        noah(settings, cap=600, resume=True, **SEARCH)
    found = noah(settings, cap=700, resume=True, **SEARCH)
    assert found.candidates == whole[1].candidates
    assert found.method == whole[1].method
    for name in ("supernet/checkpoint.pt", "search.json", "start.safetensors"):
        assert (tmp_path / "runs" / name).exists()
    ours, theirs = (load_file(f / "best" / "adapter.safetensors") for f in (tmp_path / "runs", whole[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_command_finds_and_trains(pictures, tmp_path):
    words = (
        *("search", str(pictures), "--method", "noah", "--model", "timm/test_vit", "--random-weights", "-o", "found"),
        *("--space", "LoRA(rank=2) + AdaptFormer(hidden=2)", "--choices", "0, 1,2", "--cap", "900"),
        *("--supernet-epochs", "1", "--evaluations", "3", "--population", "2", "--epochs", "1", "--batch-size", "8"),
        *("--split", "24", "8", "8", "--image-size", "32"),
    )
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Found: Compose([LoRA(rank=2" in done.stdout
    assert "Report: found/best/report.html" in done.stdout
    assert (tmp_path / "found" / "best" / "summary.json").exists()
    assert "--resume" in run(*words, cwd=tmp_path).stderr
    for option, value, message in (
        ("--method", "chance", "must be one of noah"),
        ("--choices", "a,b", "must be whole numbers"),
        ("--choices", "0,1", "rank=2 among them"),
        ("--space", "RepAdapter", "its adapters do not nest"),
        ("--cap", "0", "cap=0 is too small"),
        ("--split", ("24", "0", "8"), "a search needs a validation split"),
    ):
        refused = run(*words, "-o", "refused", option, *([value] if isinstance(value, str) else value), cwd=tmp_path)
        assert refused.returncode == 1
        assert message in refused.stderr


# -- training from an adapter file ------------------------------------------------------------------------------


def test_training_starts_from_a_file(pictures, tmp_path):
    plain = config(pictures, tmp_path / "one", method=refold.LoRA(rank=2), epochs=1)
    first = train(plain)
    again = plain.replace(start=first.adapter, output=str(tmp_path / "two"), lr=1e-12, warmup_lr=0.0, min_lr=0.0)
    second = train(again)
    assert second.metrics["val"] == pytest.approx(first.metrics["val"], rel=1e-4)
    with pytest.raises(DataError, match=r"holds LoRA\(rank=2\), not LoRA\(rank=1\)"):
        train(again.replace(method=refold.LoRA(rank=1), output=str(tmp_path / "three")))


def test_a_regression_that_starts_from_a_file_begins_in_standard_units():
    head = nn.Sequential(nn.Linear(3, 1))
    model, task = nn.Sequential(nn.Identity(), head), Regression(mean=7.0, std=2.0)
    x = torch.randn(4, 3)
    before = model(x)
    task.finish(model, ("1",))
    assert torch.allclose(model(x), 2 * before + 7)
    task.begin(model, ("1",))
    assert torch.allclose(model(x), before, atol=1e-6)
