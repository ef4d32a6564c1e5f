"""Conv-Adapter without activation: where it folds, exactly, and where it must not."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.nn import functional as F

import refold
from refold.adapters.separable import SeparableKernel
from refold.hosting import hosted
from zoo import build, images, perturb, relative

POSITIONS = ("conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential")


def attached(model: nn.Module, method: refold.Method, **options: object) -> nn.Module:
    refold.attach(model.double().eval(), method, **options)
    perturb(refold.trainable_parameters(model), 0.2)
    return model


# -- folding ----------------------------------------------------------------------------------------------------

HOSTS = {
    "plain": nn.Conv2d(8, 6, 3, padding=1),
    "without bias": nn.Conv2d(8, 6, 3, padding=1, bias=False),
    "strided and dilated": nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2),
    "oblong": nn.Conv2d(8, 6, (3, 5), padding=(1, 0)),
    "even": nn.Conv2d(8, 6, 2, stride=2),
    "reflected": nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(8, 6, 3, padding="same"),
    "same by itself": Conv2dSame(8, 6, 3, stride=2),
}


def around(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = HOSTS[name]
    return nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))


def by_hand(layer: nn.Module, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The layer and its adapter by torch's own functions: pad, convolve in groups, convolve pointwise, scale."""
    rows = [0, 0, 0, 0]
    if isinstance(layer, Conv2dSame):
        for axis, size in enumerate(reversed(x.shape[2:])):
            missing = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
            rows[2 * axis : 2 * axis + 2] = [missing // 2, missing - missing // 2]
    elif layer.padding == "same":
        rows = [1, 1, 1, 1]
    else:
        rows = [layer.padding[1]] * 2 + [layer.padding[0]] * 2
    padded = F.pad(x, rows, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    hidden = F.conv2d(
        padded, values["down"], values.get("down_bias"), layer.stride, 0, layer.dilation, len(values["down"])
    )
    out = F.conv2d(hidden, values["up"].flatten(1)[..., None, None], values.get("up_bias"))
    return layer(x) + values["gamma"][:, None, None] * out


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("merges", [True, False])
def test_without_activation_it_folds_whatever_the_geometry(name, merges):
    """Unmerged it is the formula; merged, the same; and the adapter of the other kind, beside the layer, too."""
    model = around(name).double().eval()
    method = refold.ConvAdapter(activation="identity" if merges else "relu", sites="1")
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    refold.attach(model, method, example=x[:1, :, :, :11], trainable=())
    perturb(refold.trainable_parameters(model), 0.3)
    adapter = hosted(model)["1"]["default"]
    values = {n.replace(".weight", "").replace(".bias", "_bias"): p.detach() for n, p in adapter.named_parameters()}
    assert ("up_bias" in values) == (not merges or name != "without bias")
    output = model(x).detach()
    if not merges:
        adapter.activation = nn.Identity()
        output = model(x).detach()
        with pytest.raises(refold.MergeError, match="does not fold"):
            refold.merge(model)
        refold.detach(model)
        expected = model[4](model[3](model[2](by_hand(model[1], model[0](x), values))))
        assert relative(output, expected) < 1e-12
        return
    report = refold.merge(model)
    assert report.rel_l2 < 1e-12
    assert relative(model(x), output) < 1e-12
    refold.unmerge(model)
    assert torch.equal(model(x), output)
    refold.detach(model)
    assert relative(output, model[4](model[3](model[2](by_hand(model[1], model[0](x), values))))) < 1e-12


@pytest.mark.parametrize(
    ("family", "grouped"),
    [
        ("resnet", []),
        ("efficientnet", ["blocks.3.0.conv_dw"]),
        ("convnext", [f"stages.{i}.blocks.0.conv_dw" for i in range(4)]),
        ("byobnet", []),
    ],
)
def test_dense_convolutions_fold_and_grouped_ones_are_left_out(family, grouped):
    method = refold.ConvAdapter(activation="identity")
    assert method.mergeable
    model = attached(build(family), method)
    told = refold.explain(model)
    left = {row.path: row.reason for row in told.rows if row.slot == "-"}
    assert [path for path in left if path in grouped] == grouped
    assert all("groups dense" in reason for reason in left.values())
    assert all(isinstance(slot["default"], SeparableKernel) for slot in hosted(model).values())
    x = images(model)
    output = model(x).detach()
    refold.merge(model)
    assert relative(model(x), output) < 1e-10
    for path in grouped:
        with pytest.raises(refold.SiteError, match=r"would make a convolution of [0-9]+ groups dense"):
            refold.attach(build(family), refold.ConvAdapter(activation="identity", sites=path))


def test_biases_may_be_created():
    model = attached(build("resnet"), refold.ConvAdapter(activation="identity"), allow_new_bias=True)
    told = refold.explain(model)
    assert {row.shift for row in told.rows if row.slot == "weight"} == {"new bias"}
    x = images(model)
    output = model(x).detach()
    refold.merge(model)
    assert relative(model(x), output) < 1e-10
    assert model.layer1[0].conv1.bias is not None


def test_a_standardised_weight_is_mapped_as_it_is_stored():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), StdConv2d(8, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 64, 2))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    attached(model, refold.ConvAdapter(activation="identity", sites="1"), example=x, trainable=())
    output = model(x).detach()
    assert "acts on the stored weight" in refold.explain(model).rows[0].reason
    refold.merge(model)
    assert relative(model(x), output) < 1e-12


@pytest.mark.parametrize("position", POSITIONS[1:])
def test_nothing_else_merges(position):
    method = refold.ConvAdapter(activation="identity", position=position)
    assert not method.mergeable
    model = refold.attach(build("resnet"), method)
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)
