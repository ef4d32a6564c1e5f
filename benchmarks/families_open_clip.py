"""open_clip: the image towers of every kind, in small custom configurations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from torch import nn

from families_check import Family

__all__ = ["families"]


def _tower(**options: Any) -> Callable[[], nn.Module]:
    settings = {"image_size": 64, "patch_size": 16, "layers": 2, "width": 64, "head_width": 16, **options}
    return lambda: _build_vision_tower(embed_dim=24, vision_cfg=CLIPVisionCfg(**settings))


PICKS: dict[str, Callable[[], nn.Module]] = {
    "vit": _tower(),
    "vit_layer_scale": _tower(ls_init_value=0.5),
    "vit_attentional_pool": _tower(attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=2),
    "vit_average_pool": _tower(pool_type="avg", final_ln_after_pool=True, pos_embed_type="sin_cos_2d", no_ln_pre=True),
    "vit_output_tokens": _tower(output_tokens=True),
    "resnet": _tower(layers=[1, 1, 1, 1], width=16),
    "convnext": _tower(timm_model_name="convnext_atto", timm_pool="", timm_proj="linear"),
    "timm_vit": _tower(image_size=160, timm_model_name="test_vit", timm_pool="", timm_proj=""),
    "timm_mlp": _tower(timm_model_name="convnext_atto", timm_pool="avg", timm_proj="mlp"),
    "timm_resnet": _tower(timm_model_name="resnet18", timm_pool="abs_attn", timm_proj="linear"),
}


def _inputs(size: int, batch: int) -> tuple[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64),)


def families() -> list[Family]:
    return [
        Family("open_clip", name, build, partial(_inputs, 160 if name == "timm_vit" else 64), f"{name} tower, small")
        for name, build in PICKS.items()
    ]
