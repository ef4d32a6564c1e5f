"""Layers whose forward is not what it seems: weights that others read, or that are not used as stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

import refold
from refold.hosting import hooks_left
from zoo import CLASSES, build, images, perturb, relative

METHOD = refold.RepAdapter(rank=4, dropout=0.0)


def small(cls: type[nn.Module], **options: Any) -> nn.Module:
    return cls(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES, **options).eval()


def assert_exact(model: nn.Module, x: Tensor) -> None:
    """The adapters change the output, all of them learn, and merge and detach are exact."""
    plain = model.double().eval()(x.double()).detach()
    perturb(refold.trainable_parameters(model))
    output = model(x.double())
    assert relative(output, plain) > 1e-3
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in refold.trainable_parameters(model).values())
    assert relative(model(x.double()), output) == 0  # no folded weight is left behind by the first forward
    refold.merge(model)
    assert relative(model(x.double()), output) < 1e-10


@pytest.mark.parametrize("cls", [Beit, Eva])
@pytest.mark.parametrize("method", [METHOD, refold.LoRA(rank=4)], ids=lambda m: type(m).__name__)
def test_a_projection_that_its_parent_multiplies_is_adapted(cls, method):
    """BEiT and EVA pass ``qkv.weight`` to ``F.linear`` themselves: a hook on ``qkv`` never fires."""
    model = small(cls)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    refold.attach(model, method)
    rows = {row.path: row for row in refold.explain(model).rows}
    for block in range(2):
        row = rows[f"blocks.{block}.attn.qkv"]
        assert row.mergeable
        assert f"acts on the stored weight, which blocks.{block}.attn reads" in row.reason
    assert_exact(model, images(model))
    refold.detach(model)
    assert all(torch.equal(v, before[n].to(v.dtype)) for n, v in model.state_dict().items())
    assert hooks_left(model) == 0
    assert not any("refold" in key for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("method", [refold.RepAdapter(rank=4, dropout=0.0), refold.LoRA(rank=4), refold.SSF()])
def test_the_output_projection_of_torchs_attention_is_adapted(method):
    """``nn.MultiheadAttention`` multiplies ``out_proj.weight`` itself."""
    model = build("open_clip_tower")
    method = replace(method, sites="visual.transformer.resblocks.*.attn.out_proj")
    refold.attach(model, method)
    assert len([row for row in refold.explain(model).rows if row.path.endswith("out_proj")]) == 2
    assert_exact(model, images(model))


class Standardised(nn.Conv2d):
    """A convolution that does not use its weight as stored."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


@pytest.mark.parametrize("method", [METHOD, refold.LoRA(rank=2), refold.DoRA(rank=2), refold.OFT(block=4)])
def test_a_weight_that_is_not_used_as_stored_is_adapted_as_stored(method):
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    x = torch.randn(2, 4, 6, 6)
    refold.attach(model, replace(method, sites="0"), example=x, trainable=["3"])
    assert_exact(model, x)


def test_a_scale_that_the_layer_would_normalise_away_is_refused():
    model = nn.Sequential(Standardised(4, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 2))
    reason = "0: Standardised has a forward of its own, which may normalise a scaled weight away"
    with pytest.raises(refold.SiteError, match=reason):
        refold.attach(model, refold.SSF(sites="0"), example=torch.randn(2, 4, 6, 6), trainable=["2"])


class Beside(nn.Module):
    """Calls a layer and also multiplies its weight directly."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + x @ self.body.weight)


@pytest.mark.parametrize("method", [METHOD, refold.LoRA(rank=4)], ids=lambda m: type(m).__name__)
def test_a_weight_that_is_also_used_elsewhere_is_adapted_for_both(method):
    model, x = Beside(), torch.randn(2, 8)
    refold.attach(model, method, example=x)
    assert "which the model itself reads" in refold.explain(model).rows[0].reason
    assert_exact(model, x)


class Hidden(Beside):
    """Reads its weight through another tensor that shares the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = [self.body.weight.detach()]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + x @ self.alias[0])


def test_a_weight_whose_other_use_is_hidden_does_not_merge():
    """Nothing shows this before the fold: the check of the merge does, and undoes it."""
    model, x = Hidden(), torch.randn(2, 8)
    refold.attach(model, METHOD, example=x)
    perturb(refold.trainable_parameters(model), 0.3)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    output = model.eval()(x).detach()
    with pytest.raises(refold.MergeError, match=r"merged and unmerged outputs differ .*the merge was undone"):
        refold.merge(model)
    assert torch.equal(model(x), output)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


class Checkpointed(nn.Module):
    """Reads a child's weight in a part of its forward that runs again in the backward pass."""

    def __init__(self, reentrant: bool | None, whole: bool = False) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(8, 8), nn.Module(), nn.Linear(8, 2)
        self.body.qkv = nn.Linear(8, 8, bias=False)
        self.body.forward = self.inner  # type: ignore[method-assign]
        self.reentrant, self.whole = reentrant, whole

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.body.qkv.weight))

    def forward(self, x: Tensor) -> Tensor:
        x, part = self.first(x), self.body if self.whole else self.inner
        return self.head(part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("method", [METHOD, refold.LoRA(rank=4)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_the_owner_is_refused_and_one_around_it_is_exact(method, reentrant):
    """In the second run the stored weight is back: gradients would be wrong without a word."""
    x, method = torch.randn(4, 8), replace(method, sites="body.qkv")

    def trained(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        refold.attach(model, method, example=x, trainable=("head", "first"))
        perturb(refold.trainable_parameters(model))
        return model.train()

    model = trained(Checkpointed(reentrant))
    with pytest.raises((refold.SiteError, CheckpointError), match=r"re-entrant gradient|different number of tensors"):
        model(x).square().sum().backward()
    gradients = []
    for model in (trained(Checkpointed(None, whole=True)), trained(Checkpointed(reentrant, whole=True))):
        model(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in refold.trainable_parameters(model).items()})
    assert all(torch.allclose(gradients[1][n], gradient) for n, gradient in gradients[0].items())
    assert any("refold" in n for n in gradients[0])
