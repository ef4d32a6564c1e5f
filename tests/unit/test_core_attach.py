"""attach and detach: what they refuse, in words, and what they leave alone."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.attachment import head_paths
from refold.errors import MissingExtraError
from refold.hosting import hooks_left, hosted
from zoo import build, images, perturb, relative

METHOD = refold.RepAdapter(rank=4)


def refused(model: nn.Module, reason: str, method: Any = METHOD, **options: Any) -> None:
    """attach raises one clear error and leaves the model as it was."""
    before = {n: v.clone() for n, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    with pytest.raises(refold.SiteError, match=reason):
        refold.attach(model, method, **options)
    assert "_refold" not in model.__dict__
    assert not hosted(model)
    assert hooks_left(model) == 0
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], v) for n, v in before.items())


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [42, None, "vit", {"a": 1}])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(refold.SiteError, match="expected a torch module"):
        refold.attach(model, METHOD)


@pytest.mark.parametrize("method", [None, "RepAdapter", refold.RepAdapter, 8])
def test_what_is_no_method_is_refused(method):
    refused(build("vit"), "expected a method such as refold.RepAdapter", method)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: refold.RepAdapter(rank=0), "rank=0 is not valid.*positive integer"),
        (lambda: refold.RepAdapter(rank=2.0), "rank=2.0 is not valid"),
        (lambda: refold.RepAdapter(rank=True), "rank=True is not valid"),
        (lambda: refold.RepAdapter(rank=10**9), "rank=1000000000 is not valid"),
        (lambda: refold.RepAdapter(rank=8, groups=3), "groups=3 is not valid.*divisor of rank"),
        (lambda: refold.RepAdapter(scale=0), "scale=0 is not valid"),
        (lambda: refold.RepAdapter(scale=float("nan")), "scale=nan is not valid"),
        (lambda: refold.RepAdapter(scale=float("inf")), "scale=inf is not valid"),
        (lambda: refold.RepAdapter(dropout=1.0), r"dropout=1.0 is not valid.*\[0, 1\)"),
        (lambda: refold.RepAdapter(dropout=-0.1), "dropout=-0.1 is not valid"),
        (lambda: refold.RepAdapter(sites=()), r"sites=\(\) is not valid"),
        (lambda: refold.RepAdapter(sites=["attention"]), "sites=.'attention'. is not valid"),
        (lambda: refold.RepAdapter(sites=""), "sites='' is not valid"),
        (lambda: refold.LoRA(rank=-1), "rank=-1 is not valid"),
        (lambda: refold.LoRA(scale="1"), "scale='1' is not valid"),
        (lambda: refold.LoRA(dropout=2), "dropout=2 is not valid"),
    ],
)
def test_hyper_parameters_are_checked_at_once(make, reason):
    with pytest.raises(refold.SiteError, match=reason):
        make()


def test_misspelt_hyper_parameters_are_an_error():
    with pytest.raises(TypeError, match="rnak"):
        refold.RepAdapter(rnak=8)


@pytest.mark.parametrize(
    ("sites", "reason"),
    [
        ("nowhere", "nowhere: no layer has this path or role. Roles are attention, mlp"),
        ("blocks.0.attn.qkw", "no layer has this path or role. Close: .*blocks.0.attn.qkv"),
        ("blocks.9.*", "no layer has this path or role"),
        ("blocks.0.norm1", "blocks.0.norm1: "),
        (("attention", "nowhere"), "nowhere: no layer has this path or role"),
        ("head", "no layer has this path or role"),
    ],
)
def test_sites_that_do_not_exist_are_refused(sites, reason):
    refused(build("vit"), reason, refold.RepAdapter(rank=4, sites=sites))


def test_a_plain_norm_is_no_site():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    refused(
        model,
        "0: a norm is not linear in its input",
        refold.RepAdapter(sites="0"),
        example=torch.ones(1, 8),
        trainable=(),
    )


def test_paths_and_patterns_choose_layers_in_the_order_of_the_forward():
    model = refold.attach(build("vit"), refold.RepAdapter(rank=4, sites=("blocks.*.mlp.fc2", "blocks.0.attn.proj")))
    paths = [row.path for row in refold.explain(model).rows if row.slot == "input"]
    assert paths == ["blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]


def test_groups_that_do_not_divide_a_width_become_fewer():
    """An image has three channels; explain says what became of two groups."""
    model = refold.attach(build("resnet"), METHOD)
    rows = {row.path: row for row in refold.explain(model).rows if row.slot == "input"}
    assert "1 instead of 2 groups, which do not divide 3 channels" in rows["conv1.0"].reason
    assert "groups" not in rows["conv1.3"].reason
    adapters = {path: slot["default"] for path, slot in hosted(model).items()}
    assert [adapters[path].groups for path in ("conv1.0", "conv1.3")] == [1, 2]
    assert not [row for row in refold.explain(model).rows if row.slot == "-"]


@pytest.mark.parametrize("trainable", ["nothing", ("head", "nothing"), ("",), "hea"])
def test_what_cannot_train_is_named(trainable):
    refused(build("vit"), "no module or parameter of this name", trainable=trainable)


def test_trainable_takes_modules_parameters_and_nothing():
    for trainable, expected in (
        ("norm", {"norm.weight", "norm.bias"}),
        (("norm.bias", "norm"), {"norm.weight", "norm.bias"}),
        (("head.bias", "cls_token"), {"head.bias", "cls_token"}),
        ((), set()),
    ):
        model = refold.attach(build("vit"), METHOD, trainable=trainable)
        assert {n for n in refold.trainable_parameters(model) if "refold" not in n} == expected


def test_an_unknown_head_is_an_error_unless_named():
    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.decision = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.decision(self.body(x))

    x = torch.randn(2, 8)
    refused(Custom(), r"cannot tell which module is the head. .*trainable=", example=x)
    model = refold.attach(Custom(), METHOD, example=x, trainable="decision")
    assert {"decision.weight", "decision.bias"} <= refold.trainable_parameters(model).keys()
    # What trains as the head is not adapted as well.
    assert [row.path for row in refold.explain(model).rows if row.slot == "input"] == ["body"]


def test_heads_are_found():
    assert head_paths(build("vit")) == ("head",)
    assert head_paths(build("convnext")) == ("head.fc",)
    assert head_paths(build("resnet")) == ("fc",)
    assert head_paths(build("torchvision_vit")) == ("heads",)
    assert head_paths(build("open_clip_tower")) == ("head",)
    model = build("vit")
    model.reset_classifier(0)
    assert head_paths(model) == ()
    refused(model, "LinearProbe finds nothing to train", refold.LinearProbe())


def test_a_method_without_anything_to_train_is_refused():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
    refused(model, "has no bias to train", refold.BitFit(), example=torch.ones(1, 8), trainable=())
    refused(nn.Sequential(nn.ReLU()), "finds nothing to train", METHOD, example=torch.ones(1, 8), trainable=())


# -- the probing forward -------------------------------------------------------------------------------------------


def test_an_input_the_model_does_not_take_is_explained():
    refused(
        build("vit"),
        r"the probing forward failed with input shapes \[\(1, 3, 33, 33\)\]: .*Pass example=",
        example=torch.randn(1, 3, 33, 33),
    )


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "dict"])
def test_examples_are_tensors_tuples_or_dicts(wrap):
    model = build("vit")
    refold.attach(model, METHOD, example=wrap(images(model)))
    perturb(refold.trainable_parameters(model))
    assert refold.merge(model).rel_l2 < 1e-5


def test_nested_examples_reach_the_model():
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.body, self.head = nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

        def forward(self, items: list[Tensor]) -> list[Tensor]:
            return [self.head(self.body(self.norm(torch.cat(items))))]

    model = refold.attach(Pairs().requires_grad_(False), METHOD, example=([torch.randn(2, 8), torch.randn(1, 8)],))
    assert refold.explain(model).rows[0].shift == "norm norm"
    perturb(refold.trainable_parameters(model))
    model.double()
    assert refold.merge(model).rel_l2 < 1e-10


@pytest.mark.parametrize("family", ["vit_one_channel", "vit_five_channels", "swin", "resnet", "open_clip_tower"])
def test_the_example_is_found_without_help(family):
    refold.attach(build(family), METHOD)


def test_attach_leaves_no_trace_of_its_probing():
    model = build("resnet").train()
    statistics = {n: v.clone() for n, v in model.named_buffers()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    refold.attach(model, refold.LinearProbe())
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, statistics[n]) for n, v in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_changes_its_input_in_place_can_be_probed():
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x -= x.mean()
            return self.head(self.body(x))

    x = torch.randn(2, 8)
    before = x.clone()
    refold.attach(Normalising(), METHOD, example=x)
    assert torch.equal(x, before)


# -- layers that cannot be folded into -----------------------------------------------------------------------------


def test_a_shared_weight_is_refused():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)))

    x = torch.randn(2, 8)
    refused(Tied(), "first: its weight is shared with second", refold.LoRA(sites="first"), example=x)
    refused(Tied(), "no layer is usable; first: its weight is shared with second", METHOD, example=x)


def test_dropout_where_the_input_is_out_of_reach_is_refused():
    refused(
        build("open_clip_tower"),
        r"visual.transformer.resblocks.0.attn: dropout=0.2 has no place",
        refold.LoRA(dropout=0.2),
    )


# -- one model, one state ------------------------------------------------------------------------------------------


def test_a_compiled_wrapper_is_refused():
    wrapper = torch.compile(build("vit"), backend="eager")
    with pytest.raises(refold.SiteError, match=r"compiled wrapper.*Attach to the module itself"):
        refold.attach(wrapper, METHOD)
    for call in (refold.detach, refold.merge, refold.unmerge, refold.explain, refold.param_groups):
        with pytest.raises(refold.SiteError, match=r"through a compiled wrapper. Pass the module you compiled"):
            call(wrapper)


def test_a_part_and_the_whole_do_not_both_carry_adapters():
    model = build("vit")
    part = model.blocks[0]
    example = torch.randn(1, 5, 32)
    refold.attach(part, METHOD, example=example, trainable=())
    with pytest.raises(refold.SiteError, match=r"blocks.0: adapters are attached to a part of this model"):
        refold.attach(model, METHOD)
    refold.detach(part)
    refold.attach(model, METHOD)
    with pytest.raises(refold.SiteError, match="attached to the whole of it"):
        refold.attach(part, METHOD, example=example, trainable=())
    refold.detach(model)
    assert not hosted(model)


def test_a_part_alone_can_carry_one():
    model = build("vit")
    x = images(model)
    before = model(x).detach()
    refold.attach(model.blocks[0], METHOD, example=torch.randn(1, 5, 32), trainable=())
    perturb(refold.trainable_parameters(model.blocks[0]))
    unmerged = model(x).detach()
    assert not torch.equal(unmerged, before)
    refold.merge(model.blocks[0])
    assert relative(model(x), unmerged) < 1e-5
    refold.detach(model.blocks[0])
    assert torch.equal(model(x), before)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(8, 4).double().eval()
    x = torch.randn(3, 8).double()
    plain = {n: v.clone() for n, v in layer.state_dict().items()}
    refold.attach(layer, METHOD, example=x, trainable=())
    perturb(refold.trainable_parameters(layer), 0.3)
    unmerged = layer(x).detach()
    assert refold.merge(layer).folded == ("weight", "bias")
    assert relative(layer(x), unmerged) < 1e-12
    refold.detach(layer)
    assert all(torch.equal(v, plain[n]) for n, v in layer.state_dict().items())


def test_attach_frees_the_gradients_of_what_it_freezes():
    """An optimizer that already holds the backbone would otherwise apply them once more."""
    model = build("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(images(model)).sum().backward()
    refold.attach(model, METHOD)
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in frozen.items()}
    assert all(p.grad is None for p in frozen.values())
    optimizer.zero_grad()
    model(images(model)).sum().backward()
    head = model.head.weight.clone()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())
    assert not torch.equal(model.head.weight, head)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        refold.SiteError("reason", where="here", remedy="Do this"),
        refold.MergeError("reason"),
        refold.StoreError("reason", where="file"),
        MissingExtraError.of("onnx", "export"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert (copy.reason, copy.where, copy.remedy) == (error.reason, error.where, error.remedy)
    assert isinstance(error, refold.RefoldError)


def test_errors_say_where_why_and_what_to_do():
    assert str(refold.SiteError("why", where="where", remedy="Do.")) == "where: why. Do."
    assert str(refold.SiteError("why")) == "why"
    error = MissingExtraError.of("onnx", "export")
    assert isinstance(error, ImportError)
    assert "pip install 'refold[export]'" in str(error)


def test_one_module_at_two_places_is_adapted_as_one():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second, self.head = self.first, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(torch.tanh(self.first(x))))

    model, x = Recurrent().double(), torch.randn(2, 8).double()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    refold.attach(model, refold.LoRA(rank=2, sites="first"), example=x)
    perturb(refold.trainable_parameters(model))
    output = model(x)
    refold.merge(model)
    assert relative(model(x), output) < 1e-10
    assert model.second is model.first
    refold.detach(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
