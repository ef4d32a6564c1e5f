"""timm: the smallest usable model of every model file (98 in timm 1.0.31), and of files that hold several designs.

Smallest by parameters, counted over all of ``timm.list_models(module=...)``; where even that one is large, the same
design with fewer blocks. Inputs are 64 pixels wide where the model lets them.
"""

from __future__ import annotations

import re
from typing import Any

import timm
import torch
from timm.models import byoanet
from torch import nn

from families_check import Family

__all__ = ["families", "missing"]

CLASSES = 3


class _Pick:
    def __init__(self, model: str, *, size: int = 64, img: bool = False, **options: Any) -> None:
        self.model, self.size = model, size
        self.options = {**options, "img_size": size} if img else options

    def build(self) -> nn.Module:
        return timm.create_model(self.model, pretrained=False, num_classes=CLASSES, **self.options)

    def inputs(self, batch: int) -> tuple[torch.Tensor]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, 3, self.size, self.size, generator=generator, dtype=torch.float64),)


#: Model file of timm -> model. Keys with a colon are further designs of the same file.
PICKS: dict[str, _Pick] = {
    "beit": _Pick("beit_base_patch16_224", img=True, depth=2),
    "byoanet": _Pick("halonet_h1", blocks=byoanet.model_cfgs["halonet_h1"].blocks[:2]),
    "byobnet": _Pick("test_byobnet", img=True),
    "cait": _Pick("cait_xxs24_224", img=True),
    "coat": _Pick("coat_tiny", img=True),
    "convit": _Pick("convit_tiny", img=True),
    "convmixer": _Pick("convmixer_768_32"),
    "convnext": _Pick("test_convnext"),
    "cpubone": _Pick("cpubone_nano"),
    "crossvit": _Pick("crossvit_tiny_240"),
    "csatv2": _Pick("csatv2"),
    "cspnet": _Pick("cs3darknet_focus_s"),
    "cspnext": _Pick("cspnext_tiny"),
    "davit": _Pick("davit_tiny", depths=(1, 1, 1, 1)),
    "deepseek_vit": _Pick("deepseek_vit_412m", size=56, img=True, depth=2),
    "deit": _Pick("deit_tiny_patch16_224", img=True),
    "densenet": _Pick("densenet121"),
    "dla": _Pick("dla46x_c"),
    "dpn": _Pick("dpn48b"),
    "edgenext": _Pick("edgenext_xx_small"),
    "efficientformer": _Pick("efficientformer_l1", size=224, img=True),
    "efficientformer_v2": _Pick("efficientformerv2_s0", img=True),
    "efficientnet": _Pick("test_efficientnet"),
    "efficientvim": _Pick("efficientvim_m1"),
    "efficientvit_mit": _Pick("efficientvit_b0"),
    "efficientvit_msra": _Pick("efficientvit_m0", img=True),
    "eva": _Pick("vit_tiny_patch16_dinov3_qkvb", img=True),
    "fasternet": _Pick("fasternet_t0"),
    "fastvit": _Pick("fastvit_t8"),
    "focalnet": _Pick("focalnet_tiny_srf"),
    "gcvit": _Pick("gcvit_xxtiny", img=True),
    "gemma4_vit": _Pick("gemma4_vit_167m_enc", size=96, img=True, depth=2),
    "ghostnet": _Pick("ghostnet_050"),
    "hardcorenas": _Pick("hardcorenas_b"),
    "hgnet": _Pick("hgnetv2_b0"),
    "hiera": _Pick("hiera_tiny_224", img=True, stages=(1, 2, 2, 1)),
    "hieradet_sam2": _Pick("sam2_hiera_tiny"),
    "hrnet": _Pick("hrnet_w18_small"),
    "iformer": _Pick("iformer_t"),
    "inception_next": _Pick("inception_next_atto"),
    "inception_resnet_v2": _Pick("inception_resnet_v2", size=96),
    "inception_v3": _Pick("inception_v3", size=96),
    "inception_v4": _Pick("inception_v4", size=96),
    "lcnetv2": _Pick("lcnetv2_small"),
    "levit": _Pick("levit_128s", img=True),
    "lowformer": _Pick("lowformer_b0"),
    "mambaout": _Pick("test_mambaout"),
    "maxxvit": _Pick("test_coatnet", img=True),
    "metaformer": _Pick("poolformerv2_s12"),
    "mlp_mixer": _Pick("gmlp_ti16_224", img=True),
    "mobilenetv3": _Pick("lcnet_035"),
    "mobilenetv5": _Pick("mobilenetv5_base", channel_multiplier=0.25),
    "mobilevit": _Pick("mobilevit_xxs", img=True),
    "mvitv2": _Pick("mvitv2_tiny", img=True),
    "naflexvit": _Pick("naflexvit_base_patch16_parfac_gap", img=True, depth=2),
    "nasnet": _Pick("nasnetalarge"),
    "nest": _Pick("jx_nest_tiny", img=True),
    "nextvit": _Pick("nextvit_small"),
    "nfnet": _Pick("test_nfnet"),
    "pit": _Pick("pit_ti_224", img=True),
    "pnasnet": _Pick("pnasnet5large"),
    "pvt_v2": _Pick("pvt_v2_b0"),
    "qwen3_vit": _Pick("qwen3_vit_88m", img=True, depth=2),
    "rdnet": _Pick("rdnet_tiny"),
    "regnet": _Pick("regnetx_002"),
    "repghost": _Pick("repghostnet_050"),
    "repvit": _Pick("repvit_m1", img=True),
    "res2net": _Pick("res2next50", layers=(1, 1, 1, 1)),
    "resnest": _Pick("resnest14d"),
    "resnet": _Pick("test_resnet"),
    "resnetv2": _Pick("resnetv2_18"),
    "rexnet": _Pick("rexnet_100"),
    "selecsls": _Pick("selecsls42"),
    "senet": _Pick("legacy_seresnet18"),
    "sequencer": _Pick("sequencer2d_s", img=True, layers=(1, 1, 1, 1)),
    "shvit": _Pick("shvit_s1"),
    "sknet": _Pick("skresnet18"),
    "starnet": _Pick("starnet_s050"),
    "swiftformer": _Pick("swiftformer_xs", img=True),
    "swin_transformer": _Pick("swin_tiny_patch4_window7_224", img=True, depths=(2, 2), num_heads=(3, 6)),
    "swin_transformer_v2": _Pick("swinv2_tiny_window16_256", img=True, depths=(2, 2), num_heads=(3, 6)),
    "swin_transformer_v2_cr": _Pick("swinv2_cr_tiny_224", img=True, depths=(2, 2), num_heads=(3, 6)),
    "tiny_vit": _Pick("tiny_vit_5m_224"),
    "tnt": _Pick("tnt_s_legacy_patch16_224", img=True, depth=2),
    "tresnet": _Pick("tresnet_m", layers=(1, 1, 1, 1)),
    "twins": _Pick("twins_svt_small", img=True, depths=(1, 1, 1, 1)),
    "vgg": _Pick("vgg11", mlp_ratio=0.125),
    "visformer": _Pick("visformer_tiny", img=True),
    "vision_transformer": _Pick("test_vit", img=True),
    "vision_transformer_hybrid": _Pick("vit_tiny_r_s16_p8_224", img=True),
    "vision_transformer_relpos": _Pick("test_vit_relpos", img=True),
    "vision_transformer_sam": _Pick("samvit_base_patch16_224", img=True, depth=2),
    "vitamin": _Pick("vitamin_small_224", img=True),
    "volo": _Pick("volo_d1_224", img=True),
    "vovnet": _Pick("ese_vovnet19b_slim_dw"),
    "xception": _Pick("legacy_xception"),
    "xception_aligned": _Pick("xception41p"),
    "xcit": _Pick("xcit_nano_12_p8_224", img=True),
    "beit:v2": _Pick("beitv2_base_patch16_224", img=True, depth=2),
    "byoanet:lambda": _Pick("lambda_resnet26t", size=64),
    "byobnet:mobileone": _Pick("mobileone_s1"),
    "byobnet:repvgg": _Pick("repvgg_a0"),
    "byobnet:gc_resnext": _Pick("gcresnext26ts"),
    "convnext:v2": _Pick("convnextv2_atto"),
    "coat:lite": _Pick("coat_lite_tiny", img=True),
    "efficientnet:mixnet": _Pick("mixnet_s"),
    "eva:eva02": _Pick("eva02_tiny_patch14_224", size=56, img=True),
    "ghostnet:v2": _Pick("ghostnetv2_100"),
    "ghostnet:v3": _Pick("ghostnetv3_050"),
    "levit:conv": _Pick("levit_conv_128s", img=True),
    "maxxvit:maxvit": _Pick("test_maxvit", img=True),
    "metaformer:caformer": _Pick("caformer_s18"),
    "metaformer:convformer": _Pick("convformer_s18"),
    "mlp_mixer:mixer": _Pick("mixer_s32_224", img=True),
    "mlp_mixer:resmlp": _Pick("resmlp_12_224", img=True),
    "mobilenetv3:v4_hybrid": _Pick("mobilenetv4_hybrid_medium"),
    "mobilevit:v2": _Pick("mobilevitv2_050"),
    "nfnet:regnet": _Pick("nf_regnet_b0"),
    "regnet:y": _Pick("regnety_002"),
    "resnetv2:bit": _Pick("resnetv2_50x1_bit"),
    "twins:pcpvt": _Pick("twins_pcpvt_small", img=True, depths=(1, 1, 1, 1)),
    "vision_transformer:swiglu": _Pick(
        "vit_small_patch14_reg4_dinov2", size=56, img=True, depth=2, embed_dim=96, num_heads=3
    ),
    "vision_transformer:parallel": _Pick("vit_small_patch16_18x2_224", img=True, depth=2),
}


def missing() -> list[str]:
    """Model files of the installed timm that the table does not know."""
    files = {timm.models.model_entrypoint(n).__module__.rpartition(".")[2] for n in timm.list_models()}
    return sorted(files - set(PICKS))


def families() -> list[Family]:
    found = []
    for name, pick in PICKS.items():
        options = "".join(f", {k}={v}" if len(str(v)) < 20 else f", fewer {k}" for k, v in pick.options.items())
        options = re.sub(", img_size=[0-9]+", "", options)
        found.append(Family("timm", name, pick.build, pick.inputs, f"{pick.model}{options}"))
    return found
