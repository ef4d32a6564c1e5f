"""Several methods on one model: exact where they agree, refused where they do not."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import refold
from refold.cli.options import parse_method
from refold.methods import method_from_json
from refold.state import state_of
from zoo import build, images, perturb, relative

FOLDING = {
    "RepAdapter": refold.RepAdapter(rank=4, dropout=0.0),
    "LoRA": refold.LoRA(rank=4, sites=None),
    "DoRA": refold.DoRA(rank=4),
    "OFT": refold.OFT(block=8),
    "SSF": refold.SSF(),
    "BitFit": refold.BitFit(),
}
#: Two that write the same place in ways that exclude each other, on any backbone.
EXCLUSIVE = ({"RepAdapter", "OFT"}, {"LoRA", "DoRA"})
FAMILIES = ("vit", "vit_with_layer_scale", "swin", "convnext", "resnet", "open_clip_tower")


def trained(family: str, method: refold.Method) -> nn.Module:
    model = refold.attach(build(family, torch.float64), method)
    perturb(refold.trainable_parameters(model))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", list(itertools.combinations(FOLDING, 2)), ids="+".join)
def test_a_pair_merges_exactly_or_is_refused(family, names):
    pair = refold.Compose([FOLDING[name] for name in names])
    if set(names) in EXCLUSIVE:
        with pytest.raises(refold.SiteError, match=f"{names[0]} and {names[1]}: both claim its"):
            refold.attach(build(family), pair)
        return
    model = trained(family, pair)
    x, plain = images(model), build(family, torch.float64)
    before = model(x).detach()
    state = copy.deepcopy(model.state_dict())
    assert refold.merge(model).rel_l2 <= 1e-10
    assert list(model.state_dict()) == list(plain.state_dict())
    assert relative(model(x), before) <= 1e-10
    refold.unmerge(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    refold.detach(model)
    assert all(torch.equal(v, plain.state_dict()[n]) for n, v in model.state_dict().items())


def test_the_order_on_one_layer_is_weight_then_input_then_output():
    """``gamma (W + B A)(M x + c) + gamma b + beta`` by hand, whatever the order in which the methods are given."""
    layer = nn.Linear(6, 4, dtype=torch.float64)
    for order in itertools.permutations((refold.SSF(), refold.RepAdapter(rank=2, dropout=0.0), refold.LoRA(rank=2))):
        model = nn.Sequential(copy.deepcopy(layer), nn.Linear(4, 2, dtype=torch.float64))
        x = torch.randn(3, 6, dtype=torch.float64)
        refold.attach(model, refold.Compose(order), example=x, trainable=("1",))
        perturb(refold.trainable_parameters(model), 0.5)
        slot = {type(a).__name__: a for a, _ in model[0].refold.current()}
        low, rep, ssf = slot["LowRank"], slot["LinearBottleneck"], slot["ScaleShift"]
        inside = x + (x @ rep.down.T + rep.down_bias) @ torch.block_diag(*rep.up.chunk(2)).T + rep.up_bias
        weight = layer.weight + low.up @ low.down
        expected = ssf.gamma * (inside @ weight.T + layer.bias) + ssf.beta
        assert relative(model[0](x), expected) <= 1e-12


def test_side_adapters_join_those_that_fold():
    method = refold.Compose([refold.Adapter(hidden=2), refold.LoRA(rank=2, sites="mlp_out")])
    model = trained("vit", method)
    assert {s.slot for s in state_of(model).record().sites} == {"output", "weight"}
    hosts = [s.path for s in state_of(model).record().sites]
    assert len(set(hosts)) == 2
    assert len(hosts) == 4  # the MLP's last layer carries both
    with pytest.raises(refold.MergeError, match=r"Adapter\(hidden=2\) does not fold"):
        refold.merge(model)


def test_it_is_saved_and_read_as_the_sum_of_its_methods(tmp_path):
    method = refold.Compose([refold.RepAdapter(rank=2), refold.LoRA(rank=2), refold.AdaptFormer(hidden=2)])
    model = trained("swin", method)
    x = images(model)
    parts = [refold.attach(build("swin"), part) for part in method.methods]
    head = sum(row.parameters for row in refold.explain(parts[0]).rows if row.slot == "head")
    assert refold.explain(model).trainable == sum(refold.explain(p).trainable - head for p in parts) + head
    path = refold.save(model, tmp_path / "three.safetensors")
    other = refold.load(build("swin", torch.float64), path)
    assert torch.equal(other(x), model(x))
    assert state_of(other).record().method == method
    assert method_from_json(method.to_json()) == method
    assert str(method.describe()) == "Compose([RepAdapter(rank=2), LoRA(rank=2), AdaptFormer(hidden=2)])"


def test_it_is_read_from_the_command_line():
    expected = refold.Compose([refold.RepAdapter(rank=2), refold.LoRA(), refold.SSF()])
    assert parse_method("RepAdapter(rank=2) + lora + SSF()") == expected


@pytest.mark.parametrize("methods", [[], [refold.LoRA()], [refold.LoRA(), "SSF"]], ids=["none", "one", "a name"])
def test_less_than_two_methods_is_refused(methods):
    with pytest.raises(refold.SiteError, match="a list of two or more methods"):
        refold.Compose(methods)


def test_two_shifts_into_one_batchnorm_add_up():
    """RepAdapter's shift before a convolution and SSF's behind it both go into the only BatchNorm that follows."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    model, x = model.double().eval(), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    pair = refold.Compose([refold.RepAdapter(rank=2, sites="0"), refold.SSF(sites="0")])
    refold.attach(model, pair, example=x, trainable=("3",))
    assert [site.shift.target for site in state_of(model).record().sites] == ["batchnorm", "batchnorm"]
    perturb(refold.trainable_parameters(model), 0.5)
    assert refold.merge(model).rel_l2 <= 1e-10
