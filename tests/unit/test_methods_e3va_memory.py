"""What E3VA keeps for the backward pass, and that gradients do not depend on what is computed again."""

from __future__ import annotations

import copy
import weakref

import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from carriers import attached, gradients, same_gradients
from highways import SWIN, encoder, pictures, swin
from refold.adapters.highway import Joint, Junction, ReadOut
from refold.adapters.rebuilt import normed
from refold.bench.measure import stored_bytes
from refold.errors import SiteError
from zoo import images


def test_the_backbone_keeps_nothing_for_a_backward_pass():
    """Kept are the taps' features, codes of rank channels, and what down-sampling and norms of the state need."""
    model = swin().eval()
    x = images(model, count=4).float()

    def kept(method: refold.Method) -> int:
        refold.attach(model, method)
        found = stored_bytes(lambda: torch.stack([y.square().mean() for y in model(x)]).sum(), model).activations
        refold.detach(model)
        return found

    lean, fat, least = (kept(refold.E3VA(rank=2, recompute=what)) for what in ("inside", "nothing", "taps"))
    full = kept(refold.FullFineTune())
    widths = [16, 32, 64, 128]
    tokens = [4 * (8 >> stage) ** 2 for stage in range(4)]
    taps = sum(2 * d * n * (c + 2) for c, d, n in zip(widths, SWIN["depths"], tokens, strict=True))
    hidden = sum(2 * d * n * (c + 2) for c, d, n in zip(widths, SWIN["depths"], tokens, strict=True))  # 2 x C / 2, U2's
    assert lean >= 4 * taps
    wide = sum(2 * d * n * c for c, d, n in zip(widths, SWIN["depths"], tokens, strict=True))
    assert lean - least >= 4 * wide
    # Codes of rank channels; the results, which the squares keep as well; and a number a token of each norm.
    codes = sum(2 * d * n * 2 for d, n in zip(SWIN["depths"], tokens, strict=True))
    results = sum(n * (c + 1) for c, n in zip(widths, tokens, strict=True))
    assert least == 4 * (codes + results)
    assert 0.9 * 4 * hidden < fat - lean < 1.1 * 4 * hidden
    assert lean < 0.4 * full


def twins(model: nn.Module, method: refold.Method) -> list[nn.Module]:
    """The adapted model, and copies of it that recompute otherwise."""
    attached(model, method)
    found = []
    for recompute in ("nothing", "inside", "taps"):
        found.append(copy.deepcopy(model))
        for module in found[-1].modules():
            if isinstance(module, Junction):
                module.recompute = recompute
            if isinstance(module, Joint):
                module.recompute = recompute == "taps"
    return found


def test_nothing_holds_on_to_the_backbones_features_that_autograd_does_not_show():
    """What runs again in the backward pass must not remember them: the process would keep them all the same."""
    model = attached(encoder("swin"), refold.E3VA(rank=3, recompute="taps"))
    seen: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if not isinstance(module, (Joint, Junction, ReadOut)):
            module.register_forward_hook(
                lambda m, args, output: seen.append(weakref.ref(output)) if isinstance(output, Tensor) else None
            )
    found = model(pictures())
    assert len(seen) > 30
    assert [ref() for ref in seen if ref() is not None and not any(ref() is y for y in found)] == []


@pytest.mark.parametrize("name", ["swin", "test_convnext", "test_vit"])
@pytest.mark.parametrize("method", [refold.E3VA(rank=3), refold.E3VA(rank=3, start="stem", skip=False, tap="stream")])
def test_recomputing_changes_no_gradient(name, method):
    model, x = encoder(name), pictures({"swin": 32, "test_convnext": 64, "test_vit": 160}[name])
    keeping, *others = twins(model, method)
    expected = gradients(keeping, *keeping(x))
    for twin in others:
        same_gradients(gradients(twin, *twin(x)), expected)


def test_the_model_runs_again_as_it_ran():
    """Under autocast, with stochastic depth, beside a method inside the backbone, and for a second backward pass."""
    torch.manual_seed(0)
    model, x = timm.create_model("test_convnext", num_classes=3, drop_path_rate=0.5).train(), pictures(64, 4).float()
    keeping, _, taps = (twin.float() for twin in twins(model, refold.E3VA(rank=3)))

    def run(twin: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = twin(x)
        y.float().square().mean().backward(retain_graph=True)
        state = torch.get_rng_state()
        y.float().square().mean().backward()
        assert torch.equal(torch.get_rng_state(), state)
        return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}

    expected, found = run(keeping), run(taps)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0.05, atol=0.01 * float(gradient.abs().max()), msg=name)

    model, x = encoder("swin"), pictures()
    keeping, _, taps = twins(model, refold.Compose([refold.LoRA(rank=2), refold.E3VA(rank=2)]))
    same_gradients(gradients(taps, *taps(x)), gradients(keeping, *keeping(x)))


def test_two_forwards_before_the_backward_pass_run_again_with_their_own_images():
    keeping, _, taps = twins(encoder("swin"), refold.E3VA(rank=3))
    found = []
    for twin in (keeping, taps):
        first, second = twin(pictures()), twin(pictures(seed=1))
        found.append(gradients(twin, *first, *second))
    same_gradients(*found)


def test_what_is_not_trained_gets_no_gradient_where_the_model_runs_again():
    keeping, _, taps = twins(encoder("swin"), refold.E3VA(rank=3))
    found = []
    for twin in (keeping, taps):
        junctions = [module for module in twin.modules() if isinstance(module, Junction)]
        for junction in junctions[:3]:
            junction.projection.requires_grad_(False)
        found.append(gradients(twin, *twin(pictures())))
        assert all(junction.projection.grad is None for junction in junctions[:3])
    same_gradients(*found)


def test_a_model_changed_before_it_runs_again_is_refused():
    """Weights, mode, or the adapter in use: each would give other features, and so wrong gradients."""

    def heavier(model: nn.Module) -> None:
        with torch.no_grad():
            next(p for p in model.parameters() if not p.requires_grad).mul_(2)

    changes = {
        "weights": (heavier, SiteError, "frozen weights, or modules' training mode"),
        "mode": (lambda model: model.train(), SiteError, "frozen weights, or modules' training mode"),
        "adapter": (lambda model: refold.activate(model, "other"), RuntimeError, "different number of tensors"),
    }
    for change, error, reason in changes.values():
        model = attached(encoder("swin"), refold.E3VA(rank=3, recompute="taps"))
        refold.attach(model, refold.LoRA(rank=2), name="other")
        refold.activate(model, "default")
        loss = sum(y.square().mean() for y in model(pictures()))
        change(model)
        with pytest.raises(error, match=reason):
            loss.backward()


def test_trained_weights_changed_before_the_state_is_made_again_are_refused():
    """What the highway adds is computed again from codes, with the weights of then."""
    model = attached(encoder("swin"), refold.E3VA(rank=3, recompute="taps"))
    loss = sum(y.square().mean() for y in model(pictures()))
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, Junction)).up[1].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bias", [15.0, 17.0, None])
def test_a_norm_whose_output_does_not_tell_its_input_keeps_that(bias):
    """Steep biases, or a weight of zero (None); at what it still takes, gradients are those of the plain norm."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), nn.Parameter(torch.ones(8).double())
    shift, upper = nn.Parameter(torch.zeros(8).double()), torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        (weight if bias is None else shift)[3] = 0.0 if bias is None else bias
    tensors = (x, weight, shift)
    result = normed(*tensors, 1e-5)
    assert (type(result.grad_fn).__name__ == "_NormedBackward") == (bias == 15.0)
    expected = nn.functional.layer_norm(x, (8,), weight, shift, 1e-5)
    assert torch.equal(result, expected)
    pairs = zip(torch.autograd.grad(result, tensors, upper), torch.autograd.grad(expected, tensors, upper), strict=True)
    for found, right in pairs:
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_images_changed_before_the_model_runs_again_are_refused():
    model, x = attached(encoder("swin"), refold.E3VA(rank=3, recompute="taps")), pictures()
    loss = sum(y.square().mean() for y in model(x))
    x.add_(1)
    with pytest.raises(SiteError, match="changed in place before the backward pass"):
        loss.backward()
