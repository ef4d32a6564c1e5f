"""Where the channels are is known also when the height or width of a map is the number of channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from refold.channels import channel_dim
from refold.errors import SiteError
from refold.places import branches
from refold.state import state_of
from refold.survey import Survey


def convnext() -> nn.Module:
    return timm.create_model("test_convnext", num_classes=3)


def features() -> nn.Module:
    return timm.create_model("test_convnext", features_only=True)


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=3)


def metaformer() -> nn.Module:
    """Its stream is read by timm's LayerNorm2d, a LayerNorm of channels that come first."""
    from timm.models.metaformer import LayerNorm2dNoBias, MetaFormer, SepConv

    return MetaFormer(num_classes=3, depths=(1, 1), dims=(32, 64), token_mixers=SepConv, norm_layers=LayerNorm2dNoBias)


def pvt() -> nn.Module:
    """Its adapters read the grid of the tokens off maps with the channels last."""
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    return PyramidVisionTransformerV2(
        num_classes=3, depths=(1, 1, 1, 1), embed_dims=(16, 24, 32, 40), num_heads=(1, 1, 2, 2)
    )


def transformers_convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 24], depths=[1, 1], num_stages=2, num_labels=3)
    return ConvNextForImageClassification(config)


def torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 1)], num_classes=3)


def swin(size: int) -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, window_size=4, depths=(1, 1), embed_dim=16, num_heads=(2, 2),
        num_classes=3,
    )  # fmt: skip


#: Backbone -> how it is made for a size, the method, and sizes at which some stage is as wide as it has channels.
CASES: dict[str, tuple[Callable[[int], nn.Module], refold.Method, tuple[int, ...]]] = {
    "convnext": (lambda size: convnext(), refold.Adapter(), (96, 128, 256)),
    "convnext, E3VA": (lambda size: features(), refold.E3VA(rank=2), (96, 256)),
    "resnet": (lambda size: resnet(), refold.Adapter(), (128, 256)),
    "metaformer": (lambda size: metaformer(), refold.Adapter(), (128, 512)),
    "pvt": (lambda size: pvt(), refold.Adapter(), (64, 192)),
    "transformers": (lambda size: transformers_convnext(), refold.Mona(hidden=4), (64, 192)),
    "torchvision": (lambda size: torchvision_convnext(), refold.AdaptFormer(hidden=4), (64, 192)),
    "swin": (swin, refold.E3VA(rank=2), (64, 256)),
}


def channels(name: str, size: int) -> dict[tuple[str, str], tuple[int, int, bool | None]]:
    make, method, _ = CASES[name]
    torch.manual_seed(0)
    model = refold.attach(make(size), method, example=torch.randn(1, 3, size, size))
    state = state_of(model)
    assert state is not None
    return {
        (site.path, site.slot): (site.channel_dim, site.width, site.route and site.route.grid_first)
        for site in state.record().sites
    }


@pytest.mark.parametrize("name", list(CASES))
def test_channels_are_where_they_are_at_any_size(name: str) -> None:
    expected = channels(name, 160)
    assert expected
    for size in CASES[name][2]:
        assert channels(name, size) == expected


class Blind(nn.Module):
    """A residual branch that treats all dimensions alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.act = nn.GELU()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.act(x)
        return self.head(x.mean((2, 3)))


def test_what_nothing_tells_is_refused() -> None:
    for size, known in ((32, False), (64, True)):
        survey = Survey(Blind(), torch.randn(1, 3, size, size))
        (branch,), _ = branches(survey, ("act",), ())
        shape = survey.trace.shapes["act"]
        if known:
            assert channel_dim(survey, "act", shape, 8, branch) == -3
            continue
        with pytest.raises(SiteError, match=r"^act: nothing tells which dimension .* example= with images of another"):
            channel_dim(survey, "act", shape, 8, branch)
