"""Encoders give the maps that the backbones' own classifiers compute, at the strides they state, from every source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.backbones import load
from refold.dense import Encoder, SimplePyramid, load_encoder
from refold.dense.stages import choose_stages
from refold.errors import BackboneError, DataError


def _outputs_of(model: nn.Module, modules: list[nn.Module], images: Tensor) -> list[Tensor]:
    """What these modules return while ``model`` sees ``images``."""
    found: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _, __, out: found.append(out)) for module in modules]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def _saved(model: nn.Module, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def _maps(encoder: Encoder, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return encoder(images)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet", "test_mambaout", "test_maxvit"])
def test_a_pyramid_gives_the_classifier_s_stages(name: str, tmp_path: Path) -> None:
    classifier: Any = timm.create_model(name, num_classes=7).eval()
    loaded = load_encoder(f"timm/{name}", weights=_saved(classifier, tmp_path))
    encoder = loaded.encoder
    images = torch.randn(2, 3, 160, 160)
    strides = [stage["reduction"] for stage in classifier.feature_info]
    with torch.no_grad():
        expected = classifier.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
    expected = [m for m, stride in zip(expected, strides, strict=True) if stride >= 4]
    maps = _maps(encoder, images)
    assert encoder.strides == (4, 8, 16, 32)
    assert encoder.is_pyramid
    for found, wanted, channels, stride in zip(maps, expected, encoder.channels, encoder.strides, strict=True):
        assert found.shape == (2, channels, 160 // stride, 160 // stride)
        torch.testing.assert_close(found, wanted)
    assert loaded.spec == f"timm/{name}"
    assert not encoder.training


def test_swin_takes_other_sizes_and_at_its_own_equals_the_classifier(tmp_path: Path) -> None:
    classifier: Any = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2).eval()
    encoder = load_encoder("swin_tiny_patch4_window7_224", weights=_saved(classifier, tmp_path)).encoder
    images = torch.randn(1, 3, 224, 224)
    expected = _outputs_of(classifier, list(classifier.layers), images)  # (B, H, W, C)
    for found, wanted in zip(_maps(encoder, images), expected, strict=True):
        torch.testing.assert_close(found, wanted.permute(0, 3, 1, 2))
    other = _maps(encoder, torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in other] == [(96, 16, 24), (192, 8, 12), (384, 4, 6), (768, 2, 3)]


def test_a_plain_vit_gives_the_ends_of_its_quarters_without_prefix_tokens(tmp_path: Path) -> None:
    classifier: Any = timm.create_model("test_vit2", num_classes=2).eval()  # 8 blocks
    encoder = load_encoder("timm/test_vit2", weights=_saved(classifier, tmp_path)).encoder
    images = torch.randn(2, 3, 160, 160)
    blocks = [classifier.blocks[k] for k in (1, 3, 5, 7)]
    expected = _outputs_of(classifier, blocks, images)
    assert encoder.strides == (16, 16, 16, 16)
    assert not encoder.is_pyramid
    for found, tokens in zip(_maps(encoder, images), expected, strict=True):
        grid = tokens[:, classifier.num_prefix_tokens :].transpose(1, 2).reshape(2, -1, 10, 10)
        torch.testing.assert_close(found, grid)
    assert [m.shape[-2:] for m in _maps(encoder, torch.randn(1, 3, 48, 96))] == [(3, 6)] * 4


def test_a_vit_that_states_its_patch_as_one_number() -> None:
    encoder = load_encoder("timm/xcit_nano_12_p16_224", pretrained=False).encoder
    size = encoder.fixed_size or (224, 224)
    assert [m.shape[1:] for m in _maps(encoder, torch.randn(1, 3, *size))] == [(128, 14, 14)] * 4
    with pytest.raises(BackboneError, match="cannot be built for 100x100 images"):
        load_encoder("timm/xcit_nano_12_p16_224", pretrained=False, image_size=100)


def test_stages_choose_the_maps() -> None:
    encoder = load_encoder("timm/test_vit2", pretrained=False, stages=(0, 7)).encoder
    assert encoder.strides == (16, 16)
    encoder = load_encoder("timm/test_resnet", pretrained=False, stages=(0, 2)).encoder
    assert encoder.strides == (2, 8)
    assert [m.shape[-1] for m in _maps(encoder, torch.randn(1, 3, 64, 64))] == [32, 8]


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("swin_t", [f"features.{k}.1.add_1" for k in (1, 3, 5, 7)]),
    ],
)
def test_torchvision_gives_what_its_feature_extractor_gives(name: str, nodes: list[str]) -> None:
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    torch.manual_seed(3)
    model = torchvision.models.get_model(name, weights=None).eval()
    if name == "swin_t":
        nodes[2] = "features.5.5.add_1"  # its third stage has six blocks
    torch.manual_seed(3)
    loaded = load_encoder(f"torchvision/{name}", pretrained=False, image_size=64)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = list(create_feature_extractor(model, nodes)(images).values())
    for found, wanted, channels in zip(_maps(loaded.encoder, images), expected, loaded.encoder.channels, strict=True):
        assert found.shape[1] == channels
        torch.testing.assert_close(found, wanted if name == "resnet18" else wanted.permute(0, 3, 1, 2))
    assert loaded.preprocessing.size == (64, 64)
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name", ["regnet_y_400mf", "efficientnet_b0"])
def test_other_torchvision_trunks_have_four_strides(name: str) -> None:
    encoder = load_encoder(f"torchvision/{name}", pretrained=False).encoder
    maps = _maps(encoder, torch.randn(1, 3, 64, 96))
    assert [(m.shape[1], 64 // m.shape[2], 96 // m.shape[3]) for m in maps] == [
        (channels, stride, stride) for channels, stride in zip(encoder.channels, (4, 8, 16, 32), strict=True)
    ]


def test_transformers_backbones_load_from_a_folder(tmp_path: Path) -> None:
    from transformers import Dinov2Backbone, Dinov2Config, SwinConfig, SwinModel

    swin = SwinConfig(image_size=128, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4)
    model = SwinModel(swin).eval()
    model.save_pretrained(tmp_path / "swin")
    loaded = load_encoder(f"transformers/{tmp_path / 'swin'}")
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        states = model(images, output_hidden_states=True).reshaped_hidden_states
    maps = _maps(loaded.encoder, images)
    assert loaded.encoder.strides == (4, 8, 16, 32)
    assert loaded.preprocessing.size == (128, 128)
    # SwinModel's states are those after down-sampling; its last one is the last stage before the final norm.
    torch.testing.assert_close(maps[-1], F.layer_norm(states[-1].permute(0, 2, 3, 1), (128,)).permute(0, 3, 1, 2))

    vit = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Backbone(vit).save_pretrained(tmp_path / "vit")
    encoder = load_encoder(f"transformers/{tmp_path / 'vit'}", pretrained=False).encoder
    assert encoder.strides == (14,) * 4
    assert [tuple(m.shape) for m in _maps(encoder, torch.randn(1, 3, 28, 56))] == [(1, 32, 2, 4)] * 4


def test_packaged_weights_are_real_and_resampled() -> None:
    full = load("packaged/vit_small_focus", image_size=112)
    loaded = load_encoder("packaged/vit_small_focus", image_size=112)
    images = torch.randn(1, 3, 112, 112)
    model: Any = full.model
    expected = _outputs_of(model, [model.blocks[k] for k in (2, 5, 8, 11)], images)
    for found, tokens in zip(_maps(loaded.encoder, images), expected, strict=True):
        torch.testing.assert_close(found, tokens[:, 1:].transpose(1, 2).reshape(1, 384, 8, 8), atol=1e-4, rtol=1e-4)
    assert loaded.encoder.strides == (14,) * 4
    assert loaded.preprocessing.size == (112, 112)


def test_packaged_convolutions_give_a_pyramid() -> None:
    loaded = load_encoder("packaged/efficientnet_lite0")
    full: Any = load("packaged/efficientnet_lite0").model
    images = torch.randn(1, 3, 64, 64)
    expected = _outputs_of(full, [full.blocks[k] for k in (1, 2, 4, 6)], images)
    for found, wanted in zip(_maps(loaded.encoder, images), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert loaded.preprocessing.mean == (0.498, 0.498, 0.498)


@pytest.mark.parametrize(
    "spec",
    ["timm/swin_tiny_patch4_window7_224", "timm/convnext_atto", "timm/dla46_c", "torchvision/swin_t", "transformers/"],
)
def test_maps_are_the_same_in_training(spec: str, tmp_path: Path) -> None:
    """Swin has stochastic depth unless told otherwise: a frozen backbone's maps would be noise around themselves."""
    if spec == "transformers/":
        from transformers import SwinConfig, SwinModel

        config = SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=2)
        assert config.drop_path_rate > 0
        SwinModel(config).save_pretrained(tmp_path)
        spec = f"transformers/{tmp_path}"
    encoder = load_encoder(spec, pretrained=False, image_size=64).encoder
    refold.attach(encoder.body, refold.LinearProbe(), example=torch.randn(1, 3, 64, 64), trainable=())
    images = torch.randn(4, 3, 64, 64)
    expected = _maps(encoder, images)
    encoder.train()
    with torch.no_grad():
        assert all(map(torch.equal, encoder(images), expected))


@pytest.mark.parametrize("spec", ["timm/test_convnext", "timm/test_vit", "torchvision/resnet18"])
def test_adapters_go_to_the_body_and_merge(spec: str) -> None:
    encoder = load_encoder(spec, pretrained=False).encoder
    keys = list(encoder.body.state_dict())
    images = torch.randn(2, 3, 64, 64)
    before = _maps(encoder, images)
    refold.attach(encoder.body, refold.RepAdapter(), example=images[:1], trainable=())
    with torch.no_grad():
        for parameter in [p for p in encoder.body.parameters() if p.requires_grad]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    adapted = _maps(encoder, images)
    assert not torch.allclose(adapted[-1], before[-1], rtol=1e-3)
    refold.merge(encoder.body)
    for found, wanted in zip(_maps(encoder, images), adapted, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert list(encoder.body.state_dict()) == keys


def test_a_backbone_without_the_stages_is_refused_by_name() -> None:
    with pytest.raises(BackboneError, match=r"timm/levit_128s: has maps of strides \[16, 32, 64\]"):
        load_encoder("timm/levit_128s", pretrained=False)
    with pytest.raises(BackboneError, match="torchvision/vit_b_16: torchvision gives no feature maps"):
        load_encoder("torchvision/vit_b_16", pretrained=False)
    with pytest.raises(BackboneError, match="open_clip"):
        load_encoder("open_clip/ViT-B-32/openai")
    with pytest.raises(BackboneError, match=r"stages \(3, 9\) are not ascending indices of its 5 maps"):
        load_encoder("timm/test_resnet", pretrained=False, stages=(3, 9))


@pytest.mark.parametrize("stages", [(), (1, 1), (2, 1), (-1, 0), (0, 4)])
def test_impossible_stages_are_refused(stages: tuple[int, ...]) -> None:
    with pytest.raises(BackboneError, match="choose from 0 to 3"):
        choose_stages((4, 8, 16, 32), stages, "x")


def test_bad_options_are_refused() -> None:
    with pytest.raises(BackboneError, match="torchvision knows no such classifier"):
        load_encoder("torchvision/fasterrcnn_resnet50_fpn")
    with pytest.raises(BackboneError, match="in_chans: torchvision's backbones cannot take it"):
        load_encoder("torchvision/resnet18", in_chans=1)
    with pytest.raises(BackboneError, match="image_size: must be positive"):
        load_encoder("torchvision/resnet18", image_size=0)
    with pytest.raises(BackboneError, match="timm knows no such model"):
        load_encoder("timm/resnet1")


def test_a_size_that_the_backbone_cannot_take_is_one_clear_error() -> None:
    encoder = load_encoder("timm/test_convnext", pretrained=False).encoder
    with pytest.raises(DataError, match="64x70 is no multiple of the backbone's stride, 32"):
        encoder(torch.zeros(1, 3, 64, 70))
    fixed = load_encoder("timm/test_vit_relpos", pretrained=False).encoder
    assert fixed.fixed_size == (160, 160)
    with pytest.raises(DataError, match="takes 160x160 images only, not 320x160"):
        fixed(torch.zeros(1, 3, 320, 160))


def test_grey_images_for_timm() -> None:
    loaded = load_encoder("timm/test_convnext", pretrained=False, in_chans=1)
    assert _maps(loaded.encoder, torch.zeros(1, 1, 32, 32))[0].shape == (1, 24, 8, 8)
    assert loaded.preprocessing.channels == 1


class TestSimplePyramid:
    @pytest.mark.parametrize(
        ("stride", "grid", "finest"),
        [(16, (4, 6), (16, 24)), (14, (16, 16), (56, 56)), (16, (5, 7), (16, 32)), (14, (1, 1), (8, 8))],
    )
    def test_every_level_is_twice_the_next(self, stride: int, grid: tuple[int, int], finest: tuple[int, int]) -> None:
        pyramid = SimplePyramid((24,) * 4, (stride,) * 4, out_channels=16)
        levels = pyramid([torch.randn(2, 24, *grid) for _ in range(4)])
        expected = [(2, 16, finest[0] >> k, finest[1] >> k) for k in range(4)]
        assert [tuple(level.shape) for level in levels] == expected
        assert pyramid.strides == (4, 8, 16, 32)
        assert pyramid.channels == (16,) * 4

    def test_the_coarsest_levels_by_hand(self) -> None:
        pyramid = SimplePyramid((8, 8), (16, 16), out_channels=4).double()
        last = torch.randn(1, 8, 4, 4, dtype=torch.float64)
        levels = pyramid([torch.randn_like(last), last])

        def tail(x: Tensor, level: int) -> Tensor:
            weights = dict(pyramid.levels[level].named_parameters())
            for name, padding in (("1", 0), ("3", 1)):
                x = F.conv2d(x, weights[f"{name}.weight"], padding=padding)
                mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
                x = (x - mean) / (variance + 1e-6).sqrt()  # the norm starts as the identity
            return x

        torch.testing.assert_close(levels[2], tail(last, 2))
        torch.testing.assert_close(levels[3], tail(F.max_pool2d(last, 2), 3))

    def test_a_pyramid_is_refused(self) -> None:
        with pytest.raises(BackboneError, match="are a pyramid already"):
            SimplePyramid((8, 8), (8, 16))
