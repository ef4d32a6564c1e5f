"""Where the papers' named placements are in real backbones: plain data without imports.

A pattern is a tuple of the last segments of a module path; a layer plays the role if its path ends in these segments,
in which ``*`` and ``[abc]`` match as in file names. Nothing here is needed for an unknown backbone to work: without a
match, methods fall back to every foldable layer.
"""

from __future__ import annotations

__all__ = ["INTERLEAVED", "MOVED", "ONE_INPUT", "PARTS", "ROLES"]

Pattern = tuple[str, ...]

#: Roles whose layers under one parent all read one tensor: a match that reads another is not meant.
ONE_INPUT: tuple[str, ...] = ("mlp",)

#: Attention modules whose joint projection gives query, key and value head by head, not as three blocks of rows: the
#: attribute that says so, where it is set.
INTERLEAVED: dict[str, str] = {
    "timm.layers.attention2d.Attention2d": "head_first",
    "timm.models.maxxvit.Attention2d": "head_first",
    "timm.models.maxxvit.AttentionCl": "head_first",
}

#: Role -> patterns, shared by all families whose layers carry these names.
ROLES: dict[str, tuple[Pattern, ...]] = {
    # The projections that read the token mixer's normalised input: joint, or apart for query, key and value.
    "attention": (
        ("attn", "qkv"),  # timm ViT, Swin, DeiT, CLIP
        ("attn", "qkv", "linear"),  # LeViT
        ("attn_downsample", "kv", "linear"),
        ("attn_downsample", "q", "ln", "linear"),
        ("attn", "qk"),  # ConViT
        ("attn_in", "qk"),  # TNT
        ("attn_in", "v"),
        ("attn_out", "qk"),
        ("attn_out", "v"),
        ("attn", "[qkv]"),  # CaiT
        ("attn", "kv"),  # PVT, Twins
        ("attn", "[qkv]_proj"),  # EVA
        ("attn", "[qkv]_proj", "linear"),  # Gemma
        ("attn", "[qkv]", "conv"),  # EfficientFormer V2
        ("attn", "query", "proj"),  # MobileNetV5
        ("attn", "key", "proj"),
        ("attn", "value", "proj"),
        ("attn", "to_query"),  # SwiftFormer
        ("attn", "to_key"),
        ("attn",),  # open_clip, where `attn` is an nn.MultiheadAttention
        ("self_attention",),  # torchvision ViT
        ("attention", "query"),  # transformers ViT, BEiT, VideoMAE
        ("attention", "key"),
        ("attention", "value"),
        ("attention", "[qkv]_proj"),
        ("self", "query"),  # transformers Swin
        ("self", "key"),
        ("self", "value"),
        ("self_attn", "[qkv]_proj"),  # transformers CLIP, SigLIP
        ("attention", "qkv"),  # transformers TimeSformer: both halves of its attention, over time and over space
        ("attention", "qkv_proj", "convolution"),  # transformers MobileViT V2
        ("attention", "projection_query"),  # transformers CvT
        ("attention", "projection_key"),
        ("attention", "projection_value"),
        ("self_attn", "qkv"),  # transformers BLIP
        ("queries_keys_values", "linear"),  # transformers LeViT
        ("keys_values", "linear"),
        ("queries", "linear"),
        ("factoratt_crpe*", "qkv"),  # CoaT
        ("token_mixer", "qkv"),  # EfficientFormer, CAFormer
        ("token_mixer", "[qkv]", "conv"),
        ("token_mixer", "pwconv1"),  # ConvFormer
        ("xca", "qkv"),  # EdgeNeXt
        ("main", "qkv", "conv"),  # EfficientViT (MIT)
        ("qkvs", "*", "conv"),  # EfficientViT (MSRA)
        ("e_mhsa", "[qkv]"),  # NextViT
        ("modulation", "f"),  # FocalNet
        ("modulation", "projection_in"),
        ("module", "[qk]", "c"),  # iFormer
        ("module", "v_gate", "c"),
        ("m", "qkv", "c"),  # SHViT
        ("mixer", "BCdt_proj", "conv"),  # EfficientViM
        ("attn", "main", "*", "pwise"),  # LowFormer
        ("total", "0", "0", "main", "1", "pwise"),  # CPUBone
        ("attn_layer", "*", "to_qkv"),  # torchvision MaxViT
        ("attn", "qkv_proj"),  # MobileViT V2
        ("spatial_mixing", "partial_conv3"),  # FasterNet
        ("mlp_tokens", "fc1"),  # MLP-Mixer
        ("linear_tokens",),  # ResMLP
    ),
    # The projections that read the MLP's normalised input; two of them where one gates the other.
    "mlp": (
        ("mlp", "fc1"),  # timm
        ("mlp[0-9]", "fc1"),  # CoaT
        ("mlp_in", "fc1"),  # TNT
        ("mlp_channels", "fc1"),  # MLP-Mixer
        ("mlp", "fc1", "conv"),
        ("mlp", "fc1_*"),  # gated
        ("mlp", "c_fc"),  # open_clip
        ("mlp", "w12"),  # fused SwiGLU
        ("mlp", "w[012]"),  # SwiGLU, GeGLU
        ("mlp", "gate_proj"),
        ("mlp", "up_proj"),
        ("mlp", "gate_proj", "linear"),  # Gemma
        ("mlp", "up_proj", "linear"),
        ("mlp", "0"),  # torchvision
        ("mlp", "conv1"),  # Visformer
        ("mlp", "ln1", "linear"),  # LeViT
        ("mlp", "main", "1"),  # LowFormer
        ("total", "0", "1", "main", "1"),  # CPUBone
        ("mlp_layer", "1"),  # torchvision MaxViT
        ("main", "inverted_conv", "conv"),  # EfficientViT (MIT)
        ("pw_exp", "conv"),  # MobileNetV4, MobileNetV5
        ("feed_forward", "gate_proj"),  # transformers Pixtral
        ("feed_forward", "up_proj"),
        ("intermediate", "dense"),  # transformers ViT, BEiT, Swin
        ("intermediate", "fc1"),  # transformers LW-DETR
        ("mlp", "dense1"),  # transformers PVT, GLPN
        ("mlp", "lin1"),  # transformers SAM
        ("mlp", "proj_in"),
        ("module", "linear_up", "linear"),  # transformers LeViT
        ("ffn", "conv1", "convolution"),  # transformers MobileViT V2
        ("ffn", "gate_proj"),  # transformers AIMv2
        ("ffn", "up_proj"),
        ("ffn", "fc1", "conv"),  # EfficientViM
        ("ffn*", "m", "pw1", "conv"),  # EfficientViT (MSRA)
        ("m", "pw1", "c"),  # SHViT
        ("linear", "fc1"),  # SwiftFormer
    ),
    # The projection behind the token mixer, whose output joins the stream again.
    "attention_out": (
        ("attn", "proj"),  # timm ViT, Swin, DeiT; transformers SAM, Hiera
        ("attn", "proj", "ln", "linear"),  # LeViT
        ("attn_downsample", "proj", "ln", "linear"),
        ("attn_in", "proj"),  # TNT
        ("attn_out", "proj"),
        ("attn", "out_proj"),  # open_clip, inside nn.MultiheadAttention; MobileViT V2
        ("attn", "o_proj", "linear"),  # Gemma
        ("attn", "output", "proj"),  # MobileNetV5
        ("attn", "proj", "[0-9]*", "conv"),  # EfficientViT (MSRA)
        ("self_attention", "out_proj"),  # torchvision ViT
        ("attn_layer", "*", "merge"),  # torchvision MaxViT
        ("attn", "project", "0"),  # torchvision MViT
        ("attention", "o_proj"),  # transformers ViT, BEiT, Swin, DINOv2
        ("attention", "out_proj"),  # transformers AIMv2
        ("attention", "out_proj", "convolution"),  # transformers MobileViT V2
        ("attention", "output", "dense"),  # transformers Data2Vec, Swin V2, VideoMAE; ViT, BEiT, Swin before version 5
        ("temporal_attention", "output", "dense"),  # transformers TimeSformer
        ("attention", "proj"),  # transformers ViTDet, V-JEPA 2
        ("attention", "projection_layer"),  # transformers InternVL
        ("self_attn", "projection_layer"),  # transformers Janus
        ("self_attn", "projection"),  # transformers BLIP
        ("self_attn", "out_proj"),  # transformers CLIP, SigLIP
        ("module", "projection", "linear"),  # transformers LeViT
        ("[0-9]*", "projection", "linear"),
        ("factoratt_crpe*", "proj"),  # CoaT
        ("token_mixer", "proj"),  # EfficientFormer, CAFormer
        ("token_mixer", "proj", "conv"),
        ("token_mixer", "pwconv2"),  # ConvFormer
        ("xca", "proj"),  # EdgeNeXt
        ("main", "proj", "conv"),  # EfficientViT (MIT)
        ("e_mhsa", "proj"),  # NextViT
        ("modulation", "proj"),  # FocalNet
        ("modulation", "projection_out"),
        ("module", "proj", "c"),  # iFormer
        ("m", "proj", "[0-9]*", "c"),  # SHViT
        ("mixer", "out_proj", "conv"),  # EfficientViM
        ("mlp_tokens", "fc2"),  # MLP-Mixer
    ),
    # The projection back to the stream's width.
    "mlp_out": (
        ("mlp", "fc2"),  # timm; transformers CLIP, ViT, BEiT, Swin
        ("mlp[0-9]", "fc2"),  # CoaT
        ("mlp_in", "fc2"),  # TNT
        ("mlp_channels", "fc2"),  # MLP-Mixer
        ("mlp", "fc2", "conv"),
        ("mlp", "c_proj"),  # open_clip
        ("mlp", "w3"),  # SwiGLU
        ("mlp", "down_proj"),
        ("mlp", "down_proj", "linear"),  # Gemma
        ("mlp", "3"),  # torchvision
        ("mlp", "conv3"),  # Visformer
        ("mlp", "ln2", "linear"),  # LeViT
        ("mlp", "main", "3"),  # LowFormer
        ("total", "0", "1", "main", "3"),  # CPUBone
        ("mlp_layer", "3"),  # torchvision MaxViT
        ("main", "point_conv", "conv"),  # EfficientViT (MIT)
        ("pw_proj", "conv"),  # MobileNetV4, MobileNetV5
        ("feed_forward", "down_proj"),  # transformers Pixtral
        ("[0-9]*", "output", "dense"),  # transformers Data2Vec, Swin V2, VideoMAE; ViT, BEiT and Swin before version 5
        ("intermediate", "fc2"),  # transformers LW-DETR
        ("mlp", "dense2"),  # transformers PVT, GLPN
        ("mlp", "lin2"),  # transformers SAM
        ("mlp", "proj_out"),
        ("module", "linear_down", "linear"),  # transformers LeViT
        ("ffn", "conv2", "convolution"),  # transformers MobileViT V2
        ("ffn", "down_proj"),  # transformers AIMv2
        ("ffn", "fc2", "conv"),  # EfficientViM
        ("ffn*", "m", "pw2", "conv"),  # EfficientViT (MSRA)
        ("m", "pw2", "c"),  # SHViT
        ("linear", "fc2"),  # SwiftFormer
    ),
}

#: What the outputs of an attention's projection are, letter by letter in equal parts of the input's width -> patterns.
#: A layer listed here whose outputs have another width (LeViT's keys are narrower than its values) is not meant.
PARTS: dict[str, tuple[Pattern, ...]] = {
    "qkv": (
        ("attn", "qkv"),
        ("attn",),
        ("self_attention",),
        ("attention", "qkv"),
        ("self_attn", "qkv"),
        ("factoratt_crpe*", "qkv"),
        ("token_mixer", "qkv"),
        ("xca", "qkv"),
        ("attn_layer", "*", "to_qkv"),
    ),
    "qk": (("attn", "qk"), ("attn_in", "qk"), ("attn_out", "qk")),
    "kv": (("attn", "kv"), ("keys_values", "linear")),
    **{
        letter: (
            ("attn", letter),
            ("attn_in", letter),
            ("attn_out", letter),
            ("attn", f"{letter}_proj"),
            ("attn", f"{letter}_proj", "linear"),
            ("attn", letter, "conv"),
            ("attn", name, "proj"),
            ("attn", f"to_{name}"),
            ("attention", name),
            ("attention", f"{letter}_proj"),
            ("attention", f"projection_{name}"),
            ("self", name),
            ("self_attn", f"{letter}_proj"),
            ("token_mixer", letter, "conv"),
            ("e_mhsa", letter),
            ("module", letter, "c"),
        )
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
    },
}

#: Family -> role -> (patterns, note). Here the paper's site is next to a depthwise convolution, around which a
#: channel-mixing map is not free: it would turn the layer dense. The role moves to the pointwise projections.
_NEAR_DEPTHWISE = "moved to a pointwise projection: the paper's site before the depthwise conv does not fold for free"
_CONVNEXT = {"attention": ((("pwconv2",),), _NEAR_DEPTHWISE), "mlp": ((("pwconv1",),), "")}
MOVED: dict[str, dict[str, tuple[tuple[Pattern, ...], str]]] = {
    "transformers.models.convnext.modeling_convnext.ConvNextPreTrainedModel": _CONVNEXT,
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2PreTrainedModel": _CONVNEXT,
    "timm.models.convnext.ConvNeXt": {"attention": ((("mlp", "fc2"),), _NEAR_DEPTHWISE)},
    "timm.models.fastvit.FastVit": {"attention": ((("mlp", "fc2"),), _NEAR_DEPTHWISE)},
    "timm.models.repvit.RepVit": {
        "attention": ((("channel_mixer", "conv2", "c"),), _NEAR_DEPTHWISE),
        "mlp": ((("channel_mixer", "conv1", "c"),), ""),
    },
    "timm.models.sequencer.Sequencer2d": {
        "attention": ((("rnn_tokens", "fc"),), "moved behind the LSTM, into which nothing folds"),
    },
    "torchvision.models.convnext.ConvNeXt": {
        "attention": ((("block", "5"),), _NEAR_DEPTHWISE),
        "mlp": ((("block", "3"),), ""),
    },
    "transformers.models.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextPreTrainedModel": {
        "attention": ((("pointwise_conv2",),), _NEAR_DEPTHWISE),
        "mlp": ((("pointwise_conv1",),), ""),
    },
    "timm.models.iformer.IFormer": {
        "attention": (
            (("module", "[qk]", "c"), ("module", "v_gate", "c"), ("mixer", "module", "3", "c")),
            _NEAR_DEPTHWISE,
        ),
        "mlp": ((("mixer", "module", "[01]", "c"),), ""),
    },
    "timm.models.rdnet.RDNet": {
        "attention": ((("layers", "layers", "4"),), _NEAR_DEPTHWISE),
        "mlp": ((("layers", "layers", "2"),), ""),
    },
    "timm.models.inception_next.MetaNeXt": {"attention": ((("mlp", "fc2"),), _NEAR_DEPTHWISE)},
    "timm.models.efficientnet.EfficientNet": {
        "attention": ((("conv_pwl",), ("conv_pwl", "*")), _NEAR_DEPTHWISE),
        "mlp": ((("conv_pw",), ("conv_pw", "*")), _NEAR_DEPTHWISE),
    },
    "timm.models.mobilenetv3.MobileNetV3": {
        "attention": ((("conv_pwl",), ("pw_proj", "conv"), ("attn", "query", "proj")), _NEAR_DEPTHWISE),
        "mlp": ((("conv_pw",), ("pw_exp", "conv")), _NEAR_DEPTHWISE),
    },
}
