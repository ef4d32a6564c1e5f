"""Cached features: losses are those without, the backbone sees each view once, stale folders are refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refold
from refold.dense import Encoder
from refold.dense import records as records_module
from refold.dense.cache import CachedEncoder, estimate, identify
from refold.dense.replay import Replay
from refold.dense.stages import Features
from refold.detection import build_detector
from refold.errors import DataError, SiteError, StoreError
from refold.preprocessing import Preprocessing
from refold.segmentation import Segmenter, segmentation_loss
from refold.training.precision import reduced_precision

SIZE, COUNT, VIEWS = 64, 4, 2
SIZES = [(SIZE, SIZE)] * COUNT
NAMES = [f"image {k}" for k in range(COUNT)]
PREPROCESSING = Preprocessing((SIZE, SIZE), (0.5,) * 3, (0.25,) * 3)


class _Tokens(nn.Module):
    """A backbone that norms what it reads out, in (B, N, C), and gives channels last, like none of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _timm_swin()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (16, 32, 64, 128))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [m.clone() for m in self.inner(x)]
        return [norm(m.flatten(1, 2)).view(m.shape) for norm, m in zip(self.norms, maps, strict=True)]


class _Doubled(_Tokens):
    """A backbone that makes of what it reads out what no layout and no norm does."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [2 * m for m in self.inner(x)]


def _timm_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=SIZE, strict_img_size=False, window_size=4,
        depths=(1, 2, 1, 1), embed_dim=16, num_heads=(1, 2, 2, 4), drop_path_rate=0.5,
    )  # fmt: skip


def _encoder(name: str) -> Encoder:
    """An encoder whose every weight matters."""
    torch.manual_seed(0)
    if name == "convnext":
        body: nn.Module = timm.create_model("test_convnext", features_only=True, drop_path_rate=0.5)
        channels: tuple[int, ...] = tuple(body.feature_info.channels())  # type: ignore[union-attr, operator]
    else:
        body = {"swin": _timm_swin, "tokens": _Tokens, "doubled": _Doubled}[name]()
        channels = (16, 32, 64, 128)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Encoder(Features(body, channels, (4, 8, 16, 32), name != "convnext", None, PREPROCESSING))


def _adapted(name: str, method: refold.Method) -> Encoder:
    encoder = _encoder(name)
    refold.attach(encoder.body, method, trainable=(), example=torch.randn(1, 3, SIZE, SIZE))
    return encoder


def _views() -> tuple[Tensor, Tensor]:
    """(image, view) -> pixels, and a mask of each."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(COUNT, VIEWS, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, 3, (COUNT, VIEWS, SIZE, SIZE), generator=generator)


def _losses(model: Segmenter, cached: CachedEncoder | None, *, blank: bool = False) -> list[float]:
    """Losses of six steps, three epochs of two, in which the views alternate."""
    images, masks = _views()
    model.train()
    if cached is None:
        model.encoder.body.eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for epoch in range(3):
        view = epoch % VIEWS
        for batch in ([0, 1], [3, 2]):
            pixels, wanted = images[batch, view], masks[batch, view]
            if cached is None:
                outputs = model(pixels)
            else:
                # In the third epoch there are records of all: no pixel is looked at.
                unread = blank and epoch == 2
                given = torch.full((1,), torch.nan).expand_as(pixels) if unread else pixels
                with cached.serving([(k, view) for k in batch], blank=unread):
                    outputs = model(given)
            loss = segmentation_loss(outputs, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
    return found


class _Counted:
    """How many images a module saw."""

    def __init__(self, module: nn.Module) -> None:
        self.images = 0
        module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.images += len(args[0])


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", ["swin", "convnext", "tokens"])
@pytest.mark.parametrize(
    "method", [refold.E3VA(rank=3), refold.E3VA(rank=3, start="stem", skip=False, tap="stream"), refold.LinearProbe()]
)
def test_losses_are_those_without_a_cache(method, name, where, tmp_path):
    """DropPath of 0.5 in the backbone: without a cache it is in evaluation mode, with one in training mode."""
    plain = Segmenter(_adapted(name, method), "segformer", 3, width=32)
    model = copy.deepcopy(plain)
    cached = CachedEncoder(
        model.encoder, NAMES, SIZES, views=VIEWS, folder=tmp_path / "cache" if where == "disk" else None,
        dtype="float32",
    )  # fmt: skip
    counted = _Counted(model.encoder.body)
    found, expected = _losses(model, cached, blank=True), _losses(plain, None)
    assert counted.images == COUNT * VIEWS
    assert found == pytest.approx(expected, rel=2e-5)
    assert abs(expected[-1] - expected[0]) > 1e-2
    for (key, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=key)


def test_bfloat16_records_are_close():
    plain = Segmenter(_adapted("swin", refold.E3VA(rank=3)), "segformer", 3, width=32)
    model = copy.deepcopy(plain)
    found, expected = _losses(model, CachedEncoder(model.encoder, NAMES, SIZES, views=VIEWS)), _losses(plain, None)
    assert found != expected
    assert found == pytest.approx(expected, rel=1e-2)


def test_in_bfloat16_nothing_is_lost_but_in_the_records():
    """Under autocast some of what is read is float32 and some bfloat16; each is given back as it was."""
    encoder, images = _adapted("swin", refold.E3VA(rank=3)).eval(), _views()[0][:, 0]
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
    encoder = _adapted("swin", refold.E3VA(rank=3))
    _stir(encoder)
    plain = build_detector(
        "fcos", encoder, 2, preprocessing=PREPROCESSING, channels=64, min_size=SIZE, max_size=SIZE
    ).train()  # fmt: skip
    plain.encoder.body.eval()
    model = copy.deepcopy(plain).train()
    images = list(torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    cached = CachedEncoder(model.encoder, NAMES, SIZES, dtype="float32")
    counted = _Counted(model.encoder.body)
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
        refold.LST(),
        refold.DTL(),
        refold.VPT(),
        refold.SSF(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_change_the_backbone_are_refused(method):
    encoder = _adapted("swin", method)
    with pytest.raises(SiteError, match=f"{type(method).__name__} changes what the backbone computes"):
        estimate(encoder, SIZES)


@pytest.mark.parametrize("method", [refold.LayerNormTune(), refold.BitFit(), refold.FullFineTune(), None])
def test_a_backbone_that_trains_is_refused(method):
    encoder = _encoder("swin") if method is None else _adapted("swin", method)
    with pytest.raises(SiteError, match="it trains, and what the backbone computes changes with it"):
        Replay(encoder)


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(SiteError, match="map 0 is not what the adapters give here"):
        estimate(_adapted("doubled", refold.E3VA(rank=3)), SIZES)
    encoder = _adapted("swin", refold.E3VA(rank=3))
    with pytest.raises(DataError, match="63x64 is no multiple"):
        estimate(encoder, [(63, 64)])
    encoder.body.get_submodule("patch_embed").strict_img_size = True  # type: ignore[assignment]
    with pytest.raises(SiteError, match="its features of 96x64 images cannot be replayed: AssertionError"):
        estimate(encoder, [(96, 64)])
    assert estimate(_adapted("doubled", refold.LinearProbe()), SIZES).total


def test_other_adapters_than_when_it_was_made_are_refused():
    encoder, images = _adapted("swin", refold.E3VA(rank=3)), _views()[0][:, 0]
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
    encoder, images = _adapted("swin", refold.E3VA(rank=3)), _views()[0][:, 0]
    cached = CachedEncoder(encoder, NAMES, SIZES)
    with cached.serving([(0, 0)]):
        encoder(images[:1])
    _stir(encoder)  # its adapters
    with cached.serving([(0, 0)]):
        encoder(images[:1])
    encoder.body.load_state_dict(_encoder("swin").body.state_dict())
    with pytest.raises(DataError, match="the backbone was changed"), cached.serving([(0, 0)]):
        encoder(images[:1])


def test_a_compiled_wrapper_is_refused():
    encoder = _adapted("swin", refold.E3VA(rank=3))
    encoder.body = torch.compile(encoder.body)  # type: ignore[assignment]
    with pytest.raises(SiteError, match="it is a compiled wrapper"):
        estimate(encoder, SIZES)


def test_batches_that_are_not_what_was_announced_are_refused():
    encoder, images = _adapted("convnext", refold.LinearProbe()), _views()[0][:, 0]
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


# -- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of Swin under E3VA, with records of all."""
    path = tmp_path / "cache"
    encoder = _adapted("swin", refold.E3VA(rank=3))
    with CachedEncoder(encoder, NAMES, SIZES, folder=path, pixels={"seed": 0}).serving([(k, 0) for k in range(COUNT)]):
        encoder(_views()[0][:, 0])
    return path


def _open(folder: Path, encoder: Encoder | None = None, **changes: Any) -> CachedEncoder:
    arguments = {"images": NAMES, "sizes": SIZES, "pixels": {"seed": 0}, **changes}
    return CachedEncoder(encoder or _adapted("swin", refold.E3VA(rank=3)), folder=folder, **arguments)


def test_another_run_takes_records_up(folder):
    """Of another rank, which reads the same."""
    encoder = _adapted("swin", refold.E3VA(rank=5))
    cached = _open(folder, encoder)
    counted, keys = _Counted(encoder.body), [(2, 0), (0, 0)]
    with torch.no_grad(), cached.serving(keys, blank=True):
        found = encoder(torch.zeros(2, 3, SIZE, SIZE))
    assert counted.images == 0
    with torch.no_grad():
        expected = encoder.eval()(_views()[0][[2, 0], 0])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


def _one_weight(encoder: Encoder) -> None:
    parameter = next(p for p in encoder.body.parameters() if not p.requires_grad)
    parameter.data.view(-1)[1] *= 1.0001


def _many_weights(encoder: Encoder) -> None:
    encoder.body.get_parameter("layers_0.blocks.0.norm1.weight").data *= 2


def _setting(encoder: Encoder) -> None:
    attention: Any = encoder.body.get_submodule("layers_1.blocks.0.attn")
    attention.scale *= 9


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": [*NAMES[:2], "another", NAMES[3]]}, "image 2 has another content"),
        ({"images": NAMES[:3], "sizes": SIZES[:3]}, "4 images, not 3"),
        ({"sizes": [*SIZES[:3], (96, 96)]}, r"image 3 at \[64, 64\], not \[96, 96\]"),
        ({"pixels": {"seed": 1}}, "seed 0, not 1"),
        ({"pixels": {"seed": 0, "augment": "flip"}}, "augment None, not flip"),
        ({"views": 2}, "views 1, not 2"),
        ({"dtype": "float32"}, "dtype bfloat16, not float32"),
    ],
)
def test_a_stale_folder_is_refused(change, reason, folder):
    before = (folder / "features.bin").read_bytes()
    with pytest.raises(StoreError, match=f"its features are of something else: {reason}"):
        _open(folder, **change)
    assert (folder / "features.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_one_weight, "the backbone, whose weights differ a little"),
        (_many_weights, "the backbone, layers_0.blocks.0.norm1.weight has other values"),
        (_setting, "a backbone of the same weights that computes something else"),
    ],
)
def test_a_folder_of_another_backbone_is_refused(change, reason, folder):
    encoder = _adapted("swin", refold.E3VA(rank=3))
    change(encoder)
    with pytest.raises(StoreError, match=reason):
        _open(folder, encoder)


def test_a_folder_of_another_way_to_read_is_refused(folder):
    for method in (refold.E3VA(rank=3, tap="stream"), refold.E3VA(rank=3, start="stem"), refold.LinearProbe()):
        with pytest.raises(StoreError, match="its features are of something else: reads"):
            _open(folder, _adapted("swin", method))
    with pytest.raises(StoreError, match=r"precision torch\.float32, not autocast"), torch.autocast("cpu"):
        _open(folder)


def test_what_is_no_folder_of_features_is_refused(folder):
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "format": 2}))
    with pytest.raises(StoreError, match="is of format 2, not 1"):
        _open(folder)
    for content in ("", "[]", "{}", '{"format": 1}'):
        (folder / "header.json").write_text(content)
        with pytest.raises(StoreError, match="holds no features"):
            _open(folder)
    (folder / "header.json").write_text(json.dumps(header))
    with (folder / "features.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(StoreError, match="not as long as they were made"):
        _open(folder)


def test_a_damaged_record_is_made_again(folder):
    content = bytearray((folder / "features.bin").read_bytes())
    content[len(content) // COUNT + 7] ^= 1  # in the second record
    (folder / "features.bin").write_bytes(content)
    encoder = _adapted("swin", refold.E3VA(rank=3))
    cached, keys = _open(folder, encoder), [(k, 0) for k in range(COUNT)]
    assert cached.missing(keys) == [(1, 0)]
    counted = _Counted(encoder.body)
    with cached.serving(keys):
        encoder(_views()[0][:, 0])
    assert counted.images == 1
    content[len(content) // COUNT + 7] ^= 1
    assert (folder / "features.bin").read_bytes() == content


def test_an_image_is_known_by_its_content(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    a.write_bytes(b"one")
    shutil.copy(a, b)
    c.write_bytes(b"two")
    one, same, other = identify([a, b, c])
    assert one == same != other
    with pytest.raises(DataError, match="cannot be read"):
        identify([tmp_path / "none"])


# -- size ---------------------------------------------------------------------------------------------------------


def test_the_size_is_known_before_anything_is_written(tmp_path, monkeypatch):
    """Two taps a block and a read-out a stage, of (SIZE / stride)^2 tokens; the probe keeps the maps alone."""
    encoder = _adapted("swin", refold.E3VA(rank=3))
    stages = zip((1, 2, 1, 1), (16, 32, 64, 128), (4, 8, 16, 32), strict=True)
    each = sum((2 * depth + 1) * width * (SIZE // stride) ** 2 for depth, width, stride in stages)
    found = estimate(encoder, SIZES, views=3)
    assert (found.each, found.total) == (2 * each, 2 * each * COUNT * 3)
    assert estimate(encoder, SIZES, dtype="float32").each == 4 * each
    probe = estimate(_adapted("swin", refold.LinearProbe()), SIZES)
    assert probe.each == 2 * sum(w * (SIZE // s) ** 2 for w, s in zip((16, 32, 64, 128), (4, 8, 16, 32), strict=True))

    folder = tmp_path / "cache"
    space = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space._replace(free=found.total - 1))
    with pytest.raises(StoreError, match="are free"):
        _open(folder, encoder, views=3)
    monkeypatch.setattr(records_module, "free_memory", lambda: float(found.total - 1))
    with pytest.raises(DataError, match="of memory are free"):
        CachedEncoder(encoder, NAMES, SIZES, views=3)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space._replace(free=found.total))
    assert _open(folder, encoder, views=3).estimate == found
    assert (folder / "features.bin").stat().st_size == found.total
    assert (folder / "features.bin").stat().st_blocks * 512 >= found.total  # taken, not a file with a hole
    assert sorted(tmp_path.iterdir()) == [folder]
