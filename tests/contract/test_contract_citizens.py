"""A ViT, a Swin and two ConvNets, adapted and merged, in everyday surroundings that torch and timm give a model.

Copies, pickles and strict loading are tested for every family and method in ``test_contract_methods.py``; compiled
and exported models, and several processes, in ``tests/slow/test_core_compile.py`` and ``test_core_distributed.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import refold
from zoo import build, images, perturb, relative

FAMILIES = ["vit", "swin", "convnext", "resnet"]
METHODS = {
    "channels, before": refold.RepAdapter(rank=4, dropout=0.0),
    "channels, after": refold.SSF(),
    "weights": refold.LoRA(rank=4),
}


@pytest.fixture(params=[*FAMILIES, "open_clip_tower"])
def family(request: pytest.FixtureRequest) -> str:
    """The last one's attention reads its weights itself: there adapters replace the weight during the call."""
    return request.param


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return METHODS[request.param]


def trained(family: str, method: refold.Method) -> nn.Module:
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model))
    return model


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.float().pow(2).sum().backward()
    return {n: p.grad.clone() for n, p in refold.trainable_parameters(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())


def test_the_backbones_own_keys_stay_in_their_order(family, method):
    plain = list(build(family).state_dict())
    model = trained(family, method)
    assert [n for n in model.state_dict() if ".refold." not in n] == plain
    assert [n for n, _ in model.named_parameters() if ".refold." not in n] == [
        n for n, _ in build(family).named_parameters()
    ]
    refold.merge(model)
    assert list(model.state_dict()) == plain


@pytest.mark.parametrize("reentrant", [False, True])
def test_torchs_checkpointing_gives_the_same_gradients(family, method, reentrant):
    model = trained(family, method)
    x = images(model).requires_grad_()
    expected = gradients(model, model(x))
    found = gradients(model, checkpoint(model, x, use_reentrant=reentrant))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [refold.RepAdapter(rank=4, dropout=0.5), refold.LoRA(rank=4, dropout=0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_dropout_is_the_same(family, method):
    model = trained(family, method).train()
    x = images(model, count=4)

    def run(use: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return gradients(model, checkpoint(model, x, use_reentrant=False) if use else model(x))

    expected = run(False)
    for name, gradient in run(True).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["convnext", "resnet"])  # the others: test_core_silent.py
def test_the_models_own_checkpointing_gives_the_same_gradients(family, method):
    model = trained(family, method)
    x = images(model)
    expected = gradients(model, model(x))
    model.set_grad_checkpointing(True)
    for name, gradient in gradients(model, model(x)).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_an_average_of_the_weights_is_adapted_and_merges(family, method):
    """EMA copies the model with what refold remembers of it; the frozen part must not move by a bit."""
    decay = 0.75
    model = trained(family, method).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=1e-2))
    expected: dict[str, Tensor] = {}
    for step in range(3):
        optimizer.zero_grad()
        model(images(model, count=4, seed=step)).pow(2).mean().backward()
        optimizer.step()
        average.update_parameters(model)
        for name, value in refold.trainable_parameters(model).items():
            now = value.detach().double()
            expected[name] = now if step == 0 else decay * expected[name] + (1 - decay) * now
    inside = average.module.eval()
    for name, value in refold.trainable_parameters(inside).items():
        torch.testing.assert_close(value.detach().double(), expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(refold.SiteError, match=r"cannot merge: no adapter is attached.*Pass its part 'module'"):
        refold.merge(average)
    assert refold.merge(inside).rel_l2 < 1e-5
    x = images(model)
    torch.testing.assert_close(average(x), inside(x))
    refold.detach(inside)
    assert same(inside.state_dict(), build(family).state_dict())
    assert refold.explain(model).state == "attached"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_while_attached(family, method, dtype):
    model = trained(family, method)
    x = images(model)
    expected = model(x).detach()
    with refold.disabled(model):
        effect = relative(model(x), expected)
    model.to(dtype)
    adapted = {n: v.clone() for n, v in model.state_dict().items()}
    assert relative(model(x.to(dtype)), expected) < 0.3 * effect
    assert refold.merge(model).rel_l2 < 1e-5  # compared through float32
    assert relative(model(x.to(dtype)), expected) < 0.3 * effect
    refold.unmerge(model)
    assert same(model.state_dict(), adapted)
    refold.detach(model)
    assert same(model.state_dict(), build(family).to(dtype).state_dict())


@pytest.mark.parametrize("merged", [False, True], ids=["attached", "merged"])
def test_autocast_and_inference_mode_see_the_adapter(family, method, merged):
    model = trained(family, method)
    x = images(model)
    expected = model(x).detach()
    with refold.disabled(model):
        effect = relative(model(x), expected)
    if merged:
        refold.merge(model)
    with torch.inference_mode():
        assert relative(model(x), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(model(x), expected) < 0.3 * effect


def test_modes_are_the_users_and_statistics_stay(family, method):
    model = trained(family, method)
    buffers = {n: v.clone() for n, v in model.named_buffers()}
    x = images(model, count=4)
    evaluated = model(x).detach()
    model.train()
    model(x).sum().backward()
    assert all(m.training for m in model.modules())
    assert same(dict(model.named_buffers()), buffers)
    assert torch.equal(model.eval()(x), evaluated)
    assert not any(m.training for m in model.modules())


def test_a_copy_trains_apart(family, method):
    model = trained(family, method)
    x = images(model)
    before = model(x).detach()
    other = copy.deepcopy(model)
    optimizer = torch.optim.SGD(refold.param_groups(other, lr=0.1))
    other(x).pow(2).sum().backward()
    optimizer.step()
    assert torch.equal(model(x), before)
    assert not torch.equal(other(x), before)


# -- wrappers that refold cannot see through ----------------------------------------------------------------------


def test_data_parallel_wrappers_are_refused(method):
    """Attached to the wrapper, an adapter's gradients would not be synchronised."""
    model = trained("vit", method)
    wrapper = nn.DataParallel(model)
    for call in (refold.merge, refold.detach, refold.explain, lambda m: refold.attach(m, method, name="other")):
        with pytest.raises(refold.SiteError, match=r"through DataParallel.*model\.module"):
            call(wrapper)
    assert refold.merge(wrapper.module).rel_l2 < 1e-5
