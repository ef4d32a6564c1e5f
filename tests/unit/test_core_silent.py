"""Ways to use a model under which an adapter could go wrong without a word."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.hosting import hosted
from zoo import CLASSES, FAMILIES, build, images, perturb, relative

METHODS = [refold.RepAdapter(rank=4, dropout=0.0), refold.LoRA(rank=4)]
KINDS = ["vit", "open_clip_tower", "swin", "efficientnet"]


@pytest.fixture(params=METHODS, ids=lambda m: type(m).__name__)
def method(request: pytest.FixtureRequest) -> refold.Method:
    return request.param


def trained(family: str, method: refold.Method) -> nn.Module:
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model))
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).float().pow(2).sum().backward()
    return {n: p.grad.clone() for n, p in refold.trainable_parameters(model).items()}


# -- dropout and statistics ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [refold.RepAdapter(rank=8, dropout=0.5), refold.LoRA(dropout=0.5)])
def test_dropout_acts_in_training_only(method):
    model = trained("vit", method)
    x = images(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    evaluated = model(x).detach()
    model.train()
    refold.merge(model)
    assert relative(model.eval()(x), evaluated) < 1e-5
    refold.unmerge(model.train())
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("method", [*METHODS, refold.LinearProbe(), refold.BitFit()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("family", ["resnet", "efficientnet", "byobnet"])
def test_frozen_statistics_stay_under_train(method, family):
    model = trained(family, method)
    statistics = {n: v.clone() for n, v in model.named_buffers()}
    x = images(model, count=4)
    evaluated = model(x).detach()
    model.train()
    for _ in range(2):
        model(x).sum().backward()
    assert all(torch.equal(v, statistics[n]) for n, v in model.named_buffers())
    assert all(m.training for m in model.modules())  # the mode stays the user's
    assert torch.equal(model.eval()(x), evaluated)


def test_statistics_that_update_bn_empties_are_filled_again():
    """Stochastic weight averaging measures them anew on purpose: frozen at zero they would break the model."""
    model = refold.attach(build("resnet"), METHODS[0])
    batches = [images(model, count=4, seed=seed) for seed in range(2)]
    plain = refold.detach(copy.deepcopy(model))
    for each in (model, plain):
        torch.optim.swa_utils.update_bn(batches, each)
    filled = dict(plain.named_buffers())
    assert all(torch.equal(v, filled[n]) for n, v in model.named_buffers())
    assert bool(filled["bn1.running_mean"].any())
    model.train()(batches[0])
    assert all(torch.equal(v, filled[n]) for n, v in model.named_buffers())  # frozen again


def test_a_batchnorm_inside_the_head_does_train():
    model = build("resnet")
    width = model.fc.in_features
    model.fc = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, CLASSES))
    refold.attach(model, METHODS[0])
    before = model.fc[0].running_mean.clone()
    plain = copy.deepcopy(model.fc.state_dict())
    model.train()(images(model, count=4))
    assert not torch.equal(model.fc[0].running_mean, before)
    refold.detach(model)
    assert all(torch.equal(v, plain[n]) for n, v in model.fc.state_dict().items())


# -- other ways to run a forward -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(family, method):
    model = trained(family, method)
    x = images(model)
    expected = gradients(model, x)
    (model.visual if family == "open_clip_tower" else model).set_grad_checkpointing(True)
    found = gradients(model, x)
    assert all(torch.allclose(found[n], g, rtol=1e-5, atol=1e-7) for n, g in expected.items())
    assert not {"in_proj_weight", "in_proj_bias"} & {k for m in model.modules() for k in m.__dict__}


@pytest.mark.parametrize("family", KINDS)
def test_autocast_adapts_too(family, method):
    model = trained(family, method)
    x = images(model)
    expected = model(x).detach()
    with refold.disabled(model):
        plain = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        found.float().sum().backward()
        refold.merge(model)
        merged = model(x)
        refold.unmerge(model)
    assert found.dtype == merged.dtype == torch.bfloat16
    effect = relative(plain, expected)
    assert relative(found, expected) < 0.2 * effect
    assert relative(merged, expected) < 0.2 * effect
    assert all(p.grad is not None for p in refold.trainable_parameters(model).values())


def test_the_probe_sees_through_autocast():
    outside, inside = build("vit_without_qkv_bias"), build("vit_without_qkv_bias")
    refold.attach(outside, METHODS[0])
    with torch.autocast("cpu", torch.bfloat16):
        refold.attach(inside, METHODS[0])
    assert str(refold.explain(inside)) == str(refold.explain(outside))


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(family, method, context):
    """Torch's attention has a path of its own for this case, which must see the adapter as well."""
    model = trained(family, method)
    x = images(model)
    expected = model(x).detach()
    with refold.disabled(model):
        effect = relative(model(x), expected)
    with context():
        assert relative(model(x), expected) < min(1e-5, effect / 10)


@pytest.mark.parametrize("family", KINDS)
def test_functional_calls_take_the_adapters_parameters(family, method):
    model = trained(family, method)
    x = images(model)
    moved = {n: p.detach() * 1.5 for n, p in refold.trainable_parameters(model).items()}
    found = torch.func.functional_call(model, moved, (x,))
    assert not torch.equal(found, model(x))
    with torch.no_grad():
        for name, parameter in refold.trainable_parameters(model).items():
            parameter.copy_(moved[name])
    assert relative(found, model(x)) < 1e-5


def test_features_and_hooks_on_the_way_see_adapted_activations(method):
    model = trained("vit", method)
    x = images(model)
    seen = []
    handle = model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = model.forward_features(x)
    handle.remove()
    with refold.disabled(model):
        assert not torch.allclose(model.forward_features(x), features)
    assert torch.equal(model.norm(seen[0]), features)


def test_containers_that_call_their_children_meet_none_of_ours(method):
    """Adapters are children of leaf layers only: a Sequential never runs one."""
    model = refold.attach(build("swin"), method)
    for path in hosted(model):
        layer = model.get_submodule(path)
        assert type(layer) in (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    plain = {n: list(m) for n, m in build("swin").named_modules() if isinstance(m, nn.Sequential)}
    for name, children in plain.items():
        assert len(list(model.get_submodule(name))) == len(children)


class InPlace(nn.Module):
    """Every activation in place, directly on what a layer returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = self.second(x)
        x += 1.0
        return self.head(self.act(x).mean((2, 3)))


def test_activations_in_place(method):
    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.randn(2, 4, 6, 6)
    kept = x.clone()
    refold.attach(model, method, example=x)
    perturb(refold.trainable_parameters(model), 0.2)
    gradients(model, x)
    unmerged = model(x).detach()
    refold.merge(model)
    assert relative(model(x), unmerged) < 1e-5
    assert torch.equal(x, kept)


def test_the_input_of_a_layer_is_never_changed(method):
    """Others may read the same tensor: a residual, a second projection."""
    model = trained("vit", method)
    x = torch.randn(2, 5, 32)
    kept = x.clone()
    model.blocks[0].attn.qkv(x)
    model.blocks[0].mlp.fc1(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("family", ["vit", "efficientnet"])
def test_memory_formats_and_odd_batches(family, method):
    model = trained(family, method)
    x = images(model, count=3)
    expected = model(x).detach()
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x[1:2]), expected[1:2], rtol=1e-4, atol=1e-5)
    assert model(x[:0]).shape == (0, CLASSES)
    refold.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


# -- gradients and memory ------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes autograd stores for one backward, parameters left out."""
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sum(storages.values())


def test_the_frozen_part_stores_nothing():
    x = images(build("vit"))
    full = saved_bytes(refold.attach(build("vit"), refold.FullFineTune()), x)
    adapted = saved_bytes(refold.attach(build("vit"), METHODS[0]), x)
    probe = saved_bytes(refold.attach(build("vit"), refold.LinearProbe()), x)
    assert probe <= 2 * 5 * 32 * 4  # the head's input, a view of two rows of five tokens of 32 floats
    assert probe < adapted < 0.9 * full


@pytest.mark.parametrize("family", KINDS)
def test_gradients_are_right(family):
    """Against finite differences, through the whole model in float64."""
    model = refold.attach(build(family, torch.float64), refold.RepAdapter(rank=2, dropout=0.0))
    perturb(refold.trainable_parameters(model))
    x = images(model)
    trainable = refold.trainable_parameters(model)
    found = gradients(model, x)

    def loss() -> float:
        with torch.no_grad():
            return float(model(x).pow(2).sum())

    for name in list(trainable)[:: max(1, len(trainable) // 8)]:
        parameter, step = trainable[name], 1e-6
        flat = parameter.data.view(-1)
        index = int(found[name].abs().argmax())
        kept = float(flat[index])
        flat[index] = kept + step
        above = loss()
        flat[index] = kept - step
        slope = (above - loss()) / (2 * step)
        flat[index] = kept
        assert float(found[name].view(-1)[index]) == pytest.approx(slope, rel=1e-4, abs=1e-6), name


def test_a_reference_after_the_forward_is_an_error_and_not_a_wrong_gradient():
    """``disabled`` exchanges the head in place: torch notices that the gradient would be wrong."""
    model = trained("vit", METHODS[0])
    x = images(model)
    with refold.disabled(model), torch.no_grad():
        reference = model(x)
    (model(x) - reference).pow(2).sum().backward()
    output = model(x)
    with refold.disabled(model), torch.no_grad():
        reference = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output - reference).pow(2).sum().backward()


# -- loading while attached ----------------------------------------------------------------------------------------


def test_what_is_loaded_while_attached_goes_to_the_adapter_and_detach_brings_the_old_head(method):
    model = trained("vit", method)
    plain = build("vit")
    checkpoint = {n: v.clone() for n, v in plain.state_dict().items()}
    checkpoint["head.weight"] += 1.0
    model.load_state_dict(checkpoint, strict=True)
    assert torch.equal(model.head.weight, checkpoint["head.weight"])
    refold.detach(model)
    assert torch.equal(model.head.weight, plain.head.weight)


def test_a_full_state_dict_goes_back_in(method):
    model, other = trained("vit", method), refold.attach(build("vit"), method)
    result = other.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys
    x = images(model)
    assert torch.equal(other(x), model(x))


def test_a_state_dict_with_half_an_adapter_is_reported(method):
    model = trained("vit", method)
    state = model.state_dict()
    missing = "blocks.0.attn.qkv.refold.default.up"
    del state[missing]
    with pytest.raises(RuntimeError, match=f"Missing key.*{missing}"):
        model.load_state_dict(state, strict=True)


def test_checkpoints_that_assign_keep_the_adapter_working(method):
    model = trained("vit", method)
    x = images(model)
    expected = model(x).detach()
    checkpoint = build("vit").state_dict() | {n: v for n, v in model.state_dict().items() if n.startswith("head")}
    model.load_state_dict(checkpoint, strict=True, assign=True)
    assert torch.equal(model(x), expected)
    assert refold.merge(model).rel_l2 < 1e-5


# -- interrupts ----------------------------------------------------------------------------------------------------


class Interrupting(nn.Module):
    """Raises what a Ctrl-C raises, in the middle of a forward."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


@pytest.mark.parametrize("after", [refold.detach, refold.merge], ids=["detach", "merge"])
def test_an_interrupted_forward_leaves_no_shadow(after: Callable[[nn.Module], object]):
    """Torch runs no hook after an interrupt, so the shadowed attention weight stays until the next call."""
    model = trained("open_clip_tower", refold.LoRA(rank=4))
    x = images(model)
    expected = model(x).detach()
    attention = next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    handle = attention.register_forward_hook(lambda *args: Interrupting()(args[0]))
    attention._forward_hooks.move_to_end(handle.id, last=False)  # before refold's own
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    assert "in_proj_weight" in attention.__dict__
    after(model)
    assert "in_proj_weight" not in attention.__dict__
    reference = expected if after is refold.merge else build("open_clip_tower")(x)
    assert relative(model(x), reference) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failing_forward_leaves_everything_usable(family, method):
    model = trained(family, method)
    x = images(model)
    expected = model(x).detach()
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        model(torch.randn(2, 7, 32, 32))
    assert torch.equal(model(x), expected)
    assert refold.merge(model).rel_l2 < 1e-5
