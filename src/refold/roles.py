"""Where the papers' named placements are in real backbones: plain data, no code and no imports.

A pattern is a tuple of the last segments of a module path; a layer plays the role if its path ends in exactly
these segments. Nothing here is needed for an unknown backbone to work: without a match, methods fall back to
every foldable layer.
"""

from __future__ import annotations

__all__ = ["MOVED", "ROLES"]

Pattern = tuple[str, ...]

#: Role -> patterns, shared by all families whose layers carry these names.
ROLES: dict[str, tuple[Pattern, ...]] = {
    # The projection that reads the token mixer's normalised input.
    "attention": (
        ("attn", "qkv"),  # timm ViT, Swin, DeiT, CLIP
        ("attn",),  # open_clip, where `attn` is an nn.MultiheadAttention
        ("self_attention",),  # torchvision ViT
    ),
    # The projection that reads the MLP's normalised input.
    "mlp": (
        ("mlp", "fc1"),  # timm
        ("mlp", "c_fc"),  # open_clip
        ("mlp", "w12"),  # fused SwiGLU
        ("mlp", "0"),  # torchvision
    ),
    "attention_out": (("attn", "proj"),),
    "mlp_out": (("mlp", "fc2"), ("mlp", "c_proj"), ("mlp", "w3"), ("mlp", "3")),
}

#: Family -> role -> (patterns, note). Here the paper's site is next to a depthwise convolution, around which a
#: channel-mixing map is not free: it would turn the layer dense. The role moves to the pointwise projections.
_NEAR_DEPTHWISE = "moved to a pointwise projection: the paper's site before the depthwise conv does not fold for free"
MOVED: dict[str, dict[str, tuple[tuple[Pattern, ...], str]]] = {
    "timm.models.convnext.ConvNeXt": {"attention": ((("mlp", "fc2"),), _NEAR_DEPTHWISE)},
    "timm.models.efficientnet.EfficientNet": {
        "attention": ((("conv_pwl",),), _NEAR_DEPTHWISE),
        "mlp": ((("conv_pw",),), _NEAR_DEPTHWISE),
    },
    "timm.models.mobilenetv3.MobileNetV3": {
        "attention": ((("conv_pwl",),), _NEAR_DEPTHWISE),
        "mlp": ((("conv_pw",),), _NEAR_DEPTHWISE),
    },
}
