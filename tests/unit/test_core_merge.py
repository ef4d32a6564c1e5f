"""merge and unmerge: what they refuse, what they notice, what they keep."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.hosting import hosted
from zoo import build, images, perturb, relative

METHOD = refold.RepAdapter(rank=4)


def trained(family: str = "vit", method: refold.Method = METHOD, size: float = 0.05) -> nn.Module:
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model), size)
    return model


def refuses(model: nn.Module, kind: type[refold.RefoldError], reason: str, **options: bool) -> None:
    """merge raises one clear error and the model is as it was, still attached."""
    x = images(model)
    output = model(x).detach()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(kind, match=reason):
        refold.merge(model, **options)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], v) or bool(v.isnan().any()) for n, v in before.items())
    assert torch.equal(model(x), output) or bool(output.isnan().any())
    assert hosted(model)
    assert refold.explain(model).state == "attached"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("check", [True, False])
def test_an_adapter_that_is_not_finite_does_not_merge(value, check):
    model = trained()
    slot = next(iter(hosted(model).values()))
    with torch.no_grad():
        slot["default"].up[0, 0] = value
    refuses(model, refold.MergeError, "not finite.*Check training", check=check)


def test_a_fold_that_overflows_the_weights_dtype_is_refused():
    model = trained().half()
    slot = next(iter(hosted(model).values()))
    with torch.no_grad():
        slot["default"].up.fill_(60000.0)
        slot["default"].down.fill_(60000.0)
    refuses(model, refold.MergeError, "blocks.0.attn.qkv.weight: the folded value is not finite", check=False)


def test_a_head_that_is_not_finite_cannot_be_checked():
    model = trained()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    refuses(model, refold.MergeError, "the unmerged model's output is not finite")


def test_a_singular_map_whose_shift_must_move_into_the_norm_is_refused():
    model = trained("vit_without_qkv_bias", refold.RepAdapter(rank=2, groups=1, sites="attention"))
    adapter = model.blocks[1].attn.qkv.get_submodule("refold.default")
    with torch.no_grad():  # M = I - e e^T loses one direction
        adapter.up.zero_()
        adapter.down.zero_()
        adapter.up[3, 0], adapter.down[0, 3] = -1.0, 1.0
    refuses(
        model,
        refold.MergeError,
        "blocks.1.attn.qkv: the adapter's matrix is singular.*allow_new_bias=True",
        check=False,
    )


def test_a_singular_map_merges_where_the_layer_has_a_bias():
    model = trained("vit", refold.RepAdapter(rank=2, groups=1, sites="attention"))
    adapter = model.blocks[1].attn.qkv.get_submodule("refold.default")
    with torch.no_grad():
        adapter.up.zero_()
        adapter.down.zero_()
        adapter.up[3, 0], adapter.down[0, 3] = -1.0, 1.0
    assert refold.merge(model).rel_l2 < 1e-5


def test_the_report_says_what_was_seen():
    model = trained()
    report = refold.merge(model)
    assert (report.name, report.checked, report.dtype) == ("default", True, "float32")
    assert set(report.folded) == {
        f"blocks.{block}.{layer}.{leaf}"
        for block in range(2)
        for layer in ("attn.qkv", "mlp.fc1")
        for leaf in ("weight", "bias")
    }
    assert 0 < report.rel_l2 < 1e-5
    assert 0 < report.max_abs < 1e-4
    unchecked = refold.merge(trained(), check=False)
    assert not unchecked.checked
    assert unchecked.folded == report.folded


def test_low_precision_is_compared_through_float32():
    for dtype in (torch.bfloat16, torch.float16):
        model = refold.attach(build("vit", dtype), METHOD)
        perturb(refold.trainable_parameters(model))
        report = refold.merge(model)
        assert report.checked
        assert report.dtype == "float32"
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_model_whose_output_cannot_be_compared_says_so():
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)).argmax(-1)

    model = refold.attach(Labels(), METHOD, example=torch.randn(2, 8))
    with pytest.raises(refold.MergeError, match=r"returns no floating tensor.*check=False"):
        refold.merge(model)
    refold.merge(model, check=False)


# -- changes of merged weights -------------------------------------------------------------------------------------

WEIGHT = "blocks.0.attn.qkv.weight"


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter(WEIGHT)[3, 5] += 0.01


def through_data(model: nn.Module) -> None:
    model.get_parameter(WEIGHT).data[3, 5] += 0.01


def through_numpy(model: nn.Module) -> None:
    model.get_parameter(WEIGHT).detach().numpy()[3, 5] += 0.01


def replaced(model: nn.Module) -> None:
    model.blocks[0].attn.qkv.weight = nn.Parameter(torch.randn(96, 32))


def loaded(model: nn.Module) -> None:
    model.load_state_dict(build("vit").state_dict())


def trained_further(model: nn.Module) -> None:
    model.get_parameter(WEIGHT).requires_grad_(True)
    model(images(model)).sum().backward()
    torch.optim.SGD([model.get_parameter(WEIGHT)], lr=1e-3).step()


def reshaped(model: nn.Module) -> None:
    model.blocks[0].attn.qkv = nn.Linear(32, 48)


def removed(model: nn.Module) -> None:
    model.blocks[0].attn.qkv.bias = None


def reparametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)


CHANGES = [in_place, through_data, through_numpy, replaced, loaded, trained_further, reshaped, removed, reparametrized]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("call", [refold.unmerge, refold.detach, lambda m: refold.switch(m, "other")])
def test_changed_merged_weights_are_not_thrown_away(change, call):
    model = build("vit")
    refold.attach(model, METHOD, name="other")
    refold.attach(model, METHOD)
    perturb(refold.trainable_parameters(model))
    refold.merge(model)
    change(model)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(refold.MergeError, match=r"(weight|bias): the merged weight was changed since merge"):
        call(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_tensor_that_holds_a_fold_does_not_train():
    """Also where it trained before: an optimizer would change the fold, and unmerge would have to refuse."""
    model = refold.attach(build("vit"), METHOD, trainable=("head", "blocks.0.attn.qkv.bias"))
    perturb(refold.trainable_parameters(model))
    trainable = set(refold.trainable_parameters(model))
    refold.merge(model)
    assert set(refold.trainable_parameters(model)) == {"head.weight", "head.bias"}
    refold.unmerge(model)
    assert set(refold.trainable_parameters(model)) == trainable


def test_what_is_not_folded_may_change():
    model = trained()
    refold.merge(model)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    head = model.head.weight.clone()
    refold.unmerge(model)
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["vit", "vit_without_qkv_bias", "efficientnet"])
def test_a_cast_of_a_merged_model_is_no_change(family, dtype):
    model = trained(family)
    adapted = {n: v.clone() for n, v in model.state_dict().items()}
    refold.merge(model)
    model.to(dtype)
    refold.unmerge(model)
    for name, value in model.state_dict().items():
        assert value.dtype in (dtype, torch.int64, torch.float32)
        if "refold" not in name:
            assert torch.equal(value, adapted[name].to(value.dtype))
    refold.detach(model)
    plain = build(family).state_dict()
    assert all(torch.equal(v, plain[n].to(v.dtype)) for n, v in model.state_dict().items())


def test_a_cast_that_lost_bits_is_a_change():
    model = trained()
    refold.merge(model)
    model.bfloat16().float()
    with pytest.raises(refold.MergeError, match="changed since merge"):
        refold.unmerge(model)


def test_copies_of_a_merged_model_come_back_too():
    model = trained()
    plain = build("vit").state_dict()
    refold.merge(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        refold.detach(other)
        assert all(torch.equal(v, plain[n]) for n, v in other.state_dict().items())


def test_without_its_base_a_merge_is_final_and_lighter():
    kept = trained()
    final = copy.deepcopy(kept)
    refold.merge(kept)
    refold.merge(final, keep_base=False)
    sizes = []
    for model in (kept, final):
        stream = io.BytesIO()
        torch.save(model, stream)
        sizes.append(len(stream.getvalue()))
    assert sizes[1] < sizes[0]
    x = images(final)
    assert torch.equal(final(x), kept(x))


def test_a_merged_state_dict_loads_strictly_into_the_plain_model():
    model = trained("vit_without_qkv_bias")
    x = images(model)
    refold.merge(model)
    plain = build("vit_without_qkv_bias")
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_merging_works_in_every_gradient_mode(context):
    model = trained("efficientnet")
    x = images(model)
    unmerged = model(x).detach()
    with context():
        refold.merge(model)
        merged = model(x)
        refold.unmerge(model)
    assert relative(merged, unmerged) < 1e-5
    assert torch.equal(model(x), unmerged)
    model(x).sum().backward()
    assert all(p.grad is not None for p in refold.trainable_parameters(model).values())


def test_merging_in_training_mode_leaves_the_mode_and_the_statistics():
    model = trained("resnet").train()
    modes = {n: m.training for n, m in model.named_modules()}
    statistics = {n: v.clone() for n, v in model.named_buffers()}
    refold.merge(model)
    refold.unmerge(model)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(v, statistics[n]) for n, v in model.named_buffers())


def test_hooks_of_the_user_stay():
    model = build("vit")
    seen = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *args: seen.append("after"))
    model.blocks[0].attn.qkv.register_forward_pre_hook(lambda *args: seen.append("before"))
    refold.attach(model, METHOD)
    refold.merge(model)
    refold.unmerge(model)
    refold.detach(model)
    seen.clear()
    model(images(model))
    assert seen == ["before", "after"]


def test_a_large_effect_is_still_exact_in_float64():
    model = refold.attach(build("vit", torch.float64), refold.RepAdapter(rank=8, scale=100.0))
    perturb(refold.trainable_parameters(model), 1.0)
    assert refold.merge(model).rel_l2 < 1e-10
