"""The last projections of attention and MLP have their roles in every library's names, one of each in a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import refold
from zoo import build

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 16,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 12,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}


def transformers_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers", minversion="5")
        cls = getattr(transformers, name)
        return cls(cls.config_class(**(options or SMALL)))

    return make


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "timm ViT": (lambda: build("vit"), "blocks.{}.attn.proj", "blocks.{}.mlp.fc2"),
    "open_clip": (
        lambda: build("open_clip_tower"),
        "visual.transformer.resblocks.{}.attn.out_proj",
        "visual.transformer.resblocks.{}.mlp.c_proj",
    ),
    "torchvision ViT": (
        lambda: build("torchvision_vit"),
        "encoder.layers.encoder_layer_{}.self_attention.out_proj",
        "encoder.layers.encoder_layer_{}.mlp.3",
    ),
    "transformers ViT": (
        transformers_model("ViTForImageClassification"),
        "vit.layers.{}.attention.o_proj",
        "vit.layers.{}.mlp.fc2",
    ),
    "transformers BEiT": (
        transformers_model("BeitForImageClassification"),
        "beit.layers.{}.attention.o_proj",
        "beit.layers.{}.mlp.fc2",
    ),
    "transformers CLIP": (
        transformers_model("CLIPVisionModel"),
        "encoder.layers.{}.self_attn.out_proj",
        "encoder.layers.{}.mlp.fc2",
    ),
    "transformers Data2Vec": (
        transformers_model("Data2VecVisionForImageClassification"),
        "data2vec_vision.encoder.layer.{}.attention.output.dense",
        "data2vec_vision.encoder.layer.{}.output.dense",
    ),
    "transformers Swin": (
        transformers_model("SwinForImageClassification", **SWIN),
        "swin.encoder.layers.{}.blocks.0.attention.o_proj",
        "swin.encoder.layers.{}.blocks.0.mlp.fc2",
    ),
    "transformers Swin V2": (
        transformers_model("Swinv2ForImageClassification", **SWIN),
        "swinv2.encoder.layers.{}.blocks.0.attention.output.dense",
        "swinv2.encoder.layers.{}.blocks.0.output.dense",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_last_projections(name):
    make, attention_out, mlp_out = MODELS[name]
    model = make().eval()
    for role, path in (("attention_out", attention_out), ("mlp_out", mlp_out)):
        refold.attach(model, refold.LoRA(rank=1, sites=role), trainable=())
        rows = [row for row in refold.explain(model).rows if row.slot == "weight"]
        assert [row.path for row in rows] == [path.format(i) for i in range(2)]
        assert {row.role for row in rows} == {role}
        refold.detach(model)


def test_internvl_has_its_output_projection_among_no_inputs():
    """Its name begins like those of CvT's queries, keys and values."""
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.InternVLVisionConfig(**{**SMALL, "image_size": [32, 32], "patch_size": [16, 16]})
    model = refold.attach(transformers.InternVLVisionModel(config).eval(), refold.LoRA(rank=1), trainable=())
    found = {row.path.rpartition(".")[2] for row in refold.explain(model).rows if row.slot == "weight"}
    assert found == {"q_proj", "k_proj", "v_proj"}
