"""Segmenters: sizes, each decoder against an independent account of it, auxiliary heads, and what is refused."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.dense import Encoder, load_encoder
from refold.errors import BackboneError, DataError, MissingExtraError
from refold.segmentation import DECODERS, Segmenter, segmentation_loss

SETR = ("setr_naive", "setr_pup", "setr_mla")


def _encoder(name: str = "test_vit", **options: Any) -> Encoder:
    return load_encoder(f"timm/{name}", pretrained=False, **options).encoder


def _decoded(model: Segmenter, images: Tensor) -> list[Tensor]:
    """Logits as the decoder gives them, before they are enlarged."""
    return model.decoder(images, model.encoder(images))


def _stir(module: nn.Module) -> None:
    """Norms that are no identities, so that a forgotten one shows."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.uniform_(-0.5, 0.5)
                layer.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        *(("test_convnext", decoder) for decoder in DECODERS if decoder not in SETR),
        *(("test_vit", decoder) for decoder in DECODERS),
        *(("eva02_tiny_patch14_224", decoder) for decoder in DECODERS),
    ],
)
def test_any_size_gives_logits_of_that_size_and_every_weight_learns(name: str, decoder: str) -> None:
    model = Segmenter(_encoder(name), decoder, 5, width=64)
    for size in ((61, 97), (33, 64)):
        with torch.no_grad():
            logits = model.eval()(torch.randn(2, 3, *size))
        assert logits.shape == (2, 5, *size)
    outputs = model.train()(torch.randn(2, 3, 61, 97))
    segmentation_loss(outputs, torch.randint(0, 5, (2, 61, 97))).backward()
    assert [n for n, p in model.decoder.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_padding_is_below_and_to_the_right_and_does_not_move_the_logits() -> None:
    model = Segmenter(_encoder("test_resnet"), "fpn", 3, width=64).eval()
    images = torch.randn(1, 3, 40, 70)
    padded = torch.zeros(1, 3, 64, 96)
    padded[..., :40, :70] = images
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(padded)[..., :40, :70])
        (small,) = _decoded(model, padded)
    assert small.shape == (1, 3, 16, 24)
    whole = F.interpolate(small, size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(padded), whole)


# With a ResNet smp's SegFormer head takes a fifth map, of stride 2; ours has the paper's four.
@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        *(("test_convnext", decoder) for decoder in ("upernet", "fpn", "segformer")),
        *(("test_resnet", decoder) for decoder in ("upernet", "fpn")),
    ],
)
def test_pyramid_decoders_equal_smp_s_own_models(name: str, decoder: str) -> None:
    import segmentation_models_pytorch as smp

    widths = {
        "upernet": {"decoder_channels": 64},
        "fpn": {"decoder_pyramid_channels": 64, "decoder_segmentation_channels": 32},
        "segformer": {"decoder_segmentation_channels": 64},
    }
    theirs: Any = smp.create_model(decoder, f"tu-{name}", encoder_weights=None, classes=4, **widths[decoder]).eval()
    _stir(theirs.decoder)
    ours = Segmenter(_encoder(name), decoder, 4, width=64).eval()
    ours.encoder.body.load_state_dict(_features_of(theirs.encoder.model, ours.encoder.body))
    layers: Any = ours.decoder.layers
    layers.decoder.load_state_dict(theirs.decoder.state_dict())
    layers.head.load_state_dict(theirs.segmentation_head[0].state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.segmentation_head[0](theirs.decoder(theirs.encoder(images)))
        (found,) = _decoded(ours, images)
    assert found.shape == (2, 4, 16, 24)
    torch.testing.assert_close(found, expected)


def _features_of(theirs: nn.Module, ours: nn.Module) -> dict[str, Tensor]:
    """smp asks timm for one more map, of stride 2, which our extractor leaves out."""
    state = theirs.state_dict()
    return {key: state[key] for key in ours.state_dict()}


def test_dpt_equals_smp_s_own_model() -> None:
    from segmentation_models_pytorch import DPT

    theirs: Any = DPT(
        "tu-test_vit",
        encoder_weights=None,
        encoder_output_indices=[0, 2, 3, 5],
        decoder_readout="ignore",
        decoder_intermediate_channels=(8, 16, 32, 64),
        decoder_fusion_channels=32,
        classes=4,
        dynamic_img_size=True,
    ).eval()
    _stir(theirs.decoder)
    ours = Segmenter(_encoder("test_vit"), "dpt", 4, width=32).eval()
    state = {f"model.{key}": value for key, value in theirs.encoder.model.state_dict().items()}
    ours.encoder.body.load_state_dict({key: state[key] for key in ours.encoder.body.state_dict()})
    layers: Any = ours.decoder.layers
    layers.decoder.load_state_dict(theirs.decoder.state_dict())
    layers.head.load_state_dict(theirs.segmentation_head.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs.segmentation_head.head(theirs.decoder(*theirs.encoder(images)))
        (found,) = _decoded(ours, images)
    assert found.shape == (1, 4, 32, 48)
    torch.testing.assert_close(found, expected)


def test_the_linear_probe_by_hand() -> None:
    model = Segmenter(_encoder("test_convnext"), "linear", 3).eval()
    _stir(model.decoder)
    norm, head = (module for module in model.decoder.modules() if isinstance(module, nn.BatchNorm2d | nn.Conv2d))
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = model.encoder(images)[-1].permute(0, 2, 3, 1)
        x = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        logits = (x @ head.weight.flatten(1).T + head.bias).permute(0, 3, 1, 2)  # type: ignore[union-attr]
        expected = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(images), expected)
    assert sum(p.numel() for p in model.decoder.parameters()) == 2 * 64 + 3 * (64 + 1)


class TestSetr:
    """The paper's figures 1b and 1c in functions, with the weights taken in the order in which they are used."""

    @staticmethod
    def layer(x: Tensor, weights: dict[str, Tensor], name: str, padding: int) -> Tensor:
        x = F.conv2d(x, weights[f"{name}.0.weight"], padding=padding)
        statistics = weights[f"{name}.1.running_mean"], weights[f"{name}.1.running_var"]
        return F.batch_norm(x, *statistics, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"]).relu()

    @staticmethod
    def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)
        return x.permute(0, 3, 1, 2)

    @classmethod
    def two_layers(cls, x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
        x = cls.layer(cls.norm(x, weights, f"{name}.0"), weights, f"{name}.1", 0)
        return F.conv2d(x, weights[f"{name}.2.weight"], weights[f"{name}.2.bias"])

    @staticmethod
    def twice(x: Tensor, times: int = 2) -> Tensor:
        return F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False)

    def prepared(self, decoder: str) -> tuple[Segmenter, Tensor, list[Tensor], dict[str, Tensor]]:
        model = Segmenter(_encoder(), decoder, 3, width=16).eval()
        _stir(model.decoder)
        images = torch.randn(2, 3, 48, 64)
        with torch.no_grad():
            maps = model.encoder(images)
        return model, images, maps, dict(model.decoder.layers.state_dict())

    @torch.no_grad()
    def test_naive(self) -> None:
        model, images, maps, weights = self.prepared("setr_naive")
        expected = self.two_layers(maps[3], weights, "main")
        torch.testing.assert_close(model(images), self.twice(expected, 16))

    @torch.no_grad()
    def test_pup(self) -> None:
        model, images, maps, weights = self.prepared("setr_pup")
        x = self.norm(maps[3], weights, "norm")
        for k in range(4):
            x = self.twice(self.layer(x, weights, f"steps.{k}", 1))
        expected = F.conv2d(x, weights["main.weight"], weights["main.bias"])
        assert expected.shape == (2, 3, 48, 64)  # no further enlargement for patches of 16
        torch.testing.assert_close(model(images), expected)

    @torch.no_grad()
    def test_mla(self) -> None:
        model, images, maps, weights = self.prepared("setr_mla")
        ones = [
            self.layer(self.norm(m, weights, f"reduce.{k}.0"), weights, f"reduce.{k}.1", 0) for k, m in enumerate(maps)
        ]
        sums = [ones[0] + ones[1] + ones[2] + ones[3], ones[1] + ones[2] + ones[3], ones[2] + ones[3], ones[3]]
        streams = []
        for k, x in enumerate(sums):
            for step in range(3):
                x = self.layer(x, weights, f"streams.{k}.{step}", 1)
            streams.append(self.twice(x, 4))
        assert streams[0].shape == (2, 8, 12, 16)
        expected = F.conv2d(torch.cat(streams, 1), weights["main.weight"], weights["main.bias"])
        torch.testing.assert_close(model(images), self.twice(expected, 4))

    @pytest.mark.parametrize(("decoder", "count"), [("setr_naive", 3), ("setr_pup", 4), ("setr_mla", 4)])
    def test_auxiliary_heads_read_one_map_each_in_training_only(self, decoder: str, count: int) -> None:
        model, images, maps, weights = self.prepared(decoder)
        assert isinstance(model(images), Tensor)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.train(False)
        model.decoder.layers.training = model.training = True  # the norms keep their statistics
        main, *auxiliary = model(images)
        assert len(auxiliary) == count
        for k, found in enumerate(auxiliary):
            torch.testing.assert_close(found, self.twice(self.two_layers(maps[k], weights, f"auxiliary.{k}"), 16))
        torch.testing.assert_close(main, model.eval()(images))

    @pytest.mark.parametrize("decoder", SETR)
    def test_a_pyramid_is_refused(self, decoder: str) -> None:
        with pytest.raises(BackboneError, match=rf"{decoder}: needs maps of one stride; .* \(4, 8, 16, 32\)"):
            Segmenter(_encoder("test_convnext"), decoder, 3)

    def test_the_paper_s_blocks_can_be_chosen(self) -> None:
        encoder = _encoder("test_vit2", stages=(2, 4, 6, 7))  # 8 blocks
        assert Segmenter(encoder, "setr_mla", 3, width=16).eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_an_encoder_of_fixed_size_takes_smaller_images_only() -> None:
    model = Segmenter(_encoder("test_vit_relpos"), "setr_naive", 3, width=16).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 100, 160)).shape == (1, 3, 100, 160)
        with pytest.raises(DataError, match=r"takes 160x160 images only, not 200x160.*slide a window"):
            model(torch.randn(1, 3, 200, 100))
        windows = refold.segmentation.Inference(window=(160, 160))
        assert windows(model, torch.randn(1, 3, 200, 100)).shape == (1, 3, 200, 100)


@pytest.mark.parametrize("method", [refold.RepAdapter(), refold.LoRA()])
def test_adapters_in_the_encoder_train_and_merge(method: Any) -> None:
    model = Segmenter(_encoder("test_convnext"), "segformer", 2, width=32)
    refold.attach(model.encoder.body, method, example=torch.zeros(1, 3, 64, 64), trainable=())
    frozen = {n: p.clone() for n, p in model.encoder.body.named_parameters() if not p.requires_grad}
    images, masks = torch.randn(4, 3, 32, 32), torch.zeros(4, 32, 32, dtype=torch.long)
    masks[:, :, 16:] = 1
    images[:, :, :, 16:] += 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(12):
        loss = segmentation_loss(model.train()(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.encoder.body.named_parameters() if n in frozen)
    with torch.no_grad():
        adapted = model.eval()(images)
        refold.merge(model.encoder.body)
        merged = model(images)
    assert float((merged - adapted).norm() / adapted.norm()) < 1e-5


def test_a_copy_is_independent() -> None:
    model = Segmenter(_encoder("test_vit"), "upernet", 3, width=16).eval()
    twin = copy.deepcopy(model)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = model(images)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(images), before)


class TestRefusals:
    def test_unknown_decoders_and_too_few_classes(self) -> None:
        with pytest.raises(BackboneError, match=r"unknown decoder 'unet'. Known: upernet, fpn"):
            Segmenter(_encoder(), "unet", 3)
        with pytest.raises(DataError, match="two classes at least, not 1"):
            Segmenter(_encoder(), "linear", 1)

    def test_fpn_s_groups(self) -> None:
        with pytest.raises(BackboneError, match="width: fpn's width must be a multiple of 64, not 48"):
            Segmenter(_encoder("test_convnext"), "fpn", 3, width=48)

    @pytest.mark.parametrize("decoder", ["upernet", "fpn", "segformer", "dpt"])
    def test_other_stages(self, decoder: str) -> None:
        with pytest.raises(BackboneError, match=f"{decoder}: needs four maps"):
            Segmenter(_encoder("test_resnet", stages=(1, 2, 3)), decoder, 3)
        with pytest.raises(BackboneError, match=f"{decoder}: needs maps of strides 4, 8, 16, 32"):
            Segmenter(_encoder("test_resnet", stages=(0, 1, 2, 3)), decoder, 3)

    def test_dpt_on_odd_maps_of_a_fixed_size(self) -> None:
        with pytest.raises(BackboneError, match="image_size divisible by 32"):
            Segmenter(_encoder("test_vit_relpos", image_size=112), "dpt", 3)

    def test_upernet_cannot_train_on_one_image(self) -> None:
        model = Segmenter(_encoder("test_convnext"), "upernet", 3, width=32)
        with pytest.raises(DataError, match=r"batch_size: .* needs 2 images"):
            model.train()(torch.randn(1, 3, 64, 64))
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)

    def test_no_pixels(self) -> None:
        with pytest.raises(DataError, match="there is no pixel"):
            Segmenter(_encoder("test_convnext"), "linear", 3)(torch.zeros(1, 3, 0, 8))

    @pytest.mark.parametrize("decoder", ["upernet", "fpn", "segformer", "dpt"])
    def test_a_missing_extra_is_named(self, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "segmentation_models_pytorch"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
        with pytest.raises(MissingExtraError, match=r"pip install 'refold\[dense\]'"):
            Segmenter(_encoder("test_convnext"), decoder, 3)
        assert Segmenter(_encoder("test_convnext"), "linear", 3).classes == 3


class TestLoss:
    def test_by_hand(self) -> None:
        logits, masks = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
        masks[0, :2] = 255
        chosen = logits.log_softmax(1).gather(1, masks.clamp(max=2)[:, None])[:, 0]
        expected = -chosen[masks != 255].mean()
        torch.testing.assert_close(segmentation_loss(logits, masks), expected)
        torch.testing.assert_close(segmentation_loss([logits] * 3, masks), 1.8 * expected)
        torch.testing.assert_close(segmentation_loss([logits] * 3, masks, auxiliary=1.0), 3 * expected)
        weights = torch.tensor([1.0, 2.0, 4.0])
        share = weights[masks.clamp(max=2)] * (masks != 255)
        torch.testing.assert_close(
            segmentation_loss(logits, masks, weights=weights), -(share * chosen).sum() / share.sum()
        )

    def test_a_batch_without_labels_changes_nothing(self) -> None:
        logits = torch.randn(1, 3, 2, 2, requires_grad=True)
        loss = segmentation_loss(logits, torch.full((1, 2, 2), 255))
        loss.backward()
        assert loss.item() == 0
        assert logits.grad is not None
        assert torch.equal(logits.grad, torch.zeros_like(logits))
