"""Two threads in one model: what adapters note of a forward is one thread's; folds that note nothing serve both."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn

import refold
from refold.errors import SiteError


class Attention(nn.Module):
    """``nn.MultiheadAttention`` reads its projections' weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(x, x, x)[0])


def vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=3, img_size=32)


def adapted(model: nn.Module, method: refold.Method, *shape: int) -> nn.Module:
    refold.attach(model, method, trainable=(), example=torch.randn(*shape)).eval()
    with torch.no_grad():
        for parameter in refold.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter))
    return model.requires_grad_(False)


@contextmanager
def held(model: nn.Module, inside: nn.Module, x: Tensor) -> Iterator[None]:
    """Another thread is in a forward of ``model`` until the block ends, which checks its output."""
    expected = model(x)
    there, go = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        there.set()
        assert go.wait(60)

    with ThreadPoolExecutor(1) as pool:
        handle = inside.register_forward_pre_hook(wait)
        running = pool.submit(model, x)
        assert there.wait(60)
        handle.remove()
        try:
            yield
        finally:
            go.set()
        assert torch.equal(running.result(), expected)


IMAGE = (1, 3, 32, 32)
CASES = [
    (vit, refold.AdaptFormer(), "blocks.0.mlp.fc1", IMAGE),
    (vit, refold.VPT(), "blocks.1.norm1", IMAGE),
    (vit, refold.E3VA(), "blocks.1.norm1", IMAGE),
    (Attention, refold.LoRA(sites=("attention.out_proj",)), "attention", (1, 4, 8)),
]


@pytest.mark.parametrize(("build", "method", "inside", "shape"), CASES, ids=["AdaptFormer", "VPT", "E3VA", "shadow"])
def test_a_second_thread_is_refused(build, method: refold.Method, inside: str, shape: tuple[int, ...]) -> None:
    model = adapted(build(), method, *shape)
    x, y = torch.randn(2, *shape)
    expected = model(y)
    with held(model, model.get_submodule(inside), x):
        with pytest.raises(SiteError, match=r"another thread.*Merge the adapter.*deepcopy"):
            model(y)
        assert torch.equal(copy.deepcopy(model)(y), expected)
    assert torch.equal(model(y), expected)  # whoever comes next
    refold.detach(model)
    assert not any(name.startswith("_refold") for module in model.modules() for name in vars(module))


def test_after_an_error_the_turn_is_free() -> None:
    model = adapted(vit(), refold.AdaptFormer(), *IMAGE)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="channels"):
        pool.submit(model, torch.randn(1, 1, 32, 32)).result()
    model(torch.randn(*IMAGE))


def test_folds_on_activations_serve_two_threads() -> None:
    model = adapted(vit(), refold.LoRA(), *IMAGE)
    x, y = torch.randn(2, *IMAGE)
    expected = model(y)
    with held(model, model.get_submodule("blocks.0.mlp.fc1"), x):
        assert torch.equal(model(y), expected)
