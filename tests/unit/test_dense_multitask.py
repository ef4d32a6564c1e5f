"""Several dense tasks on one encoder: each against the same task alone, checkpoints, files, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import refold
from refold.dense import load_encoder
from refold.dense.multitask import MultiTask, MultiTaskProblem, fit_tasks
from refold.detection import BoxLoader, BoxSet, BoxSplits, build_detector
from refold.detection.boxes import Object
from refold.errors import DataError, SiteError
from refold.hosting import hooks_left
from refold.preprocessing import Preprocessing
from refold.segmentation import Labels, MaskLoader, MaskSet, MaskSplits, Segmenter, segmentation_loss
from refold.training.recipe import Recipe
from refold.training.run import RunFolder

SIDE, RATE = 64, 1e-3
PREPROCESSING = Preprocessing(size=(SIDE, SIDE))
#: The learning rate is constant, so that a task alone, which has fewer steps, sees the same.
RECIPE = Recipe(
    epochs=2, batch_size=2, lr=RATE, min_lr=RATE, warmup_epochs=0, precision="fp32", attention="default", seed=3
)
OWN: dict[str, refold.Method] = {"stuff": refold.RepAdapter(rank=2, groups=1, dropout=0.0), "cars": refold.LoRA(rank=2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of a red and a blue rectangle, and masks that know them as 1 and 2."""
    root = tmp_path_factory.mktemp("rectangles")
    for k in range(6):
        picture, mask = Image.new("RGB", (SIDE, SIDE), (110, 120, 110)), Image.new("L", (SIDE, SIDE), 0)
        for value, box in enumerate(boxes_of(k), start=1):
            picture.paste((250, 40, 40) if value == 1 else (40, 40, 250), box)
            mask.paste(value, box)
        picture.save(root / f"{k}.png")
        mask.save(root / f"{k}_mask.png")
    return root


def boxes_of(k: int) -> list[tuple[int, int, int, int]]:
    return [(4 + k, 8, 28 + k, 40), (34, 12 + 2 * k, 60, 50)]


def masks(folder: Path, which: range) -> MaskSet:
    names = [str(folder / f"{k}.png") for k in which]
    return MaskSet(names, [n.replace(".png", "_mask.png") for n in names], Labels.plain(["ground", "red", "blue"]))


def boxes(folder: Path, which: range) -> BoxSet:
    found = [[Object(box, 1, False, 700.0) for box in boxes_of(k)] for k in which]
    return BoxSet([str(folder / f"{k}.png") for k in which], [(SIDE, SIDE)] * len(which), found, classes=["block"])


def data(folder: Path, cars: range = range(4), *, validated: bool = False) -> dict[str, MaskSplits | BoxSplits]:
    stuff, val = masks(folder, range(4)), range(4, 6)
    return {
        "stuff": MaskSplits(stuff, masks(folder, val) if validated else None, None, stuff.classes, "folders"),
        "cars": BoxSplits(boxes(folder, cars), boxes(folder, val) if validated else None, None, ["block"]),
    }


def plain(name: str = "test_convnext") -> MultiTask:
    torch.manual_seed(0)
    encoder = load_encoder(f"timm/{name}", pretrained=False, image_size=SIDE).encoder
    cars = build_detector(
        "retinanet", encoder, 1, preprocessing=PREPROCESSING, min_size=SIDE, max_size=SIDE, channels=8
    )
    return MultiTask({"stuff": Segmenter(encoder, "linear", 3), "cars": cars})


def stirred(model: MultiTask) -> MultiTask:
    """All that trains away from its start, where adapters do nothing."""
    with torch.no_grad():
        for parameter in refold.trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def output(model: Any, task: str, images: Tensor) -> Tensor:
    """The segmenter's logits; the detector's scores and boxes of all anchors."""
    with torch.no_grad():
        if task == "stuff":
            return model(images)
        levels = list(model.backbone(images).values())
        return torch.cat([part.flatten() for part in model.head(levels).values()])


def test_each_task_learns_what_it_learns_alone_from_the_same_batches(folder: Path) -> None:
    model = stirred(plain().attach(OWN))
    alone = {task: copy.deepcopy(model) for task in OWN}
    fit_tasks(model, data(folder), PREPROCESSING, RECIPE)
    loaders: dict[str, Any] = {
        "stuff": MaskLoader(
            masks(folder, range(4)), PREPROCESSING, batch_size=2, augment="none", shuffle=True, drop_last=True, seed=3
        ),
        "cars": BoxLoader(boxes(folder, range(4)), batch_size=2, augment="none", shuffle=True, drop_last=True, seed=3),
    }
    for task, twin in alone.items():
        own: Any = twin.models[task].train()
        refold.activate(twin.body, task)
        trained = {name: p for name, p in own.named_parameters() if p.requires_grad}
        decays = [p for p in trained.values() if p.dim() > 1]
        rest = [p for p in trained.values() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}], lr=RATE, fused=True
        )
        for epoch in range(RECIPE.epochs):
            loaders[task].set_epoch(epoch)
            for images, truth in loaders[task]:
                optimizer.zero_grad()
                loss: Any = (
                    segmentation_loss(own(images), truth) if task == "stuff" else sum(own(images, truth).values())
                )
                loss.backward()
                optimizer.step()
        together = dict(model.models[task].named_parameters())
        assert any(f".refold.{task}." in name for name in trained)
        assert not any(f".refold.{other}." in name for name in trained for other in OWN if other != task)
        for name, parameter in trained.items():
            torch.testing.assert_close(together[name], parameter, rtol=1e-5, atol=1e-6, msg=name)
    frozen = dict(plain().body.named_parameters())
    kept = dict(model.body.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_switching_is_refolds_own_and_keeps_what_the_other_task_has_learnt(name: str) -> None:
    model = plain(name).attach({"stuff": refold.E3VA(rank=2), "cars": refold.RepAdapter(rank=2, groups=1, dropout=0.0)})
    images = torch.randn(2, 3, SIDE, SIDE)
    stirred(model)
    for task in model.tasks:
        model.activate(task)
        found = output(model.models[task], task, images)
        refold.activate(model.body, next(other for other in model.tasks if other != task))
        wrong = output(model.models[task], task, images)
        refold.activate(model.body, task)
        assert torch.equal(found, output(model.models[task], task, images))
        assert not torch.allclose(found, wrong)
    model.activate("cars")
    model.train()
    optimizer = torch.optim.AdamW(refold.param_groups(model, lr=0.01))
    targets = [{"boxes": torch.tensor([[4.0, 8, 28, 40]]), "labels": torch.tensor([1])}] * 2
    held: dict[str, Any] = {}
    for step, task in enumerate(["stuff", "cars"] * 2):
        mine = {n: p for n, p in model.named_parameters() if f".refold.{task}" in n}
        others = {n: p for n, p in model.named_parameters() if ".refold." in n and n not in mine}
        before = {n: p.detach().clone() for n, p in others.items()}
        averages = {n: optimizer.state[p]["exp_avg"].clone() for n, p in others.items() if p in optimizer.state}
        loss: Any
        if task == "stuff":
            loss = segmentation_loss(model("stuff", images), torch.randint(0, 3, (2, SIDE, SIDE)))
        else:
            loss = sum(model("cars", list(images.sigmoid()), targets).values())
        loss.backward()
        assert not [n for n, p in others.items() if p.grad is not None]
        assert any(p.grad is not None for p in mine.values())  # maps that the head does not read teach nothing
        held[task] = {n: p.detach().clone() for n, p in mine.items()}
        optimizer.step()
        optimizer.zero_grad()
        assert len(averages) > 4 or not step
        assert all(torch.equal(p, before[n]) for n, p in others.items())
        assert all(torch.equal(optimizer.state[others[n]]["exp_avg"], value) for n, value in averages.items())
        assert any(not torch.equal(p, held[task][n]) for n, p in mine.items())


def test_one_adapter_for_all_learns_from_all_with_their_weights(folder: Path) -> None:
    model = plain().attach(refold.RepAdapter(rank=2, groups=1, dropout=0.0)).train()
    found = []
    for weights in ({"stuff": 1.0, "cars": 1.0}, {"stuff": 0.5, "cars": 3.0}):
        problem = make(model, folder, weights)
        gradients = {}
        for task, batch in list(problem.batches(0, 0))[:2]:
            model.zero_grad()
            problem.loss(model, (task, batch)).backward()
            gradients[task] = {n: p.grad.clone() for n, p in model.body.named_parameters() if p.grad is not None}
        found.append(gradients)
    ours = {n for n, _ in model.body.named_parameters() if ".refold.shared." in n}
    for task, factor in (("stuff", 0.5), ("cars", 3.0)):
        one, weighted = (gradients[task] for gradients in found)
        assert one.keys() == weighted.keys() == ours
        assert any(bool(gradient.any()) for gradient in one.values())
        for name, gradient in one.items():
            torch.testing.assert_close(weighted[name], factor * gradient, rtol=1e-4, atol=1e-7)


def make(model: MultiTask, folder: Path, weights: dict[str, float] | None = None, **options: Any) -> MultiTaskProblem:
    from refold.dense.job import make_problem
    from refold.training.inference import start_accelerator

    accelerator, parts = start_accelerator(), data(folder, **options)
    problems = {
        task: make_problem(model.models[task], part, PREPROCESSING, RECIPE)(accelerator, "fp32")
        for task, part in parts.items()
    }
    return MultiTaskProblem(model, problems, accelerator, weights)


def test_an_epoch_passes_all_data_once_evenly_spread(folder: Path) -> None:
    model = plain().attach(OWN)
    problem = make(model, folder)
    assert [task for task, _ in problem.batches(0, 0)] == ["stuff", "cars", "stuff", "cars"]
    uneven = make(model, folder, cars=range(2))
    # Two batches of masks are due at 1/4 and 3/4 of the epoch, one of boxes in its middle.
    assert [task for task, _ in uneven.batches(0, 0)] == ["stuff", "cars", "stuff"]
    assert (uneven.steps, uneven.images) == (3, 6)
    seen = [batch for task, batch in problem.batches(1, 0) if task == "stuff"]
    again = [batch for task, batch in problem.batches(1, 0) if task == "stuff"]
    assert all(a[0] == b[0] and torch.equal(a[1][0], b[1][0]) for a, b in zip(seen, again, strict=True))
    pictures = torch.cat([images for _, (images, _) in seen])
    assert sorted(image for keys, _ in seen for image, _ in keys) == [0, 1, 2, 3]
    assert len({tuple(image.flatten()[::97].tolist()) for image in pictures}) == 4


def test_every_task_is_validated_with_its_own_adapter(folder: Path) -> None:
    model = stirred(plain().attach(OWN))
    problem = make(model, folder, validated=True)
    row = problem.validate()
    assert row is not None
    refold.activate(model.body, "stuff")
    logits = [output(model.models["stuff"], "stuff", image[None]) for image, _ in _normalised(folder, range(4, 6))]
    truth = torch.stack([mask for _, mask in _normalised(folder, range(4, 6))])
    found = torch.cat(logits).argmax(1)
    ious = []
    for k in range(3):
        union = ((found == k) | (truth == k)).sum()
        if union:
            ious.append(float(((found == k) & (truth == k)).sum() / union))
    assert row["stuff_miou"] == pytest.approx(sum(ious) / len(ious), abs=1e-6)
    assert row["mean"] == pytest.approx((row["stuff_miou"] + row["cars_ap"]) / 2)
    assert make(model, folder).validate() is None


def _normalised(folder: Path, which: range) -> list[tuple[Tensor, Tensor]]:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    read = (masks(folder, which).read(k) for k in range(len(which)))
    return [((image.float() / 255 - mean) / std, mask.long()) for image, mask in read]


def test_a_resumed_run_ends_where_the_whole_one_does(folder: Path, tmp_path: Path) -> None:
    def run(path: Path, stop: bool = False, resume: bool = False) -> dict[str, Tensor]:
        def interrupt(row: dict[str, Any]) -> None:
            if stop and row["epoch"] == 2:
                raise KeyboardInterrupt

        model = plain().attach(OWN)
        recipe = Recipe(**{**RECIPE.to_json(), "min_lr": 1e-5})
        place = RunFolder(path)
        path.mkdir(exist_ok=True)
        parts = data(folder, validated=True)
        fit_tasks(model, parts, PREPROCESSING, recipe, folder=place, resume=resume, on_epoch=interrupt)
        return {n: p.detach().clone() for n, p in model.named_parameters()}

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=True)
    resumed = run(tmp_path / "parts", resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    start = dict(plain().attach(OWN).named_parameters())
    assert all(any(f".refold.{task}." in n and not torch.equal(whole[n], p) for n, p in start.items()) for task in OWN)


def test_adapters_of_all_tasks_stay_in_single_precision_and_learn_in_bfloat16(folder: Path) -> None:
    model = plain().attach(OWN)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit_tasks(model, data(folder), PREPROCESSING, Recipe(**{**RECIPE.to_json(), "precision": "bf16"}))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        inside = name.startswith("models.stuff.encoder.body.") and ".refold." not in name
        assert not inside or torch.equal(parameter, start[name])
    for task in OWN:
        assert any(f".refold.{task}." in n and not torch.equal(p, start[n]) for n, p in model.named_parameters())


def test_a_file_for_every_task_fits_a_model_of_that_task_alone(tmp_path: Path) -> None:
    model = stirred(plain().attach(OWN))
    images = torch.randn(1, 3, SIDE, SIDE)
    for task, path in model.save(tmp_path).items():
        model.activate(task)
        fresh = plain().models[task].eval()
        refold.load(fresh, path)
        assert torch.equal(output(fresh, task, images), output(model.models[task], task, images))
        assert path.stat().st_size < 4 * sum(p.numel() for p in model.models[task].parameters())
    again = plain().eval()
    for task in OWN:
        refold.load(again.models[task], tmp_path / f"{task}.safetensors", name=task)
    for task in OWN:
        model.activate(task)
        again.activate(task)
        assert torch.equal(output(again.models[task], task, images), output(model.models[task], task, images))


def test_merged_tasks_are_switched_between() -> None:
    model = stirred(plain().attach(OWN))
    images = torch.randn(1, 3, SIDE, SIDE)
    before = {}
    for task in OWN:
        model.activate(task)
        before[task] = output(model.models[task], task, images)
    refold.merge(model.body)
    for task in [*OWN, *OWN]:
        model.activate(task)
        torch.testing.assert_close(output(model.models[task], task, images), before[task], rtol=1e-4, atol=1e-4)
    assert math.isfinite(float(before["stuff"].sum()))


def test_models_without_an_encoder_in_common_are_refused() -> None:
    one, other = plain(), plain()
    with pytest.raises(DataError, match="cars: its encoder is not that of 'stuff'"):
        MultiTask({"stuff": one.models["stuff"], "cars": other.models["cars"]})
    with pytest.raises(DataError, match="stuff: its model has no encoder"):
        MultiTask({"stuff": nn.Linear(2, 2)})
    with pytest.raises(DataError, match="there is no task"):
        MultiTask({})
    for name in ("shared", "two words", "keys"):
        with pytest.raises(DataError, match=f"'{name}' cannot be a task's name"):
            MultiTask({name: one.models["stuff"]})


def test_adapters_that_do_not_go_with_the_tasks_are_refused() -> None:
    model = plain()
    with pytest.raises(DataError, match="methods: are for"):
        model.attach({"stuff": refold.LoRA()})
    with pytest.raises(SiteError, match=r"stuff: its method BitFit.* trains .* all tasks share"):
        model.attach({"stuff": refold.BitFit(), "cars": refold.LoRA(rank=2)})
    assert hooks_left(model) == 0
    model.attach(refold.BitFit())  # one for all may
    with pytest.raises(SiteError, match="has adapters already"):
        model.attach(refold.LoRA())
    with pytest.raises(DataError, match="unknown task 'sky'"):
        model("sky", torch.zeros(1, 3, SIDE, SIDE))
    refold.detach(model.body)
    for name in ("stuff", "other"):
        refold.attach(model.body, refold.LoRA(rank=2), name=name, trainable=())
    with pytest.raises(SiteError, match="no adapter is called 'cars'"):
        model.activate("cars")


def test_data_and_settings_that_do_not_fit_are_refused_before_training(folder: Path) -> None:
    model, parts = plain(), data(folder)
    with pytest.raises(SiteError, match="nothing is attached"):
        fit_tasks(model, parts, PREPROCESSING, RECIPE)
    model.attach(OWN)
    swapped: dict[str, Any] = {"stuff": parts["cars"], "cars": parts["stuff"]}
    more = MaskSplits(masks(folder, range(4)), None, None, ["a", "b", "c", "d"], "folders")
    mixed = Recipe(**{**RECIPE.to_json(), "mixup": 0.5})
    chosen = Recipe(**{**RECIPE.to_json(), "select": "miou"})
    for given, recipe, weights, expected in (
        ({"stuff": parts["stuff"]}, RECIPE, None, "parts: are for"),
        (swapped, RECIPE, None, "stuff: BoxSplits are not for a Segmenter"),
        ({**parts, "stuff": more}, RECIPE, None, "stuff: has 3 classes, its data 4"),
        (parts, mixed, None, "mixup: is not for task"),
        (parts, chosen, None, "select: the best epoch is chosen by the mean"),
        (parts, RECIPE, {"stuff": 1.0}, "weights: are for"),
        (parts, RECIPE, {"stuff": 1.0, "cars": 0.0}, "weights of cars: must be positive"),
        (parts, RECIPE, {"stuff": 1.0, "cars": math.nan}, "weights of cars: must be positive"),
    ):
        with pytest.raises(DataError, match=expected):
            fit_tasks(model, given, PREPROCESSING, recipe, weights=weights)
