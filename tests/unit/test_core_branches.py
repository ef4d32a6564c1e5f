"""Residual branches are found by what a forward computes, whatever the modules are called."""

from __future__ import annotations

import pytest
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import refold
from refold.adapters import Layout
from refold.places import blocks, branch_site, branches, projection, stages
from refold.state import state_of
from refold.survey import Survey
from zoo import build, images, perturb


class Strange(nn.Module):
    """Residual sums of every kind, under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(8, 8) for _ in range(5))
        self.n, self.m = nn.LayerNorm(8), nn.LayerNorm(8)
        self.f = nn.Parameter(torch.randn(8))
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.f  # no branch: the parameter is not computed from x
        x = self.b(torch.relu(self.n(x))) + x
        y = self.m(x)
        x = x + self.c(y) + self.d(y)  # two branches of one stream
        x += self.e(x)
        return self.out(self.a(x).mean(1))  # a is called twice


def strange() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Strange().double(), torch.randn(2, 5, 8, dtype=torch.float64)


def test_they_are_where_the_stream_is_added_to():
    model, x = strange()
    found = Survey(model, x).trace.branches
    assert [(b.source, b.entry, b.exit) for b in found] == [
        ("n", "n", "b"),
        ("m", "m", "c"),
        ("m", "m", "d"),
        ("e", "e", "e"),
    ]


def test_what_is_added_is_by_hand_what_the_paper_says():
    """AdaptFormer on every branch, against the same forward written out."""
    model, x = strange()
    refold.attach(model, refold.AdaptFormer(hidden=3, scale=0.7, dropout=0.0), example=x, trainable=("out",))
    perturb(refold.trainable_parameters(model), 0.5)
    added = {site.path: site for site in state_of(model).record().sites}
    assert list(added) == ["b", "c", "d", "e"]

    def side(path: str, stream: Tensor) -> Tensor:
        adapter = model.get_submodule(f"{path}.refold.default")
        return 0.7 * adapter.up(torch.relu(adapter.down(stream)))

    with refold.disabled(model):
        a, b, c, d, e = (model.get_submodule(name) for name in "abcde")
        with torch.no_grad():
            s = a(x) + model.f
            s = b(torch.relu(model.n(s))) + s + side("b", s)
            y, before = model.m(s), s
            s = s + c(y) + d(y) + side("c", before) + side("d", before)
            s = s + e(s) + side("e", s)
            expected = a(s).mean(1)
    assert torch.allclose(model(x), model.out(expected), atol=1e-12)


def test_branches_that_end_in_one_module_take_turns():
    """timm's Mixer ends both branches of a block in one module, behind a transpose: by hand, against the reference."""
    torch.manual_seed(0)
    model = MlpMixer(2, img_size=64, patch_size=32, num_blocks=1, embed_dim=16, drop_path_rate=0.1)
    model, x = model.double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    refold.attach(model, refold.Convpass(hidden=3, dropout=0.0), example=x)
    keys = [site.key for site in state_of(model).record().sites]
    assert keys == ["blocks.0.drop_path@blocks-0-norm1", "blocks.0.mlp_channels.drop2"]  # the first is called twice
    perturb(refold.trainable_parameters(model), 0.5)
    block, layout = model.blocks[0], Layout(-1, 0, (2, 2))
    (first,), (second,) = (m.refold.values() for m in (block.drop_path, block.mlp_channels.drop2))
    with torch.no_grad(), refold.disabled(model):
        s = model.stem(x)
        s = s + block.mlp_tokens(block.norm1(s).transpose(1, 2)).transpose(1, 2) + first(block.norm1(s), layout)
        s = s + block.mlp_channels(block.norm2(s)) + second(block.norm2(s), layout)
        expected = model.norm(s).mean(1)
    with torch.no_grad():
        assert torch.allclose(model.forward_features(x).mean(1), expected, atol=1e-12)


def test_a_second_adapter_finds_the_same_places():
    model = refold.attach(build("vit"), refold.AdaptFormer())
    refold.attach(model, refold.AdaptFormer(), name="other")
    first, second = (state_of(model).record(name).sites for name in ("default", "other"))
    assert first == second
    before = model(images(model))
    perturb({n: p for n, p in model.named_parameters() if ".refold.default." in n})
    assert torch.equal(model(images(model)), before)
    refold.activate(model, "default")
    assert not torch.equal(model(images(model)), before)


@pytest.mark.parametrize(
    ("family", "first", "count"),
    [
        ("vit", "blocks.0", 2),
        ("swin", "layers.0.blocks.0", 3),
        ("convnext", "stages.0.blocks.0", 4),
        ("open_clip_tower", "visual.transformer.resblocks.0", 2),
        ("torchvision_vit", "encoder.layers.encoder_layer_0", 2),
    ],
)
def test_blocks_hold_whole_branches(family, first, count):
    model = build(family)
    found = blocks(Survey(model, images(model), head=("head",)))
    assert found[0] == first
    assert len(found) == count


def test_stages_end_where_the_shape_changes_or_in_equal_parts():
    swin, vit = build("swin"), build("vit")
    assert stages(Survey(swin, images(swin)), 2) == ["layers.0.blocks.0", "layers.1.blocks.1"]
    assert stages(Survey(vit, images(vit)), 1) == ["blocks.1"]


def test_the_projection_is_the_layer_that_writes_to_the_stream():
    model = build("vit")
    survey = Survey(model, images(model))
    found, _ = branches(survey, None, ("attention", "mlp"))
    layers = [projection(survey, branch) for branch in found]
    assert [layer.path for layer in layers[:2] if layer] == ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]
    assert [branch.role for branch in found] == ["attention", "mlp"] * 2


def test_a_branch_nothing_reads_or_gives_is_refused():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.5
            return self.out(x + torch.tanh(self.inside(x)))

    model, x = Bare(), torch.randn(2, 3, 4)
    with pytest.raises(refold.SiteError, match="no module gives the result of this residual branch"):
        refold.attach(model, refold.AdaptFormer(), example=x, trainable=("out",))
    survey = Survey(model, x)
    with pytest.raises(refold.SiteError, match="no module reads the residual stream"):
        branch_site(survey, survey.trace.branches[0].__class__("", "", "inside", ("inside",)), "stream")


def test_a_checkpoint_around_a_block_is_exact_and_one_inside_is_refused():
    model = build("vit", torch.float64)
    refold.attach(model, refold.AdaptFormer(hidden=8, dropout=0.0))
    perturb(refold.trainable_parameters(model))
    gradients = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.train()
        model.zero_grad()
        model(images(model)).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in refold.trainable_parameters(model).items()})
    assert all(torch.allclose(gradients[1][n], g, atol=1e-12) for n, g in gradients[0].items())

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.head(x + torch.utils.checkpoint.checkpoint(self.fc, y, use_reentrant=False))

    other, x = Inside(), torch.randn(2, 3, 4, requires_grad=True)
    refold.attach(other, refold.AdaptFormer(), example=x.detach(), trainable=("head",))
    with pytest.raises(refold.SiteError, match="was not seen in this call"):
        other.train()(x).sum().backward()
