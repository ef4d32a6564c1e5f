"""transformers: every vision backbone that builds from a configuration alone, in a tiny one."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from families_check import Family

__all__ = ["families"]

CLASSES = 3
#: What most ViTs read.
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
VIDEO: dict[str, Any] = {**VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]}


class _Small:
    """A transformers class with a tiny configuration and the shape of its input, the batch left out."""

    def __init__(self, cls: str, options: dict[str, Any], shape: tuple[int, ...] = (3, 32, 32)) -> None:
        self.cls, self.options, self.shape = cls, options, shape

    def build(self) -> nn.Module:
        cls = getattr(transformers, self.cls)
        return cls(cls.config_class(num_labels=CLASSES, **self.options))

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return {"pixel_values": torch.randn(batch, *self.shape, generator=generator, dtype=torch.float64)}


class _Clip(_Small):
    """Inputs of V-JEPA 2, which has a name of its own for them."""

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        return {"pixel_values_videos": super().inputs(batch)["pixel_values"]}


class _Frames(_Small):
    """Inputs of models that take a clip's two frames as one batch (X-CLIP)."""

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        return super().inputs(2 * batch)


class _Patches(_Small):
    """Inputs of models that take flattened patches with a mask (SigLIP 2)."""

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        count, side = self.shape[0], int(self.shape[0] ** 0.5)
        return {
            **super().inputs(batch),
            "pixel_attention_mask": torch.ones(batch, count, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * batch),
        }


class _Tokens(_Small):
    """Inputs of models that read images as colour tokens (ImageGPT)."""

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return {"input_ids": torch.randint(0, 16, (batch, *self.shape), generator=generator)}


SAM: dict[str, Any] = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
}

#: For models that halve their features five times.
_wide = partial(_Small, shape=(3, 64, 64))

PICKS: dict[str, _Small] = {
    "align": _wide(
        "AlignVisionModel", {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320, "image_size": 64}
    ),
    "beit_segmentation": _wide(
        "BeitForSemanticSegmentation",
        {**VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "image_size": 64, "pool_scales": [1, 2]},
    ),
    "dinov2_backbone": _Small("Dinov2Backbone", {**VIT, "out_indices": [1, 2]}),
    "hiera_mae": _wide(
        "HieraForPreTraining",
        {
            "embed_dim": 16,
            "image_size": [64, 64],
            "depths": [1, 1, 2, 1],
            "num_heads": [1, 2, 4, 8],
            "decoder_hidden_size": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
        },
    ),
    "idefics3": _Small("Idefics3VisionTransformer", VIT),
    "janus": _Small("JanusVisionModel", VIT),
    "lw_detr_vit": _Small(
        "LwDetrViTBackbone", {**VIT, "window_block_indices": [0], "num_windows": 4, "out_indices": [1]}
    ),
    "maskformer_swin": _Small("MaskFormerSwinBackbone", SWIN),
    "perceiver": _Small(
        "PerceiverForImageClassificationConvProcessing",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "num_blocks": 1,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 1,
        },
    ),
    "phi4_multimodal": _Small("Phi4MultimodalVisionModel", VIT),
    "pixtral": _Small("PixtralVisionModel", VIT),
    "pp_lcnet_v3": _wide("PPLCNetV3Backbone", {"scale": 0.25}),
    "radio": _Small("RadioModel", VIT),
    "rf_detr_dinov2": _Small("RfDetrDinov2Backbone", VIT),
    "rt_detr_resnet": _wide("RTDetrResNetBackbone", {**STAGES, "embedding_size": 8}),
    "sam_hq": _Small("SamHQVisionModel", SAM),
    "sapiens2": _Small("Sapiens2Backbone", VIT),
    "tipsv2": _Small("Tipsv2VisionModel", VIT),
    "uvdoc": _wide("UVDocBackbone", {}),
    "videoprism": _Clip("VideoPrismForVideoClassification", {**VIT, "num_frames": 4}, (4, 3, 32, 32)),
    "vit_mae_decoder": _Small(
        "ViTMAEForPreTraining",
        {
            **VIT,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
    ),
    "xclip": _Frames(
        "XCLIPVisionModel",
        {
            **VIT,
            "num_frames": 2,
            "mit_hidden_size": 32,
            "mit_intermediate_size": 48,
            "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 2,
        },
    ),
    "aimv2": _Small("Aimv2VisionModel", VIT),
    "altclip": _Small("AltCLIPVisionModel", VIT),
    "beit": _Small("BeitForImageClassification", {**VIT, "use_relative_position_bias": True}),
    "bit": _wide("BitForImageClassification", {**STAGES, "embedding_size": 8, "num_groups": 4}),
    "blip": _Small("BlipVisionModel", VIT),
    "blip_2": _Small("Blip2VisionModel", VIT),
    "chinese_clip": _Small("ChineseCLIPVisionModel", VIT),
    "clip": _Small("CLIPVisionModelWithProjection", VIT),
    "clipseg": _Small("CLIPSegVisionModel", VIT),
    "convnext": _wide("ConvNextForImageClassification", STAGES),
    "convnextv2": _wide("ConvNextV2ForImageClassification", STAGES),
    "cvt": _Small(
        "CvtForImageClassification", {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}, (3, 64, 64)
    ),
    "data2vec_vision": _Small(
        "Data2VecVisionForImageClassification", {**VIT, "use_shared_relative_position_bias": True}
    ),
    "deit": _Small("DeiTForImageClassificationWithTeacher", VIT),
    "depth_anything": _Small(
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": {
                **VIT,
                "model_type": "dinov2",
                "out_indices": [1, 2],
                "reshape_hidden_states": False,
                "apply_layernorm": True,
            },
            "reassemble_hidden_size": 32,
            "patch_size": 8,
            "reassemble_factors": [1, 0.5],
            "neck_hidden_sizes": [8, 16],
            "fusion_hidden_size": 8,
            "head_in_index": -1,
            "depth_estimation_type": "metric",
        },
    ),
    "dinat": _Small("DinatForImageClassification", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]}),
    "dinov2": _Small("Dinov2ForImageClassification", VIT),
    "dinov2_with_registers": _Small("Dinov2WithRegistersForImageClassification", {**VIT, "use_swiglu_ffn": True}),
    "dinov3_convnext": _wide("DINOv3ConvNextModel", STAGES),
    "dinov3_vit": _Small("DINOv3ViTModel", {**VIT, "use_gated_mlp": True}),
    "donut_swin": _Small("DonutSwinForImageClassification", SWIN),
    "dpt": _Small(
        "DPTForDepthEstimation",
        {
            **VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8,
            "is_hybrid": False,
        },
    ),
    "efficientnet": _wide(
        "EfficientNetForImageClassification", {"width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320}
    ),
    "flava": _Small("FlavaImageModel", VIT),
    "focalnet": _Small(
        "FocalNetForImageClassification",
        {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    ),
    "git": _Small("GitVisionModel", VIT),
    "glpn": _wide("GLPNForDepthEstimation", {**STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 8}),
    "groupvit": _Small(
        "GroupViTVisionModel",
        {**VIT, "depths": [2, 2, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]},
    ),
    "hgnet_v2": _wide("HGNetV2ForImageClassification", {}),
    "hiera": _Small(
        "HieraForImageClassification",
        {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
        (3, 64, 64),
    ),
    "ijepa": _Small("IJepaForImageClassification", VIT),
    "imagegpt": _Tokens(
        "ImageGPTForImageClassification",
        {"vocab_size": 17, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2},
        (16,),
    ),
    "instructblip": _Small("InstructBlipVisionModel", VIT),
    "internvl": _Small("InternVLVisionModel", {**VIT, "image_size": [32, 32], "patch_size": [8, 8]}),
    "levit": _Small(
        "LevitForImageClassificationWithTeacher",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [4, 4, 4],
        },
        (3, 64, 64),
    ),
    "metaclip_2": _Small("MetaClip2VisionModel", VIT),
    "mlcd": _Small("MLCDVisionModel", VIT),
    "mobilenet_v1": _wide("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}),
    "mobilenet_v2": _wide("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}),
    "mobilevit": _Small(
        "MobileViTForImageClassification",
        {"image_size": 128, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]},
        (3, 128, 128),
    ),
    "mobilevitv2": _Small(
        "MobileViTV2ForImageClassification", {"image_size": 128, "width_multiplier": 0.25}, (3, 128, 128)
    ),
    "owlvit": _Small("OwlViTVisionModel", VIT),
    "owlv2": _Small("Owlv2VisionModel", VIT),
    "pixio": _Small("PixioModel", VIT),
    "poolformer": _wide("PoolFormerForImageClassification", {**STAGES}),
    "pp_lcnet": _wide("PPLCNetForImageClassification", {"scale": 0.25}),
    "pvt": _Small(
        "PvtForImageClassification",
        {**STAGES, "image_size": 64, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]},
        (3, 64, 64),
    ),
    "pvt_v2": _Small(
        "PvtV2ForImageClassification",
        {**STAGES, "image_size": 64, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]},
        (3, 64, 64),
    ),
    "regnet": _wide("RegNetForImageClassification", {**STAGES, "embedding_size": 8, "groups_width": 8}),
    "resnet": _wide("ResNetForImageClassification", {**STAGES, "embedding_size": 8}),
    "sam": _Small("SamVisionModel", SAM),
    "sam2": _Small("Sam2VisionModel", {}),
    "segformer": _wide(
        "SegformerForSemanticSegmentation",
        {**STAGES, "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16},
    ),
    "siglip": _Small("SiglipVisionModel", VIT),
    "siglip2": _Patches("Siglip2VisionModel", {**VIT, "num_patches": 16}, (16, 3 * 8 * 8)),
    "superpoint": _Small("SuperPointForKeypointDetection", {}),
    "swiftformer": _Small(
        "SwiftFormerForImageClassification", {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}, (3, 64, 64)
    ),
    "swin": _Small("SwinForImageClassification", SWIN),
    "swin2sr": _Small("Swin2SRModel", {**SWIN, "depths": [2, 2], "num_heads": [2, 2], "patch_size": 1}),
    "swinv2": _Small("Swinv2ForImageClassification", SWIN),
    "textnet": _Small("TextNetForImageClassification", {}, (3, 64, 64)),
    "timesformer": _Small("TimesformerForVideoClassification", {**VIT, "num_frames": 4}, (4, 3, 32, 32)),
    "videomae": _Small("VideoMAEForVideoClassification", {**VIT, "num_frames": 4}, (4, 3, 32, 32)),
    "vit": _Small("ViTForImageClassification", VIT),
    "vit_mae": _Small("ViTMAEModel", VIT),
    "vit_msn": _Small("ViTMSNForImageClassification", VIT),
    "vitdet": _Small(
        "VitDetModel", {**VIT, "window_block_indices": [0], "window_size": 2, "use_relative_position_embeddings": True}
    ),
    "vitpose": _Small("VitPoseBackbone", {**VIT, "image_size": [32, 32], "patch_size": [8, 8]}),
    "vivit": _Small("VivitForVideoClassification", VIDEO, (4, 3, 32, 32)),
    "vjepa2": _Clip(
        "VJEPA2Model",
        {
            "patch_size": 8,
            "crop_size": 32,
            "frames_per_clip": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "mlp_ratio": 2,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 1,
            "pred_num_mask_tokens": 2,
        },
        (4, 3, 32, 32),
    ),
    "yolos": _Small("YolosForObjectDetection", {**VIT, "image_size": [32, 32], "num_detection_tokens": 4}),
}


def families() -> list[Family]:
    missing = set() if importlib.util.find_spec("natten") else {"dinat"}
    return [
        Family("transformers", n, p.build, p.inputs, f"{p.cls}, tiny")
        for n, p in sorted(PICKS.items())
        if n not in missing
    ]
