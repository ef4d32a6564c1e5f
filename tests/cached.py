"""What the tests of cached features share: encoders whose every weight matters, their views, and six steps."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import refold
from refold.dense import Encoder
from refold.dense.cache import CachedEncoder
from refold.dense.stages import Features
from refold.preprocessing import Preprocessing
from refold.segmentation import Segmenter, segmentation_loss

SIZE, COUNT, VIEWS = 64, 4, 2
SIZES = [(SIZE, SIZE)] * COUNT
NAMES = [f"image {k}" for k in range(COUNT)]
PREPROCESSING = Preprocessing((SIZE, SIZE), (0.5,) * 3, (0.25,) * 3)


class Tokens(nn.Module):
    """A backbone that norms what it reads out, in (B, N, C), and gives channels last, like none of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = timm_swin()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in (16, 32, 64, 128))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [m.clone() for m in self.inner(x)]
        return [norm(m.flatten(1, 2)).view(m.shape) for norm, m in zip(self.norms, maps, strict=True)]


class Doubled(Tokens):
    """A backbone that makes of what it reads out what no layout and no norm does."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [2 * m for m in self.inner(x)]


def timm_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, img_size=SIZE, strict_img_size=False, window_size=4,
        depths=(1, 2, 1, 1), embed_dim=16, num_heads=(1, 2, 2, 4), drop_path_rate=0.5,
    )  # fmt: skip


def make_encoder(name: str) -> Encoder:
    """An encoder whose every weight matters."""
    torch.manual_seed(0)
    if name == "convnext":
        body: nn.Module = timm.create_model("test_convnext", features_only=True, drop_path_rate=0.5)
        channels: tuple[int, ...] = tuple(body.feature_info.channels())  # type: ignore[union-attr, operator]
    else:
        body = {"swin": timm_swin, "tokens": Tokens, "doubled": Doubled}[name]()
        channels = (16, 32, 64, 128)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Encoder(Features(body, channels, (4, 8, 16, 32), name != "convnext", None, PREPROCESSING))


def make_adapted(name: str, method: refold.Method) -> Encoder:
    encoder = make_encoder(name)
    refold.attach(encoder.body, method, trainable=(), example=torch.randn(1, 3, SIZE, SIZE))
    return encoder


def make_views() -> tuple[Tensor, Tensor]:
    """(image, view) -> pixels, and a mask of each."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(COUNT, VIEWS, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, 3, (COUNT, VIEWS, SIZE, SIZE), generator=generator)


def losses_of(model: Segmenter, cached: CachedEncoder | None, *, blank: bool = False) -> list[float]:
    """Losses of six steps, three epochs of two, in which the views alternate."""
    images, masks = make_views()
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


class Counted:
    """How many images a module saw."""

    def __init__(self, module: nn.Module) -> None:
        self.images = 0
        module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.images += len(args[0])
