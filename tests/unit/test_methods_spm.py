"""SPM against its formula in every layout, its places and counts, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

import refold
from reference import stage_prompts
from stage_ends import check_added, numbers
from zoo import build, images, perturb

METHOD = refold.SPM(hidden=5, classes=3, steps=3)
#: Family -> the last block of each stage but the last.
BETWEEN = {
    "resnet": ["layer1.0", "layer2.0"],
    "convnext": [f"stages.{i}.blocks.0" for i in range(3)],
    "swin": ["layers.0.blocks.0"],
    "vit_with_registers": ["blocks.0"],
}


@pytest.mark.parametrize("family", BETWEEN)
def test_every_stage_hands_on_what_the_formula_says(family):
    model = refold.attach(build(family, torch.float64), METHOD)
    perturb(refold.trainable_parameters(model), 0.3)
    values = numbers(model)
    assert list(values) == BETWEEN[family]
    prefix = 5 if family == "vit_with_registers" else 0
    check_added(model, family, lambda tokens, values, grid: stage_prompts.matcher(tokens, values, grid, prefix, 3))


@pytest.mark.parametrize(
    ("name", "widths", "total", "size"),
    [
        ("resnet50", (256, 512, 1024), 245_664, 64),
        ("swin_base_patch4_window7_224", (128, 256, 512), 130_080, 224),
        ("vit_base_patch16_224", (768,) * 3, 311_712, 224),
    ],
)
def test_places_between_stages_and_the_closed_formula(name, widths, total, size):
    model = timm.create_model(name, num_classes=0)
    refold.attach(model, refold.SPM(), example=torch.zeros(1, 3, size, size), trainable=())
    rows = [row for row in refold.explain(model).rows if row.slot == "output"]
    assert [row.width for row in rows] == list(widths)
    h, k = 64, 32
    assert [row.parameters for row in rows] == [2 * d * h + d + 2 * h * k + k + 11 * h for d in widths]
    assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == total


def test_files_checkpointing_and_detaching(tmp_path):
    model = build("swin")
    plain = {n: v.clone() for n, v in model.state_dict().items()}
    refold.attach(model, METHOD)
    perturb(refold.trainable_parameters(model))
    x, found = images(model), []
    exact = model(x).detach()
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(0)  # Swin's stochastic depth
        model.train()(x).square().sum().backward()
        found.append([p.grad.clone() for p in refold.trainable_parameters(model).values()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))
    model.set_grad_checkpointing(False)
    path = refold.save(model.eval(), tmp_path / "a.safetensors")
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(model)
    refold.detach(model)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in plain.items())
    assert torch.equal(refold.load(model, path)(x), exact)


def test_what_has_no_place_is_refused():
    one = timm.create_model("test_vit", depth=1, num_classes=2)
    with pytest.raises(refold.SiteError, match="has one stage, and prompts go between two"):
        refold.attach(one, METHOD)
    refold.attach(one, refold.SPM(sites="blocks.0"))
    assert list(numbers(one)) == ["blocks.0"]


@pytest.mark.parametrize("options", [{"hidden": 0}, {"classes": 1}, {"steps": 0}, {"sites": ()}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=f"{next(iter(options))}="):
        refold.SPM(**options)
