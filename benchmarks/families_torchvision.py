"""torchvision: the smallest of every classification family, and the video ones, without weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import video
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video.swin_transformer import SwinTransformer3d

from families_check import Family

__all__ = ["families"]

CLASSES = 3
CLIP = (3, 8, 64, 64)


def _named(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(models.get_model, name, weights=None, num_classes=CLASSES, **options)


def _vgg(name: str) -> nn.Module:
    """With one linear layer for a head: the published one holds 120 of the 129 million parameters."""
    model: Any = models.get_model(name, weights=None)
    model.classifier = nn.Linear(512 * 7 * 7, CLASSES)
    return model


def _vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES
    )


def _convnext() -> nn.Module:
    stages = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 2)]
    return ConvNeXt(stages, num_classes=CLASSES, layer_scale=0.5)


def _swin(**options: Any) -> nn.Module:
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [7, 7], num_classes=CLASSES, **options)


def _maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )


def _mvit(version: int) -> nn.Module:
    """MViT with the traits of V1 (position embedding) or V2 (relative positions, residual pooling), two blocks."""
    settings = [
        video.mvit.MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 4, 4]),
        video.mvit.MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
    ]
    return video.MViT(
        (64, 64),
        8,
        settings,
        residual_pool=version == 2,
        residual_with_cls_embed=version == 1,
        rel_pos_embed=version == 2,
        proj_after_attn=version == 2,
        num_classes=CLASSES,
    )


def _s3d() -> nn.Module:
    """With a pooling that smaller clips fill."""
    model = video.s3d(weights=None, num_classes=CLASSES)
    model.avgpool = nn.AvgPool3d(kernel_size=(1, 2, 2), stride=1)
    return model


PICKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "alexnet": (_named("alexnet"), (3, 64, 64)),
    "convnext": (_convnext, (3, 64, 64)),
    "densenet": (_named("densenet121"), (3, 64, 64)),
    "efficientnet": (_named("efficientnet_b0"), (3, 64, 64)),
    "efficientnet_v2": (_named("efficientnet_v2_s"), (3, 64, 64)),
    "googlenet": (_named("googlenet", aux_logits=False, init_weights=False), (3, 64, 64)),
    "inception_v3": (_named("inception_v3", aux_logits=False, init_weights=False), (3, 96, 96)),
    "maxvit": (_maxvit, (3, 64, 64)),
    "mnasnet": (_named("mnasnet0_5"), (3, 64, 64)),
    "mobilenet_v2": (_named("mobilenet_v2", width_mult=0.35), (3, 64, 64)),
    "mobilenet_v3": (_named("mobilenet_v3_small"), (3, 64, 64)),
    "regnet_x": (_named("regnet_x_400mf"), (3, 64, 64)),
    "regnet_y": (_named("regnet_y_400mf"), (3, 64, 64)),
    "resnet": (_named("resnet18"), (3, 64, 64)),
    "resnext": (_named("resnext50_32x4d"), (3, 64, 64)),
    "shufflenet_v2": (_named("shufflenet_v2_x0_5"), (3, 64, 64)),
    "squeezenet": (_named("squeezenet1_1"), (3, 64, 64)),
    "swin": (_swin, (3, 64, 64)),
    "swin_v2": (
        partial(_swin, block=SwinTransformerBlockV2, downsample_layer=models.swin_transformer.PatchMergingV2),
        (3, 64, 64),
    ),
    "vgg": (partial(_vgg, "vgg11"), (3, 64, 64)),
    "vgg_bn": (partial(_vgg, "vgg11_bn"), (3, 64, 64)),
    "vit": (_vit, (3, 64, 64)),
    "wide_resnet": (_named("wide_resnet50_2"), (3, 64, 64)),
    "video_mc3": (_named("mc3_18"), CLIP),
    "video_mvit_v1": (partial(_mvit, 1), CLIP),
    "video_mvit_v2": (partial(_mvit, 2), CLIP),
    "video_r2plus1d": (_named("r2plus1d_18"), CLIP),
    "video_r3d": (_named("r3d_18"), CLIP),
    "video_s3d": (_s3d, CLIP),
    "video_swin3d": (
        partial(SwinTransformer3d, [2, 4, 4], 16, [2, 2], [2, 4], [8, 7, 7], num_classes=CLASSES),
        CLIP,
    ),
}


def _inputs(shape: tuple[int, ...], batch: int) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, *shape, generator=generator, dtype=torch.float64),)


def families() -> list[Family]:
    return [Family("torchvision", n, b, partial(_inputs, shape), _words(n, b)) for n, (b, shape) in PICKS.items()]


def _words(name: str, build: Callable[[], nn.Module]) -> str:
    named = isinstance(build, partial) and build.func is models.get_model
    return build.args[0] if named else f"{name}, small"  # type: ignore[union-attr]
