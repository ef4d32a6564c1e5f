"""LV-Adapter against its formula in every layout, its counts, the text it is given, and what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

import refold
from reference import stage_prompts
from refold.methods.lv_adapter import set_text
from stage_ends import check_added, numbers
from zoo import build, images, perturb, relative

METHOD = refold.LVAdapter(hidden=5, prompts=3, text_width=7)
#: Family -> the last block of each stage.
ENDS = {
    "resnet": ["layer1.0", "layer2.0", "layer4.0"],
    "convnext": [f"stages.{i}.blocks.0" for i in range(4)],
    "swin": ["layers.0.blocks.0", "layers.1.blocks.1"],
    "vit_with_registers": ["blocks.0", "blocks.1"],
}


@pytest.mark.parametrize("family", ENDS)
def test_every_stage_reads_the_same_words(family):
    model = refold.attach(build(family, torch.float64), METHOD)
    perturb(refold.trainable_parameters(model), 0.5)
    text = torch.randn(3, 7, dtype=torch.float64)
    set_text(model, text)
    words = (text / text.square().sum(1, keepdim=True).sqrt()).numpy()
    values = numbers(model)
    assert list(values) == ENDS[family]
    assert sum("words.embeddings" in tensors for tensors in values.values()) == 1
    check_added(model, family, lambda tokens, values, grid: stage_prompts.language(tokens, values, words))


@pytest.mark.parametrize(
    ("name", "widths", "total", "size"),
    [
        ("resnet50", (256, 512, 1024, 2048), 765_952, 64),
        ("swin_base_patch4_window7_224", (128, 256, 512, 1024), 518_272, 224),
        ("vit_base_patch16_224", (768,) * 4, 666_880, 224),
    ],
)
def test_a_place_for_every_stage_and_the_closed_formula(name, widths, total, size):
    model = timm.create_model(name, num_classes=0)
    refold.attach(model, refold.LVAdapter(), example=torch.zeros(1, 3, size, size), trainable=())
    rows = [row for row in refold.explain(model).rows if row.slot == "output"]
    assert [row.width for row in rows] == list(widths)
    h, c, k = 64, 512, 16
    assert sum(2 * d * h + d + h + 2 * h * c for d in widths) + k * c == total
    assert sum(p.numel() for p in refold.trainable_parameters(model).values()) == total


def test_words_start_at_length_one_and_text_changes_what_is_said():
    torch.manual_seed(0)
    model = refold.attach(build("vit"), refold.LVAdapter(hidden=8, prompts=50, text_width=64))
    (words,) = (p for n, p in model.named_parameters() if n.endswith("words.embeddings"))
    assert float(words.detach().square().sum(1).mean()) == pytest.approx(1, rel=0.1)
    perturb(refold.trainable_parameters(model), 0.3)
    x = images(model)
    before = model(x)
    set_text(model, torch.eye(64)[:50] * 9)
    assert torch.equal(words.detach(), torch.eye(64)[:50])
    assert relative(model(x), before) > 1e-3
    assert words.requires_grad


def test_files_and_named_adapters_keep_their_own_words(tmp_path):
    model = refold.attach(build("convnext"), METHOD, name="a")
    refold.attach(model, METHOD, name="b")
    texts, x, outputs = {"a": torch.eye(7)[:3], "b": torch.eye(7)[3:6]}, images(model), {}
    for name, text in texts.items():
        refold.activate(model, name)
        perturb(refold.trainable_parameters(model), 0.3)
        set_text(model, text)
        outputs[name] = model(x).detach()
        refold.save(model, tmp_path / f"{name}.safetensors")
    fresh = build("convnext")
    for name in texts:
        refold.load(fresh, tmp_path / f"{name}.safetensors")
    for name, text in texts.items():
        refold.activate(fresh, name)
        assert torch.equal(fresh(x), outputs[name])
        stored = [p for n, p in fresh.named_parameters() if f".refold.{name}." in n and n.endswith("embeddings")]
        assert len(stored) == 1
        assert torch.equal(stored[0].detach(), text)
    with pytest.raises(refold.MergeError, match="does not fold"):
        refold.merge(fresh)


def test_text_that_does_not_fit_is_refused():
    model = build("vit")
    with pytest.raises(refold.SiteError, match="no LVAdapter is in use"):
        set_text(model, torch.ones(3, 7))
    refold.attach(model, METHOD)
    with pytest.raises(refold.SiteError, match=r"text: has shape \(4, 7\), the adapter's prompts \(3, 7\)"):
        set_text(model, torch.ones(4, 7))
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(refold.SiteError, match="zero or not finite"):
            set_text(model, torch.full((3, 7), value))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("options", [{"hidden": 0}, {"prompts": 1}, {"text_width": 0}, {"sites": ()}])
def test_wrong_hyper_parameters_are_refused(options):
    with pytest.raises(refold.SiteError, match=f"{next(iter(options))}="):
        refold.LVAdapter(**options)
