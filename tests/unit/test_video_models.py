"""load_video: the libraries' own models behind one layout, with their weights and input, or a clear refusal."""

from __future__ import annotations

import json

import pytest
import timm
import torch

import refold
from refold.video.models import ClipModel, FrameModel, load_video

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SHAPE = {"image_size": 32, "num_frames": 4}
FAMILIES = {
    "VideoMAE": {"patch_size": 16},
    "Timesformer": {"patch_size": 16},
    "Vivit": {"tubelet_size": [2, 16, 16]},
}
#: Files of processors; ViViT's published one rescales to [-1, 1] before it normalises.
PROCESSORS = {
    "VideoMAE": {"image_processor_type": "VideoMAEImageProcessor", "image_mean": [0.4] * 3, "image_std": [0.2] * 3},
    "Vivit": {
        "image_processor_type": "VivitImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "rescale_factor": 1 / 127.5, "offset": True,
    },
}  # fmt: skip


def saved(tmp_path, name, **options):
    """A folder with a tiny checkpoint of 5 classes; the model."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**TINY, **SHAPE, **FAMILIES[name], num_labels=5, **options)
    model = getattr(transformers, f"{name}ForVideoClassification")(config).eval()
    model.save_pretrained(tmp_path)
    if name in PROCESSORS:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_transformers_is_read_whole(tmp_path, name):
    own = saved(tmp_path, name)
    loaded = load_video(f"transformers/{tmp_path}")
    assert isinstance(loaded.model, ClipModel)
    assert (loaded.model.frames, loaded.preprocessing.size) == (4, (32, 32))
    clip = torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(loaded.model(clip), own(pixel_values=clip).logits, rtol=0, atol=0)
    assert load_video(loaded.spec).model(clip).equal(loaded.model(clip))
    # Another head: the same features under it.
    features = load_video(f"transformers/{tmp_path}", num_classes=0).model(clip)
    with_head = load_video(f"transformers/{tmp_path}", num_classes=7).model
    head = with_head.get_submodule("backbone.classifier")
    torch.testing.assert_close(with_head(clip), head(features))
    assert with_head(clip).shape == (2, 7)


def test_frames_become_the_input_that_the_processor_makes(tmp_path):
    from transformers import VivitImageProcessor

    saved(tmp_path, "Vivit")
    preprocessing = load_video(f"transformers/{tmp_path}").preprocessing
    frame = torch.arange(3 * 32 * 32).remainder(256).reshape(3, 32, 32).to(torch.uint8)
    theirs = VivitImageProcessor.from_pretrained(tmp_path, do_resize=False, do_center_crop=False)
    expected = torch.as_tensor(theirs([frame.permute(1, 2, 0).numpy()], return_tensors="pt").pixel_values[0, 0])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    torch.testing.assert_close((frame / 255 - mean) / std, expected.float(), rtol=1e-5, atol=1e-5)


def test_a_fresh_head_on_a_pretrained_videomae_averages_its_tokens(tmp_path):
    """Checkpoints of the pretraining have another norm, and no head."""
    import transformers

    config = transformers.VideoMAEConfig(
        **TINY, **SHAPE, patch_size=16, use_mean_pooling=False,
        decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_num_hidden_layers=1,
        decoder_intermediate_size=32,
    )  # fmt: skip
    own = transformers.VideoMAEForPreTraining(config).eval()
    own.save_pretrained(tmp_path)
    model = load_video(f"transformers/{tmp_path}", num_classes=3).model
    clip = torch.randn(1, 4, 3, 32, 32)
    tokens = own.videomae.encoder(own.videomae.embeddings(clip, None)).last_hidden_state
    pooled = torch.nn.functional.layer_norm(tokens.mean(1), (32,), eps=1e-5)
    torch.testing.assert_close(model(clip), model.get_submodule("backbone.classifier")(pooled))
    with pytest.raises(refold.BackboneError, match=r"lacks classifier.*Pass num_classes= for a fresh head"):
        load_video(f"transformers/{tmp_path}")


def test_clips_of_another_shape(tmp_path):
    saved(tmp_path / "mae", "VideoMAE")
    own = saved(tmp_path / "time", "Timesformer")
    # VideoMAE's table of positions is computed, TimeSformer's is learned for its own clips.
    longer = load_video(f"transformers/{tmp_path / 'mae'}", frames=8, image_size=64).model
    assert longer(torch.randn(1, 8, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(
        refold.BackboneError, match=r"time_embeddings is \(1, 4, 32\), not \(1, 8, 32\).*frames=4, image"
    ):
        load_video(f"transformers/{tmp_path / 'time'}", frames=8)
    assert load_video(f"transformers/{tmp_path / 'time'}", frames=8, pretrained=False).model.frames == 8
    model = ClipModel(own, 4, (32, 32), channels_first=False)
    for shape in ((1, 8, 3, 32, 32), (1, 4, 3, 32, 64), (4, 3, 32, 32)):
        with pytest.raises(refold.DataError, match=r"of shape \(B, 4, C, 32, 32\), not"):
            model(torch.zeros(shape))
    with pytest.raises(refold.BackboneError, match="cannot take clips of 16 frames of 30x32"):
        load_video("transformers/timesformer", frames=16, image_size=(30, 32), pretrained=False)


def test_a_file_of_weights(tmp_path):
    own = saved(tmp_path, "VideoMAE")
    file = tmp_path / "weights.pth"
    torch.save(own.state_dict(), file)
    clip = torch.randn(1, 4, 3, 32, 32)
    (tmp_path / "model.safetensors").unlink()  # what is left is its config
    loaded = load_video(f"transformers/{tmp_path}", weights=file).model
    torch.testing.assert_close(loaded(clip), own(clip).logits, rtol=0, atol=0)
    state = own.state_dict()
    del state["videomae.encoder.layer.0.output.dense.weight"]
    torch.save(state, file)
    with pytest.raises(refold.BackboneError, match=r"lacks videomae.encoder.layer.0.output.dense.weight"):
        load_video(f"transformers/{tmp_path}", weights=file)


def test_models_of_torchvision(tmp_path):
    from torchvision.models.video import r3d_18

    own = r3d_18(num_classes=5).eval()
    file = tmp_path / "r3d.pth"
    torch.save(own.state_dict(), file)
    loaded = load_video("torchvision/r3d_18", frames=4, image_size=32, weights=file)
    clip = torch.randn(1, 4, 3, 32, 32)
    torch.testing.assert_close(loaded.model(clip), own(clip.transpose(1, 2)), rtol=0, atol=0)
    assert loaded.preprocessing.mean == (0.43216, 0.394666, 0.37645)  # of Kinetics, from torchvision's page
    assert load_video("torchvision/r3d_18", frames=4, image_size=32, weights=file, num_classes=2).model(clip).shape == (
        1,
        2,
    )
    torch.save(r3d_18().state_dict() | {"more": torch.zeros(1)}, file)
    with pytest.raises(refold.BackboneError, match="does not fit r3d_18: unexpected more"):
        load_video("torchvision/r3d_18", weights=file)


def test_every_name_of_torchvision_gives_scores_or_says_which_clips_it_is_for():
    from torchvision.ops import StochasticDepth

    swin = load_video("torchvision/swin3d_t", frames=2, image_size=32, pretrained=False, num_classes=3, drop_path=0.3)
    assert swin.model(torch.randn(1, 2, 3, 32, 32)).shape == (1, 3)
    depths = [module.p for module in swin.model.modules() if isinstance(module, StochasticDepth)]
    torch.testing.assert_close(depths, [0.3 * block / 11 for block in range(12)])  # torchvision's rule, 12 blocks
    # As many tokens as clips of 16 frames of 224 pixels have, with other positions.
    with pytest.raises(refold.BackboneError, match=r"64 frames of 112x112.*made for frames=16, image_size=224"):
        load_video("torchvision/mvit_v2_s", frames=64, image_size=112, pretrained=False)
    with pytest.raises(refold.BackboneError, match="cannot take clips of 4 frames of 32x32"):
        load_video("torchvision/s3d", frames=4, image_size=32, pretrained=False)


def test_backbones_for_images_average_over_frames():
    loaded = load_video("timm/test_vit", pretrained=False, num_classes=3, frames=2, image_size=32, in_chans=1)
    assert isinstance(loaded.model, FrameModel)
    clip = torch.randn(2, 2, 1, 32, 32)
    backbone = loaded.model.backbone
    torch.testing.assert_close(loaded.model(clip), (backbone(clip[:, 0]) + backbone(clip[:, 1])) / 2)
    assert loaded.spec == "timm/test_vit"
    wrapped, bare = loaded.model.state_dict(), timm.create_model("test_vit", num_classes=3).state_dict()
    assert list(wrapped) == [f"backbone.{name}" for name in bare]


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("transformers/videomae", {}, "names a family, not its weights"),
        ("transformers/MCG-NJU/videomae-base", {}, "HF_HUB_OFFLINE is set"),
        ("torchvision/swin3d", {}, "Did you mean torchvision/swin3d_t"),
        ("torchvision/resnet18", {}, "knows no such model of clips"),
        ("transformers/videomae", {"pretrained": False, "drop_path": 0.1}, "no stochastic depth that could be set"),
        ("torchvision/r3d_18", {"pretrained": False, "drop_path": 0.1}, "no stochastic depth that could be set"),
        ("torchvision/r3d_18", {"in_chans": 1}, "clips of 3 channels"),
        ("timm/test_vit", {"frames": 0}, "must be at least 1"),
        ("nothing/like", {}, "not the name of a backbone"),
    ],
)
def test_what_cannot_be_loaded_is_said(spec, options, message):
    with pytest.raises(refold.BackboneError, match=message):
        load_video(spec, **options)


def test_another_kind_of_model_is_refused(tmp_path):
    from transformers import ViTConfig

    ViTConfig(**TINY).save_pretrained(tmp_path)
    with pytest.raises(refold.BackboneError, match="is a vit, no model of clips that is known to work"):
        load_video(f"transformers/{tmp_path}", pretrained=False)
