"""PACE's consistency regularisation: the noise and the loss against the formula, what it leaves alone, refusals."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import refold
from reference import formulas, ladders
from refold import Preprocessing
from refold.data import ImageSet
from refold.hosting import hosted
from refold.perturbation import Noise, perturbed
from refold.training import Recipe, RunFolder, fit
from refold.training.consistency import Consistency, make_consistency
from zoo import build, images, perturb

SIGMA, WEIGHT = 0.6, 0.3
SITES = ("conv", "fc1")
Array = np.ndarray


class Net(nn.Module):
    """A zero-padded convolution, a layer on tokens, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.fc1(tokens)).mean(1))


def attached(method: refold.Method, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = refold.attach(Net().to(dtype), method, example=torch.randn(1, 3, 5, 5, dtype=dtype))
    perturb(refold.trainable_parameters(model), 0.3)
    return model.eval()


class Draws:
    """The factors 1 + sigma n in the order in which they are drawn."""

    def __init__(self, seed: int, samples: int, sigma: float = SIGMA) -> None:
        self.random, self.samples, self.sigma = torch.Generator().manual_seed(seed), samples, sigma

    def __call__(self, channels: int, *, maps: bool) -> Array:
        shape = (self.samples, channels, 1, 1) if maps else (self.samples, 1, channels)
        return (1 + self.sigma * torch.randn(shape, generator=self.random)).double().numpy()


def numbers(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().double().numpy().copy() for name, value in module.named_parameters()}


def by_hand(model: nn.Module, x: Array, draws: Draws) -> Array:
    """One noisy pass, from the papers' formulas of the adapters."""
    conv, fc1, head = (numbers(model.get_submodule(path)) for path in ("conv", "fc1", "head"))
    parts = [{k.removeprefix("refold.default."): v for k, v in part.items()} for part in (conv, fc1)]
    kind = type(hosted(model)["conv"]["default"]).__name__
    if kind == "LinearBottleneck":
        maps = []
        for part in parts:
            bottleneck = (part["down"], part["up"], part["down_bias"], part["up_bias"])
            maps.append(formulas.repadapter(*bottleneck, scale=0.7, groups=1))
        (before, shift), (inner, inner_shift) = maps
        added = np.einsum("oc,bchw->bohw", before - np.eye(3), x)
        y = formulas.conv2d(x + draws(3, maps=True) * added, conv["weight"], conv["bias"], padding=1)
        # Zeros around the image are not shifted: the shift comes behind the layer, with noise of its own.
        moved = conv["weight"].sum((2, 3)) @ shift
        y = y + draws(4, maps=True) * moved[None, :, None, None]
        tokens = y.reshape(len(x), 4, -1).transpose(0, 2, 1)
        tokens = tokens + draws(4, maps=False) * (tokens @ (inner - np.eye(4)).T + inner_shift)
        hidden = tokens @ fc1["weight"].T + fc1["bias"]
    elif kind == "LowRank":
        changed = [formulas.lora(part["weight"], part["down"], part["up"], 0.7) for part in parts]
        y = formulas.conv2d(x, conv["weight"], conv["bias"], padding=1)
        y = y + draws(4, maps=True) * formulas.conv2d(x, changed[0] - conv["weight"], None, padding=1)
        tokens = y.reshape(len(x), 4, -1).transpose(0, 2, 1)
        hidden = tokens @ fc1["weight"].T + fc1["bias"]
        hidden = hidden + draws(6, maps=False) * (tokens @ (changed[1] - fc1["weight"]).T)
    else:
        assert kind == "ScaleShift"
        y = formulas.conv2d(x, conv["weight"], conv["bias"], padding=1)
        gamma, beta = (parts[0][leaf][None, :, None, None] for leaf in ("gamma", "beta"))
        y = y + draws(4, maps=True) * ((gamma - 1) * y + beta)
        tokens = y.reshape(len(x), 4, -1).transpose(0, 2, 1)
        hidden = tokens @ fc1["weight"].T + fc1["bias"]
        hidden = hidden + draws(6, maps=False) * ((parts[1]["gamma"] - 1) * hidden + parts[1]["beta"])
    return np.tanh(hidden).mean(1) @ head["weight"].T + head["bias"]


METHODS = {
    "channels, before": refold.RepAdapter(rank=2, groups=1, scale=0.7, dropout=0.0, sites=SITES),
    "channels, after": refold.SSF(sites=SITES),
    "weights": refold.LoRA(rank=2, scale=0.7, sites=SITES),
}


def passes(model: nn.Module, x: Tensor, seed: int, sigma: float = SIGMA) -> tuple[Tensor, Tensor, Tensor]:
    """Both outputs and the penalty."""
    found = Consistency(WEIGHT, Noise(sigma, torch.device("cpu")), model)
    found.noise.generator.manual_seed(seed)
    with found.step():
        first, second = found.passes(lambda: model(x), nullcontext())
    return first, second, found.penalty(first, second)


@pytest.mark.parametrize("kind", METHODS)
def test_two_noisy_passes_are_the_formula(kind: str) -> None:
    model, x = attached(METHODS[kind]), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    first, second, penalty = passes(model, x, seed=7)
    draws = Draws(7, 4)
    expected = [by_hand(model, x.numpy(), draws) for _ in range(2)]
    np.testing.assert_allclose(first.detach().numpy(), expected[0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(second.detach().numpy(), expected[1], rtol=1e-10, atol=1e-12)
    wanted = ladders.consistency(expected[0], expected[1], WEIGHT)
    assert float(penalty.detach()) == pytest.approx(wanted, rel=1e-5)
    assert wanted > 1e-5


@pytest.mark.parametrize("kind", METHODS)
def test_the_gradient_of_the_penalty_is_that_of_the_formula(kind: str) -> None:
    model, x = attached(METHODS[kind]), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    model.zero_grad()
    first, second, _ = passes(model, x, seed=7)
    (WEIGHT * (first - second).square().sum(1).mean()).backward()

    def value() -> float:
        draws = Draws(7, 4)
        return ladders.consistency(*(by_hand(model, x.numpy(), draws) for _ in range(2)), WEIGHT)

    for name, parameter in refold.trainable_parameters(model).items():
        entry = parameter.detach().view(-1)[:1]
        entry += 1e-6
        above = value()
        entry -= 2e-6
        below = value()
        entry += 1e-6
        assert parameter.grad is not None
        found = float(parameter.grad.view(-1)[0])
        assert found == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-8), name


def test_a_side_adapter_gets_noise_on_what_it_adds() -> None:
    model = refold.attach(build("vit", torch.float64), refold.AdaptFormer(hidden=4, scale=0.5, dropout=0.0))
    perturb(refold.trainable_parameters(model), 0.3)
    x = images(model, count=3)
    entering, leaving = [], []
    model.blocks[0].register_forward_pre_hook(lambda module, args: entering.append(args[0].detach()))
    model.blocks[1].register_forward_hook(lambda module, args, output: leaving.append(output.detach()))
    passes(model, x, seed=3)
    found = [numbers(slot["default"]) for slot in hosted(model).values()]
    refold.detach(model).requires_grad_(False)
    draws, stream = Draws(3, 3), entering[0]
    assert torch.equal(entering[1], stream)
    for block, part in zip(model.blocks, found, strict=True):
        stream = stream + block.attn(block.norm1(stream))
        hidden = np.maximum(stream.numpy() @ part["down.weight"].T + part["down.bias"], 0)
        added = 0.5 * (hidden @ part["up.weight"].T + part["up.bias"])
        stream = stream + block.mlp(block.norm2(stream)) + torch.from_numpy(draws(32, maps=False) * added)
    torch.testing.assert_close(leaving[0], stream)
    assert not torch.allclose(leaving[1], stream)


def test_a_gated_adapter_gets_noise_on_the_whole_of_its_change() -> None:
    """``h + g (a - h)`` becomes ``h + z g (a - h)``."""
    method = refold.Unified(hidden=4, scale=1.0, composition="gated", activation="relu", sites="mlp")
    model = refold.attach(build("vit", torch.float64), method)
    perturb(refold.trainable_parameters(model), 0.3)
    path, slot = next(iter(hosted(model).items()))
    plain, noisy = [], []
    for seen in (plain, noisy):
        handle = model.get_submodule(path).register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.detach())
        )
        if seen is plain:
            model(images(model))
            slot.active = None
            model(images(model))
            slot.active = "default"
        else:
            passes(model, images(model), seed=2)
        handle.remove()
    adapted, bare = plain
    expected = bare.numpy() + Draws(2, 2)(32, maps=False) * (adapted - bare).numpy()
    np.testing.assert_allclose(noisy[0].numpy(), expected, rtol=1e-10, atol=1e-12)


def test_both_passes_see_the_same_dropout_and_drop_path() -> None:
    """Without noise nothing differs, and the random numbers behind the step are those behind one pass."""
    model = refold.attach(build("swin"), refold.RepAdapter(rank=4, dropout=0.5)).train()
    perturb(refold.trainable_parameters(model))
    x = images(model, count=4)
    torch.manual_seed(5)
    first, second, penalty = passes(model, x, seed=1, sigma=0.0)
    behind = torch.get_rng_state()
    assert torch.equal(first, second)
    assert float(penalty.detach()) == 0.0
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), first)
    assert torch.equal(torch.get_rng_state(), behind)
    assert not torch.equal(model(x), first)


@pytest.mark.parametrize("method", [refold.DTL(plus=True), refold.LST(reduction=2)])
def test_adapters_that_hand_something_on_are_perturbed_where_they_add(method: refold.Method) -> None:
    model = refold.attach(build("timm_test_vit4", torch.float64), method)
    perturb(refold.trainable_parameters(model), 0.2)
    x = images(model)
    first, second, _ = passes(model, x, seed=1)
    assert not torch.allclose(first, second)
    (first - second).square().sum().backward()
    assert all(p.grad is not None for n, p in refold.trainable_parameters(model).items() if "head" not in n)


# -- in the loop --------------------------------------------------------------------------------------------------

SIZE = Preprocessing(size=(32, 32))
RECIPE = Recipe(
    epochs=2, batch_size=8, lr=5e-3, attention="default", precision="fp32", consistency=WEIGHT, consistency_noise=SIGMA
)


def image_set(n: int = 16) -> ImageSet:
    pixels = torch.randint(0, 256, (n, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.ones(n, dtype=torch.long)
    labels[: n // 2] = 0
    return ImageSet([f"{i}.png" for i in range(n)], labels, classes=["a", "b"], decoded=pixels.numpy())


def trained(recipe: Recipe, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    torch.manual_seed(0)
    if model is None:
        model = refold.attach(build("vit"), refold.RepAdapter(rank=4), example=torch.randn(1, 3, 32, 32))
        model.head = nn.Linear(32, 2)
        model.head.requires_grad_(True)
    found = fit(model, image_set(), None, SIZE, recipe, classes=["a", "b"], **options)
    return model, found.history


def test_a_steps_loss_is_the_first_passes_and_the_weighted_penalty() -> None:
    class Small(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

    torch.manual_seed(0)
    model = refold.attach(Small(), METHODS["channels, before"], example=torch.randn(1, 3, 32, 32))
    perturb(refold.trainable_parameters(model), 0.3)
    start, seen = copy.deepcopy(model), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    images_of_one_class = image_set()
    images_of_one_class.targets.fill_(1)
    recipe = RECIPE.replace(epochs=1, batch_size=16)
    history = fit(model, images_of_one_class, None, SIZE, recipe, classes=["a", "b"]).history
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    draws = Draws(0x9E3779B9, 16)  # of seed, epoch and process 0
    first, second = (by_hand(start, seen[0].double().numpy(), draws) for _ in range(2))
    entropy = -(first[:, 1] - np.log(np.exp(first).sum(1))).mean()
    assert history[0]["loss"] == pytest.approx(entropy + ladders.consistency(first, second, WEIGHT), rel=1e-5)


def test_validation_and_what_is_left_have_no_noise() -> None:
    model = refold.attach(build("vit"), refold.RepAdapter(rank=4, dropout=0.0))
    model.head = nn.Linear(32, 2).requires_grad_(True)
    noisy: dict[bool, set[bool]] = {True: set(), False: set()}
    slots = hosted(model).values()
    model.register_forward_pre_hook(
        lambda module, args: noisy[module.training].update(slot.noise is not None for slot in slots)
    )
    fit(model, image_set(), image_set(), SIZE, RECIPE, classes=["a", "b"])
    assert noisy == {True: {True}, False: {False}}
    assert all(slot.noise is None for slot in slots)

    def fail(module: nn.Module, args: Any) -> None:
        raise ZeroDivisionError

    model.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        fit(model, image_set(), None, SIZE, RECIPE, classes=["a", "b"])
    assert all(slot.noise is None for slot in slots)


def test_it_changes_what_is_learned_and_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole, history = trained(RECIPE)
    plain, _ = trained(RECIPE.replace(consistency=0.0, consistency_noise=0.0))
    again, _ = trained(RECIPE)

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(RECIPE, folder=RunFolder(tmp_path), on_epoch=stop)
    resumed, after = trained(RECIPE, folder=RunFolder(tmp_path), resume=True)
    assert [row["loss"] for row in after] == [row["loss"] for row in history]
    expected = whole.state_dict()
    for model in (again, resumed):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not torch.equal(plain.state_dict()["head.weight"], expected["head.weight"])


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("open_clip_tower", refold.LoRA(), "its adapter replaces the stored weight and adds nothing"),
        ("vit", refold.SSF(), "its adapter replaces the stored weight and adds nothing"),
        ("vit", refold.VPT(tokens=2), "its adapter puts in tokens and adds nothing"),
        ("vit", refold.BitFit(), "BitFit has no adapters whose results could be perturbed"),
        ("vit", refold.LinearProbe(), "LinearProbe has no adapters whose results could be perturbed"),
    ],
)
def test_what_noise_cannot_reach_is_refused_before_training(family: str, method: refold.Method, reason: str) -> None:
    model = refold.attach(build(family), method)
    with pytest.raises(refold.SiteError, match=f"{reason}.*Train without consistency"):
        make_consistency(RECIPE, model, torch.device("cpu"))
    assert make_consistency(Recipe(), model, torch.device("cpu")) is None


@pytest.mark.parametrize("family", ["open_clip_tower", "vit"])
def test_other_sites_of_such_a_backbone_are_not(family: str) -> None:
    method = refold.LoRA(sites="mlp") if family == "open_clip_tower" else refold.SSF(sites=("*.fc1", "*.fc2"))
    assert make_consistency(RECIPE, refold.attach(build(family), method), torch.device("cpu")) is not None


def test_gradient_checkpoints_are_refused() -> None:
    """What runs again in the backward pass would draw other noise."""
    model = refold.attach(build("vit"), refold.RepAdapter(rank=4))
    perturb(refold.trainable_parameters(model))
    model.set_grad_checkpointing(True)
    noise = Noise(SIGMA, torch.device("cpu"))
    with perturbed(model, noise):
        with noise.drawing():
            loss = model(images(model)).sum()
        with pytest.raises(refold.SiteError, match=r"a gradient checkpoint runs an adapter again.*checkpointing off"):
            loss.backward()
    model(images(model)).sum().backward()


def test_without_noise_a_model_computes_what_it_did() -> None:
    model = attached(METHODS["channels, before"])
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = model(x)
    passes(model, x, seed=1)
    assert torch.equal(model(x), expected)
