"""Cached features: losses are those without, the backbone sees each view once, stale folders are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import refold
from cached import (
    COUNT,
    NAMES,
    PREPROCESSING,
    SIZE,
    SIZES,
    VIEWS,
    Counted,
    losses_of,
    make_adapted,
    make_encoder,
    make_views,
)
from refold.dense import Encoder
from refold.dense.cache import CachedEncoder, estimate
from refold.dense.replay import Replay
from refold.detection import build_detector
from refold.errors import DataError, SiteError
from refold.segmentation import Segmenter
from refold.training.precision import reduced_precision


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["swin", "convnext", "tokens"])
@pytest.mark.parametrize(
    "method",
    [
        refold.E3VA(rank=3),
        refold.E3VA(rank=3, start="stem", skip=False, tap="stream", recompute="taps"),
        refold.LST(),
        refold.LinearProbe(),
    ],
    ids=["E3VA", "E3VA otherwise", "LST", "LinearProbe"],
)
def test_losses_are_those_without_a_cache(method, name, where, tmp_path):
    """DropPath of 0.5 in the backbone: without a cache it is in evaluation mode, with one in training mode."""
    plain = Segmenter(make_adapted(name, method), "segformer", 3, width=32)
    model = copy.deepcopy(plain)
    cached = CachedEncoder(
        model.encoder, NAMES, SIZES, views=VIEWS, folder=tmp_path / "cache" if where == "disk" else None,
        dtype="float32",
    )  # fmt: skip
    counted = Counted(model.encoder.body)
    found, expected = losses_of(model, cached, blank=True), losses_of(plain, None)
    assert counted.images == COUNT * VIEWS
    assert found == pytest.approx(expected, rel=2e-5)
    assert abs(expected[-1] - expected[0]) > 5e-3
    for (key, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=key)


def test_bfloat16_records_are_close():
    plain = Segmenter(make_adapted("swin", refold.E3VA(rank=3)), "segformer", 3, width=32)
    model = copy.deepcopy(plain)
    found, expected = losses_of(model, CachedEncoder(model.encoder, NAMES, SIZES, views=VIEWS)), losses_of(plain, None)
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-2)


def test_in_bfloat16_nothing_is_lost_but_in_the_records():
    """Under autocast some of what is read is float32 and some bfloat16; each is given back as it was."""
    encoder, images = make_adapted("swin", refold.E3VA(rank=3)).eval(), make_views()[0][:, 0]
    _stir(encoder)
    with reduced_precision(encoder):
        with torch.autocast("cpu", torch.bfloat16):
            cached = CachedEncoder(encoder, NAMES, SIZES, dtype="float32")
            expected = encoder(images)
            with cached.serving([(k, 0) for k in range(COUNT)]):
                found = encoder(images)
        with pytest.raises(DataError, match="were computed in autocast to"), cached.serving([(0, 0)]):
            encoder(images[:1].bfloat16())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_detector_trains_on_cached_maps():
    encoder = make_adapted("swin", refold.E3VA(rank=3))
    _stir(encoder)
    plain = build_detector(
        "fcos", encoder, 2, preprocessing=PREPROCESSING, channels=64, min_size=SIZE, max_size=SIZE
    ).train()  # fmt: skip
    plain.encoder.body.eval()
    model = copy.deepcopy(plain).train()
    images = list(torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    cached = CachedEncoder(model.encoder, NAMES, SIZES, dtype="float32")
    counted = Counted(model.encoder.body)
    for _ in range(2):
        for parameter in (*model.parameters(), *plain.parameters()):
            parameter.grad = None
        with cached.serving([(2, 0), (0, 0)]):
            found = model(images, [dict(t) for t in targets])
        expected = plain(images, [dict(t) for t in targets])
        for name, loss in expected.items():
            torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-7)
        for losses in (found, expected):
            torch.stack(list(losses.values())).sum().backward()
    assert counted.images == 2
    gradients = [(key, p.grad) for key, p in plain.named_parameters() if p.requires_grad and "refold" in key]
    assert gradients
    own = dict(model.named_parameters())
    for key, gradient in gradients:
        torch.testing.assert_close(own[key].grad, gradient, rtol=1e-3, atol=1e-6)


def _stir(encoder: Encoder) -> None:
    """Adapters that add something."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        refold.LoRA(rank=2),
        refold.RepAdapter(rank=2),
        refold.DTL(),
        refold.VPT(),
        refold.SSF(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_change_the_backbone_are_refused(method):
    encoder = make_adapted("swin", method)
    with pytest.raises(SiteError, match=f"{type(method).__name__} changes what the backbone computes"):
        estimate(encoder, SIZES)


@pytest.mark.parametrize("method", [refold.LayerNormTune(), refold.BitFit(), refold.FullFineTune(), None])
def test_a_backbone_that_trains_is_refused(method):
    encoder = make_encoder("swin") if method is None else make_adapted("swin", method)
    with pytest.raises(SiteError, match="it trains, and what the backbone computes changes with it"):
        Replay(encoder)


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(SiteError, match="map 0 is not what the adapters give here"):
        estimate(make_adapted("doubled", refold.E3VA(rank=3)), SIZES)
    encoder = make_adapted("swin", refold.E3VA(rank=3))
    with pytest.raises(DataError, match="63x64 is no multiple"):
        estimate(encoder, [(63, 64)])
    encoder.body.get_submodule("patch_embed").strict_img_size = True  # type: ignore[assignment]
    with pytest.raises(SiteError, match="its features of 96x64 images cannot be replayed: AssertionError"):
        estimate(encoder, [(96, 64)])
    assert estimate(make_adapted("doubled", refold.LinearProbe()), SIZES).total


def test_other_adapters_than_when_it_was_made_are_refused():
    encoder, images = make_adapted("swin", refold.E3VA(rank=3)), make_views()[0][:, 0]
    cached = CachedEncoder(encoder, NAMES, SIZES)
    refold.attach(encoder.body, refold.LoRA(rank=2), name="second", trainable=(), example=images[:1])
    with pytest.raises(SiteError, match="other adapters are on it"), cached.serving([(0, 0)]):
        encoder(images[:1])
    refold.activate(encoder.body, "default")
    with cached.serving([(0, 0)]):
        encoder(images[:1])
    refold.detach(encoder.body)
    with pytest.raises(SiteError, match="other adapters are on it"), cached.serving([(0, 0)]):
        encoder(images[:1])


def test_a_backbone_that_was_changed_meanwhile_is_refused():
    encoder, images = make_adapted("swin", refold.E3VA(rank=3)), make_views()[0][:, 0]
    cached = CachedEncoder(encoder, NAMES, SIZES)
    with cached.serving([(0, 0)]):
        encoder(images[:1])
    _stir(encoder)  # its adapters
    with cached.serving([(0, 0)]):
        encoder(images[:1])
    encoder.body.load_state_dict(make_encoder("swin").body.state_dict())
    with pytest.raises(DataError, match="the backbone was changed"), cached.serving([(0, 0)]):
        encoder(images[:1])


def test_a_compiled_wrapper_is_refused():
    encoder = make_adapted("swin", refold.E3VA(rank=3))
    encoder.body = torch.compile(encoder.body)  # type: ignore[assignment]
    with pytest.raises(SiteError, match="it is a compiled wrapper"):
        estimate(encoder, SIZES)


def test_batches_that_are_not_what_was_announced_are_refused():
    encoder, images = make_adapted("convnext", refold.LinearProbe()), make_views()[0][:, 0]
    cached = CachedEncoder(encoder, NAMES, [*SIZES[:3], (96, SIZE)])
    for keys in ([(COUNT, 0)], [(0, 1)], [(-1, 0)]):
        with pytest.raises(DataError, match="is not among 4 images of 1 views"), cached.serving(keys):
            pass
    with pytest.raises(DataError, match="image 1, view 0: has no record"), cached.serving([(1, 0)], blank=True):
        pass
    with pytest.raises(DataError, match="2 images have 1 keys"), cached.serving([(0, 0)]):
        encoder(images[:2])
    with (
        pytest.raises(DataError, match=r"image 3, view 0: was to be seen at \(96, 64\) pixels"),
        cached.serving([(3, 0)]),
    ):
        encoder(images[3:])
    assert cached.missing([(k, 0) for k in range(COUNT)]) == [(k, 0) for k in range(COUNT)]
    with cached.serving([(3, 0)]):
        assert [m.shape[-2] for m in encoder(F.pad(images[3:], (0, 0, 0, 32)))] == [24, 12, 6, 3]
    assert len(encoder.eval()(images)) == 4  # the body again
    for settings in ({"views": 0}, {"dtype": "float16"}):
        with pytest.raises(DataError, match=r"views|dtype"):
            CachedEncoder(encoder, NAMES, SIZES, **settings)  # type: ignore[arg-type]
    for names, sizes in ((NAMES, SIZES[:3]), ([], [])):
        with pytest.raises(DataError, match="images"):
            CachedEncoder(encoder, names, sizes)
