"""Prompts behind stages against their formula, on a CNN, a hybrid and transformers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import refold
from reference import conv_side
from stage_ends import check_added, numbers
from zoo import build, images, perturb, relative

METHOD = refold.ProTuning(hidden=6)
#: Family -> the last block of each stage.
ENDS = {
    "resnet": ["layer1.0", "layer2.0", "layer4.0"],  # the block of layer3 is of another kind
    "convnext": [f"stages.{i}.blocks.0" for i in range(4)],
    "swin": ["layers.0.blocks.0", "layers.1.blocks.1"],
    "vit_with_registers": ["blocks.0", "blocks.1"],
}


@pytest.mark.parametrize("family", ENDS)
def test_every_stage_gets_the_prompt_of_the_formula(family):
    model = refold.attach(build(family, torch.float64), METHOD)
    perturb(refold.trainable_parameters(model), 0.2)
    values = numbers(model)
    assert list(values) == ENDS[family]
    prefix = 5 if family == "vit_with_registers" else 0

    def formula(tokens, values, grid):
        return conv_side.convpass(tokens, values, grid, prefix, act=conv_side.gelu)

    check_added(model, family, formula)


@pytest.mark.parametrize(
    ("name", "widths", "size"),
    [
        ("resnet18", (64, 128, 256, 512), 64),
        ("resnet50", (256, 512, 1024, 2048), 64),
        ("convnext_tiny", (96, 192, 384, 768), 64),
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768), 224),
        ("vit_small_patch16_224", (384,) * 4, 224),
        ("vit_base_patch16_siglip_224", (768,) * 4, 224),  # pools by a block of its own, which is no stage
    ],
)
def test_four_stages_and_the_closed_formula(name, widths, size):
    model = refold.attach(
        timm.create_model(name, num_classes=0), refold.ProTuning(), example=torch.zeros(1, 3, size, size)
    )
    rows = [row for row in refold.explain(model).rows if row.slot == "output"]
    assert [row.width for row in rows] == list(widths)
    assert [row.parameters for row in rows] == [2 * d * 64 + 27 * 64 + d for d in widths]


class Squeezed(nn.Module):
    """A residual block on maps of 8 columns whose squeeze has 8 channels, too."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.reduce = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 8, 1)
        self.gate, self.project = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.expand(x)
        return x + self.project(wide * self.gate(self.reduce(wide.mean((2, 3), keepdim=True))).sigmoid())


def test_maps_with_as_many_columns_as_a_squeeze_has_channels():
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), Squeezed(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
    refold.attach(model, METHOD, example=torch.randn(1, 3, 32, 32), trainable=("4",))
    assert [row.width for row in refold.explain(model).rows if row.slot == "output"] == [16]
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 2)


def test_the_start_is_the_backbone_and_every_part_trains():
    model = build("convnext")
    x = images(model, 4)
    before = model(x)
    refold.attach(model, METHOD)
    assert torch.equal(model(x), before)
    model.train()
    trainable = refold.trainable_parameters(model)
    optimizer, reached = torch.optim.SGD(trainable.values(), lr=0.1), set()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        reached |= {n for n, p in trainable.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert reached == set(trainable)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_checkpointing_low_precision_export_and_files(family, tmp_path):
    model = build(family)
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    refold.attach(model, METHOD)
    perturb(refold.trainable_parameters(model))
    x, found = images(model), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()(x).square().sum().backward()
        found.append([p.grad.clone() for p in refold.trainable_parameters(model).values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))
    model.eval().set_grad_checkpointing(False)
    exact = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(x), exact) < 2e-2
    assert torch.equal(torch.export.export(model, (x,)).module()(x), exact)
    path = refold.save(model, tmp_path / "a.safetensors")
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)
    refold.detach(model)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(model.state_dict()[n], v) for n, v in plain.items())
    assert torch.equal(refold.load(model, path)(x), exact)
    low = refold.attach(build(family, torch.bfloat16), METHOD)
    assert low(x.bfloat16()).dtype == torch.bfloat16


def test_other_image_sizes_than_at_attach():
    model = refold.attach(build("convnext"), METHOD)
    perturb(refold.trainable_parameters(model))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 3)


def test_blocks_are_chosen_by_path():
    model = refold.attach(build("swin"), refold.ProTuning(sites=("layers.1.*", "layers.0")))
    assert list(numbers(model)) == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    with pytest.raises(refold.SiteError, match="head: no block has this path"):
        refold.attach(build("swin"), refold.ProTuning(sites="head"))
    with pytest.raises(refold.SiteError, match="the forward has no residual blocks"):
        refold.attach(build("byobnet"), METHOD)


@pytest.mark.parametrize("options", [{"hidden": 0}, {"activation": "x"}, {"sites": ()}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=f"{next(iter(options))}="):
        refold.ProTuning(**options)
