"""VPT refuses what reads its tokens by their place, whatever shapes chance lets through."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn

import refold
from refold.hosting import hooks_left, hosted
from zoo import build, named, relative


class Grid(nn.Module):
    """A block that reads its tokens as a square, whatever the square's size."""

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.norm, self.mix, self.proj = nn.LayerNorm(16), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 16)
        nn.init.constant_(self.mix.weight, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(x.shape[1])
        maps = self.norm(x).transpose(1, 2).unflatten(2, (side, side))
        return x + self.proj(self.mix(maps).flatten(2).transpose(1, 2))


class Pooled(nn.Module):
    """Attention to what was pooled from a square: spatial reduction, as in PVT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.pool = nn.LayerNorm(16), nn.AdaptiveAvgPool2d(2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, normed = math.isqrt(x.shape[1]), self.norm(x)
        few = self.pool(normed.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        return x + self.attention(normed, few, few)[0]


class Numbered(nn.Module):
    """Attention that rotates nothing but adds a bias by distance in the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        place = torch.arange(x.shape[1], dtype=x.dtype)
        normed = self.norm(x)
        return x + self.attention(normed, normed, normed, attn_mask=-(place[:, None] - place).abs())[0]


class Masked(nn.Module):
    """A transformer whose blocks get a mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.patch_embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(layer() for _ in range(2))
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, src_mask=self.mask)
        return self.head(x.mean(1))


class Stack(nn.Module):
    """Patches, blocks, an average and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.blocks, self.head = nn.Conv2d(3, 16, 8, 8), nn.ModuleList(blocks), nn.Linear(16, 3)

    def between(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for number, block in enumerate(self.blocks):
            x = self.between(block(x), number)
        return self.head(x.mean(1))


def layer(batch_first: bool = True) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)


class Transposed(Stack):
    """Its tokens are the first dimension, its images the second."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).permute(2, 0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(0))


def torchvision_swin(version: str) -> nn.Module:
    import torchvision.models.swin_transformer as tv

    block = tv.SwinTransformerBlock if version == "v1" else tv.SwinTransformerBlockV2
    merging = tv.PatchMerging if version == "v1" else tv.PatchMergingV2
    options = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": [4, 4], "num_classes": 3}
    return tv.SwinTransformer(patch_size=[2, 2], block=block, downsample_layer=merging, **options)


def transformers(name: str, **options: object) -> nn.Module:
    import transformers as hf

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    sizes = {"image_size": 32, "patch_size": 8, "num_labels": 3, **(sizes if name == "Beit" else {}), **options}
    return getattr(hf, f"{name}ForImageClassification")(getattr(hf, f"{name}Config")(**sizes))


small = {"img_size": 32, "embed_dim": 16, "num_heads": 2}
pyramid = {"embed_dims": (8, 16), "num_heads": (1, 2), "sr_ratios": (2, 1), "mlp_ratios": (1, 1)}
#: Model, prompts, reason. Most have 16 tokens, which 9 more make another square.
REFUSED: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "convnext": (lambda: build("convnext"), 3, "its features are maps"),
    "resnet": (lambda: build("resnet"), 3, "its features are maps"),
    "efficientnet": (lambda: build("efficientnet"), 3, "no residual blocks"),
    "swin_v2": (
        named("swinv2_tiny_window8_256", img_size=32, depths=(1, 1), embed_dim=16, num_heads=(1, 2), window_size=4),
        3,
        "its features are maps",
    ),
    "torchvision_swin": (partial(torchvision_swin, "v1"), 3, "its features are maps"),
    "torchvision_swin_v2": (partial(torchvision_swin, "v2"), 3, "its features are maps"),
    "transformers_swin": (
        partial(transformers, "Swin", patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
        3,
        "relative positions are not those of 256 tokens",
    ),
    "transformers_beit": (partial(transformers, "Beit", use_relative_position_bias=True), 9, "it fails .*must match"),
    "pvt": (named("pvt_v2_b0", depths=(1, 1), **pyramid), 3, "it fails"),
    "twins": (named("twins_svt_small", img_size=32, depths=(2, 2), wss=(2, 2), **pyramid), 3, "it fails"),
    "convit": (
        named("convit_tiny", patch_size=8, depth=2, local_up_to_layer=1, **small), 9, "order of its tokens|it fails"
    ),
    "mixer": (partial(MlpMixer, img_size=32, patch_size=8, embed_dim=16, num_blocks=2, num_classes=3), 9, "it fails"),
    "xcit": (named("xcit_nano_12_p8_224", depth=2, **small), 9, "order of its tokens|it fails"),
    "grid": (lambda: Stack(Grid(), Grid()), 9, "depends on the order of its tokens"),
    "grid_that_starts_at_zero": (lambda: Stack(Grid(0.0), Grid(0.0)), 9, "depends on the order of its tokens"),
    "grid_that_does_not_fit": (lambda: Stack(Grid(), Grid()), 3, "it fails"),
    "grid_beside_attention": (lambda: Stack(layer(), Grid()), 9, r"blocks\.1: .*depends on the order"),
    "spatial_reduction": (lambda: Stack(Pooled(), Pooled()), 9, "depends on the order of its tokens"),
    "numbered": (lambda: Stack(Numbered(), Numbered()), 1, "depends on the order of its tokens"),
    "sequence_first": (lambda: Transposed(layer(False), layer(False)), 3, "none of its tokens reads another"),
    "mask_of_booleans": (lambda: Masked(torch.eye(16) > 2), 3, "an attention mask of torch.bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("deep", [True, False])
def test_what_reads_its_tokens_by_their_place_is_refused(name, deep):
    make, tokens, reason = REFUSED[name]
    model, x = make().eval(), torch.randn(1, 3, 32, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = outputs(model, x)
    with pytest.raises(refold.SiteError, match=reason if deep else None):
        refold.attach(model, refold.VPT(tokens=tokens, deep=deep), example=x)
    assert hooks_left(model) == 0
    assert not hosted(model)
    with torch.no_grad():
        assert torch.equal(outputs(model, x), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found.logits


def test_the_blocks_that_take_prompts_can_be_named():
    model = Stack(layer(), Grid(), layer()).eval()
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(refold.SiteError, match=r"Name blocks that take them in sites=: blocks\.0, blocks\.2"):
        refold.attach(model, refold.VPT(tokens=9), example=x)
    refold.attach(model, refold.VPT(tokens=9, sites=("blocks.0", "blocks.2")), example=x)
    assert list(hosted(model)) == ["blocks.0", "blocks.2"]
    with pytest.raises(refold.SiteError, match=r"blocks\.1: .*depends on the order"):
        refold.attach(Stack(layer(), Grid()), refold.VPT(tokens=9, sites="blocks.1"), example=x)


class Reads(Stack):
    """Something between its blocks reads the tokens."""

    def between(self, x: torch.Tensor, number: int) -> torch.Tensor:
        if number == 0:
            self.seen = x.mean(1)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.head(self.seen)


class Changes(Stack):
    """A convolution between its blocks."""

    def between(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return x + x.roll(1, dims=1)


@pytest.mark.parametrize(("kind", "reason"), [(Reads, "collects features"), (Changes, "something lies between")])
def test_shallow_prompts_go_from_block_to_block_or_nowhere(kind, reason):
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(refold.SiteError, match=f"{reason}.*deep=True"):
        refold.attach(kind(layer(), layer()).eval(), refold.VPT(deep=False), example=x)
    refold.attach(kind(layer(), layer()).eval(), refold.VPT(deep=True), example=x)


def test_features_that_hooks_collect_are_seen():
    """As transformers collects hidden states: behind a block's own result, and in front of the first block."""
    x = torch.randn(2, 3, 32, 32)
    for first, deep in ((False, False), (True, True)):

        class Collects(Stack):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) + self.head(self.seen.mean(1))

        model = Collects(layer(), layer()).eval()

        def collect(block, args, output, model=model, first=first):
            model.seen = args[0] if first else output

        model.blocks[0].register_forward_hook(collect)
        with pytest.raises(refold.SiteError, match="collects features"):
            refold.attach(model, refold.VPT(deep=deep), example=x)


def test_shallow_prompts_that_no_block_takes_out_are_an_error():
    class Exits(Stack):
        early = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            for block in self.blocks[: 1 if self.early else 2]:
                x = block(x)
            return self.head(x.mean(1))

    model = Exits(layer(), layer()).eval()
    x = torch.randn(2, 3, 32, 32)
    refold.attach(model, refold.VPT(deep=False), example=x)
    before = model(x)
    model.early = True
    with pytest.raises(refold.SiteError, match=r"blocks\.0: prompts were put in here"):
        model(x)
    model.early = False
    assert torch.equal(model(x), before)


def test_a_mask_to_add_is_zero_for_prompts():
    """And torch's fast path of a whole layer, taken without gradients, computes the same."""
    mask = torch.zeros(16, 16).masked_fill(torch.rand(16, 16) > 0.5, -torch.inf).fill_diagonal_(0.0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for values in (mask.double(), None):
        model = (Stack(layer(), layer()) if values is None else Masked(values)).double().eval()
        refold.attach(model, refold.VPT(tokens=3), example=x, trainable=())
        tokens = model.patch_embed(x).flatten(2).transpose(1, 2)
        with refold.disabled(model):
            for block, own in zip(
                list(model.blocks), [s["default"].prompts for s in hosted(model).values()], strict=True
            ):
                longer = torch.cat((own.expand(2, -1, -1), tokens), 1)
                bias = torch.zeros(19, 19).double()
                bias[3:, 3:] = 0 if values is None else values
                normal = block.norm1(longer + block.self_attn(longer, longer, longer, attn_mask=bias)[0])
                tokens = block.norm2(normal + block.linear2(block.linear1(normal).relu()))[:, 3:]
            expected = model.head(tokens.mean(1))
        assert relative(model(x), expected) < 1e-12
        with torch.no_grad():
            assert relative(model(x), expected) < 1e-12
