"""Detectors: a step of training, evaluation, one image learnt by heart, geometry, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

import refold
from refold.dense import load_encoder
from refold.detection import KINDS, MASK_KINDS, build_detector
from refold.detection.pyramid import ExactBoxCoder, ExactP6P7, StridedAnchors
from refold.errors import BackboneError, DataError
from refold.preprocessing import Preprocessing

FAMILIES = ("timm/test_convnext", "timm/test_resnet", "timm/test_vit", "timm/swin_tiny_patch4_window7_224")
SMALL = {"min_size": 64, "max_size": 96, "channels": 64, "hidden": 32, "rois": 64}


def encoder_of(spec: str = "timm/test_convnext", **options):
    return load_encoder(spec, pretrained=False, **options)


def detector(kind: str, spec: str = "timm/test_convnext", **options):
    torch.manual_seed(0)
    loaded = encoder_of(spec)
    return build_detector(kind, loaded.encoder, 3, preprocessing=loaded.preprocessing, **{**SMALL, **options})


def scene(rows: int = 60, columns: int = 80, boxes: tuple = ((10, 12, 50, 44),)) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise with bright rectangles, all of class 3."""
    image = torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(1)) * 0.2
    masks = torch.zeros(len(boxes), rows, columns, dtype=torch.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] += 0.8
        masks[k, y1:y2, x1:x2] = 1
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.full((len(boxes),), 3),
        "masks": masks,
    }
    return image, target


@pytest.mark.parametrize(
    ("kind", "spec"), [(kind, FAMILIES[0]) for kind in KINDS] + [("cascade_mask_rcnn", s) for s in FAMILIES[1:3]]
)
def test_a_step_reaches_every_parameter_outside_the_body(kind: str, spec: str) -> None:
    model = detector(kind, spec).train()
    images, targets = zip(scene(), scene(64, 64, ()), strict=True)  # the second is a negative
    losses = model(list(images), list(targets))
    assert all(torch.isfinite(loss) and loss >= 0 for loss in losses.values())
    sum(losses.values()).backward()
    body = {id(p) for p in model.encoder.body.parameters()}
    outside = {name: p for name, p in model.named_parameters() if id(p) not in body}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in outside.values())
    silent = [name for name, p in outside.items() if not p.grad.any()]
    # Object classes that are not there, biases of maps of one pixel: of few parameters only.
    assert len(silent) < 0.25 * len(outside), silent
    assert any(p.grad is not None and p.grad.any() for p in model.encoder.body.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_negatives_has_finite_losses_and_a_gradient(kind: str) -> None:
    model = detector(kind).train()
    image, target = scene(64, 64, ())
    losses = model([image], [target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    # Of every parameter, if only zeros: what several processes wait for.
    assert all(p.grad is not None for p in set(model.parameters()) - set(model.encoder.body.parameters()))
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_in_pixels_of_the_image_given(kind: str) -> None:
    model = detector(kind, score_threshold=0.0, detections=7).eval()
    image, _ = scene(120, 90, ())
    with torch.no_grad():
        found = model([image, scene(50, 70, ())[0]])
    for one, (rows, columns) in zip(found, ((120, 90), (50, 70)), strict=True):
        n = len(one["boxes"])
        assert 0 < n <= 7
        assert one["labels"].min() >= 1
        assert one["labels"].max() <= 3
        x1, y1, x2, y2 = one["boxes"].unbind(1)
        assert min(float(x1.min()), float(y1.min())) >= 0
        assert float(x2.max()) <= columns + 1e-3
        assert float(y2.max()) <= rows + 1e-3
        assert ("masks" in one) == (kind in MASK_KINDS) == model.has_masks
        if "masks" in one:
            assert one["masks"].shape == (n, 1, rows, columns)


@pytest.mark.parametrize(
    ("kind", "rate", "steps"), [("retinanet", 5e-4, 70), ("fcos", 2e-3, 40), ("cascade_mask_rcnn", 2e-3, 30)]
)
def test_one_image_is_learnt_by_heart(kind: str, rate: float, steps: int) -> None:
    model = detector(kind, score_threshold=0.3, rois=32).train()
    image, target = scene()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(model([image], [target]).values()).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        best = {name: value[0] for name, value in model([image])[0].items()}
    assert best["labels"] == 3
    assert (best["boxes"] - target["boxes"][0]).abs().max() < 6
    if "masks" in best:
        mask, truth = best["masks"][0] >= 0.5, target["masks"][0].bool()
        assert (mask & truth).sum() / (mask | truth).sum() > 0.75


def test_images_are_normalised_once_by_the_encoders_statistics() -> None:
    seen = []
    loaded = encoder_of()
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2))
    model = build_detector("faster_rcnn", loaded.encoder, 1, preprocessing=preprocessing, **SMALL).eval()
    model.encoder.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model([torch.full((3, 64, 64), 0.6)])
    expected = torch.tensor([(0.6 - 0.1) / 0.5, (0.6 - 0.2) / 0.4, (0.6 - 0.3) / 0.2])
    torch.testing.assert_close(seen[0], expected.view(1, 3, 1, 1).expand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("kind", "levels", "smallest"), [("faster_rcnn", 5, 32.0), ("retinanet", 5, 32.0), ("fcos", 5, 8.0)]
)
def test_anchors_of_the_papers(kind: str, levels: int, smallest: float) -> None:
    model = detector(kind)
    generator = model.rpn.anchor_generator if kind == "faster_rcnn" else model.anchor_generator
    assert [sizes[0] for sizes in generator.sizes] == [smallest * 2**k for k in range(levels)]
    assert generator.strides == tuple(4 * 2**k for k in range(5 if kind == "faster_rcnn" else 6))[-levels:]
    half = detector("faster_rcnn", anchor_scale=4.0).rpn.anchor_generator
    assert [sizes[0] for sizes in half.sizes] == [16.0 * 2**k for k in range(5)]


def test_anchors_stand_at_multiples_of_the_stride_also_where_a_level_reaches_over_the_image() -> None:
    generator = StridedAnchors(((8.0,), (16.0,)), (1.0,), (32, 64))
    images = ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)])
    maps = [torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)]
    (anchors,) = generator(images, maps)
    assert anchors.dtype == torch.float32
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[:9, 0].tolist() == [0, 32, 64] * 3
    assert centres[9:, 0].tolist() == [0, 64] * 2  # 96 // 2 = 48 would be torchvision's


def test_roi_pooling_does_not_depend_on_the_first_batch() -> None:
    """A linear ramp is its own RoI average: the pooled value says where pooling looked."""
    model = detector("faster_rcnn")
    pool = model.roi_heads.box_roi_pool
    # torchvision's convention, of anchors too: pixel i of a level lies at i times its stride.
    strides = (4, 8, 16, 32)
    ramps = {str(k): (torch.arange(64 // s) * s).float().expand(1, 1, 64 // s, -1) for k, s in enumerate(strides)}
    box = torch.tensor([[16.0, 8.0, 48.0, 40.0]])
    pooled = pool(ramps, [box], [(40, 40)])  # before padding to 64: torchvision infers strides 2, 4, 8, 16
    torch.testing.assert_close(pooled.mean(), torch.tensor(32.0))


def test_boxes_are_not_rounded_to_bfloat16() -> None:
    box = torch.tensor([[701.3, 333.7, 797.9, 403.1]])
    decoded = ExactBoxCoder((1.0, 1.0, 1.0, 1.0)).decode(torch.zeros(1, 4, dtype=torch.bfloat16), [box])
    torch.testing.assert_close(decoded[0], box, atol=1e-3, rtol=0)
    model = detector("fcos", score_threshold=0.0).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model([scene()[0]])[0]["boxes"]
    assert found.dtype == torch.float32


def test_a_plain_vit_gets_a_simple_pyramid_and_padding_to_its_patches() -> None:
    model = detector("retinanet", "timm/test_vit")
    multiple = model.encoder.multiple
    assert model.backbone.simple is not None
    assert model.backbone.strides == (8, 16, 32, 64, 128)
    assert model.transform.size_divisible % 32 == model.transform.size_divisible % multiple == 0


def test_a_state_dict_holds_all_of_a_detector_once() -> None:
    model = detector("cascade_mask_rcnn", score_threshold=0.0, detections=5).eval()
    keys = model.state_dict()
    assert len(keys) == len(list(model.parameters())) + len(list(model.buffers()))
    torch.manual_seed(7)
    loaded = encoder_of()
    options = {**SMALL, "score_threshold": 0.0, "detections": 5}
    other = build_detector("cascade_mask_rcnn", loaded.encoder, 3, preprocessing=loaded.preprocessing, **options).eval()
    other.load_state_dict(copy.deepcopy(keys))
    image, _ = scene()
    with torch.no_grad():
        expected, found, copied = model([image])[0], other([image])[0], copy.deepcopy(model)([image])[0]
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert torch.equal(copied[name], value)


def test_swin_takes_images_of_several_sizes() -> None:
    model = detector("faster_rcnn", FAMILIES[3]).eval()
    with torch.no_grad():
        found = model([scene(60, 90, ())[0], scene(64, 64, ())[0]])
    assert len(found) == 2


def test_adapters_attach_to_the_body_alone_and_merge() -> None:
    model = detector("mask_rcnn").train()
    refold.attach(model.encoder.body, refold.LoRA(rank=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith("backbone.encoder.body.") for name in frozen)
    assert all(".refold." in name for name in trained if name.startswith("backbone.encoder.body."))
    image, target = scene()
    sum(model([image], [target]).values()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    model.eval()
    with torch.no_grad():
        for name, p in model.encoder.body.named_parameters():
            if ".refold." in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02)
        x = torch.rand(1, 3, 64, 64)
        before = model.backbone(x)
        refold.merge(model.encoder.body)
        after = model.backbone(x)
    for level in before:
        torch.testing.assert_close(after[level], before[level], rtol=1e-4, atol=1e-4)


class _Flat(nn.Module):
    """An encoder whose maps are of other strides than it says, or of those given."""

    is_pyramid, fixed_size, multiple = True, None, 32

    def __init__(self, strides: tuple[int, ...], real: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.body, self.strides, self.channels = nn.Identity(), strides, (3,) * len(strides)
        self._real = real or strides

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images[..., ::s, ::s] for s in self._real]


def test_refusals() -> None:
    loaded = encoder_of()
    build = {"encoder": loaded.encoder, "classes": 2, "preprocessing": loaded.preprocessing}
    with pytest.raises(DataError, match="unknown detector 'yolo'"):
        build_detector("yolo", **build)
    with pytest.raises(DataError, match="classes: must be positive"):
        build_detector("fcos", **{**build, "classes": 0})
    with pytest.raises(DataError, match="min_size"):
        build_detector("fcos", **build, min_size=900, max_size=800)
    with pytest.raises(DataError, match="channels: of FCOS"):
        build_detector("fcos", **build, channels=48)
    with pytest.raises(DataError, match="no anchors"):
        build_detector("fcos", **build, anchor_scale=2.0)
    with pytest.raises(DataError, match="anchor_scale: must be positive"):
        build_detector("retinanet", **build, anchor_scale=0.0)
    with pytest.raises(DataError, match="3 channels, not 1"):
        build_detector("fcos", **{**build, "preprocessing": Preprocessing(mean=(0.5,), std=(0.5,))})
    for strides in ((4, 8, 32), (2, 4)):
        with pytest.raises(BackboneError, match="strides double"):
            build_detector("faster_rcnn", **{**build, "encoder": _Flat(strides)})
    with pytest.raises(BackboneError, match="strides double"):
        build_detector("retinanet", **{**build, "encoder": _Flat((4, 8))})
    wrong = build_detector("faster_rcnn", **{**build, "encoder": _Flat((4, 8), (4, 4))}, **SMALL).eval()
    with pytest.raises(BackboneError, match="not of stride 8"):
        wrong([torch.rand(3, 64, 64)])
    fixed = _Flat((4, 8, 16, 32))
    fixed.fixed_size = (80, 96)
    with pytest.raises(BackboneError, match="image_size"):
        build_detector("faster_rcnn", **{**build, "encoder": fixed})


def test_an_encoder_of_one_size_gets_that_size() -> None:
    fixed = _Flat((4, 8, 16, 32))
    fixed.fixed_size = (64, 96)  # height, width
    seen = []
    model = build_detector("faster_rcnn", fixed, 2, preprocessing=Preprocessing(), **SMALL).eval()
    fixed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        model([torch.rand(3, 50, 50)])
    assert seen == [(1, 3, 64, 96)]


def test_the_coarsest_levels_learn_from_numbers_in_bfloat16_too() -> None:
    """On CPUs with AMX the weights' gradient over a map of one pixel has numbers from memory that nobody wrote."""
    torch.manual_seed(0)
    block = ExactP6P7(256, 256)
    x = torch.randn(4, 256, 2, 2).bfloat16()
    upper = torch.randn(4, 256, 1, 1)
    found = []
    for enabled in (False, True) * 4:
        dirty = [torch.full((256 * 9 * 256,), float("nan")) for _ in range(3)]  # what is freed is given out again
        del dirty
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            levels, names = block([x], [x], ["0"])
        assert (len(levels), names) == (3, ["0", "p6", "p7"])
        (levels[2].float() * upper).sum().backward()
        assert block.p7.weight.grad is not None
        found.append(block.p7.weight.grad.clone())
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])
