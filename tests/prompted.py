"""Small backbones of every kind of token and position, with prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

import refold
from refold.hosting import hosted
from zoo import build, perturb, vit

__all__ = ["KINDS", "MODELS", "array", "attached", "made", "prompts"]

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 3}
eva = partial(Eva, **SMALL, use_abs_pos_emb=False, use_rot_pos_emb=True, num_reg_tokens=2, init_values=0.5)
beit = partial(Beit, **SMALL)
relpos = partial(VisionTransformerRelPos, **SMALL)
swin = partial(
    SwinTransformer, img_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4,
    mlp_ratio=2, num_classes=3, drop_path_rate=0.0,
)  # fmt: skip

#: What has tokens, and what tells where they are.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "class_token": partial(vit, patch_size=8),
    "registers": partial(vit, patch_size=8, reg_tokens=4),
    "average_pool": partial(vit, patch_size=8, class_token=False, global_pool="avg"),
    "average_pool_beside_a_class_token": partial(vit, patch_size=8, global_pool="avg"),
    "layer_scale": partial(vit, patch_size=8, init_values=0.5),
    "torchvision": lambda: build("torchvision_vit"),
    "open_clip": lambda: build("open_clip_tower"),
    "rotation": eva,
    "rotation_of_halves": partial(eva, rope_type="dinov3", rope_rotate_half=True, attn_type="rope"),
    "rotation_of_each_head": partial(eva, rope_type="mixed"),
    "bias_by_relative_position": partial(beit, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "bias_of_all_blocks": partial(beit, use_shared_rel_pos_bias=True),
    "bias_from_a_table": partial(relpos, rel_pos_type="bias"),
    "bias_from_a_table_with_class_token": partial(relpos, rel_pos_type="bias", class_token=True, global_pool="token"),
    "bias_from_an_mlp": partial(relpos, rel_pos_type="mlp"),
    "bias_from_an_mlp_with_class_token": partial(relpos, rel_pos_type="mlp", class_token=True, global_pool="token"),
    "windows": swin,
}


#: One of each kind.
KINDS = (
    "class_token", "open_clip", "rotation", "bias_by_relative_position", "bias_of_all_blocks", "bias_from_an_mlp",
    "windows",
)  # fmt: skip


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With weights that hide nothing, relative positions among them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(name))
        model = MODELS[name]().eval().to(dtype)
        perturb(dict(model.named_parameters()), 0.2)
    return model


def attached(name: str, method: refold.Method, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = refold.attach(made(name, dtype), method)
    perturb(refold.trainable_parameters(model), 0.5)
    return model


def prompts(model: nn.Module) -> list[np.ndarray]:
    return [slot["default"].prompts.detach().numpy() for slot in hosted(model).values()]


def array(value: torch.Tensor) -> np.ndarray:
    return value.detach().double().numpy().copy()
