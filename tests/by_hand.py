"""A small ViT with adapters that moved, its tensors for the formulas in ``reference.side``, and what it computes."""

from __future__ import annotations

from functools import partial

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import refold
from reference import side
from refold.hosting import adapters_of
from refold.state import state_of
from zoo import perturb

__all__ = ["HEADS", "adapted", "counted", "large", "numbers", "vit"]

HEADS = 2
#: A grid of 3 x 5 patches, so that rows and columns cannot be exchanged unseen.
_vit = partial(
    VisionTransformer, img_size=(24, 40), patch_size=8, embed_dim=12, depth=2, num_heads=HEADS, num_classes=3
)


def vit(*, layer_scale: bool, **options: object) -> tuple[nn.Module, torch.Tensor]:
    """The model at evaluation in float64, every tensor away from its start, and images for it."""
    torch.manual_seed(0)
    model = _vit(init_values=0.5 if layer_scale else None, **options).double().eval()
    perturb(dict(model.named_parameters()), 0.2)
    return model, torch.randn(2, 3, 24, 40, dtype=torch.float64)


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy().copy() for name, value in module.state_dict().items()}


def adapted(
    method: refold.Method, *, layer_scale: bool, size: float = 0.3, **options: object
) -> tuple[nn.Module, torch.Tensor, dict[tuple[int, str], dict[str, np.ndarray]], partial[np.ndarray]]:
    """The model with the method, images, its adapters' tensors by block and role, and the same ViT by hand."""
    model, x = vit(layer_scale=layer_scale, **options)
    plain = numbers(model)
    refold.attach(model, method)
    head = {name for name in refold.trainable_parameters(model) if name.startswith("head.")}
    perturb({n: p for n, p in refold.trainable_parameters(model).items() if n not in head}, size)
    sites = state_of(model).record().sites
    found = adapters_of(model, sites, "default")
    tensors = {(int(site.path.split(".")[1]), site.role): numbers(found[site.key]) for site in sites}
    return model, x, tensors, partial(side.vit, plain, x.numpy(), HEADS)


def large(name: str, **options: object) -> nn.Module:
    """A real architecture of timm's without its classifier; left at zero, because only shapes matter."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **options)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    return model


def counted(model: nn.Module, method: refold.Method) -> int:
    """Trainable values beside the head, as ``explain`` says and as they are."""
    refold.attach(model, method)
    count = sum(p.numel() for p in refold.trainable_parameters(model).values())
    assert refold.explain(model).adapter_parameters == count
    return count
