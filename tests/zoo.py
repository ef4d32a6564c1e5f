"""Small members of the backbone families refold promises to support, with weights that hide nothing.

Freshly built models have zero biases, unit norms and layer scales near zero, under which a misplaced shift or a
forgotten norm changes nothing. ``build`` fills every parameter and statistic with values that matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn

__all__ = ["CLASSES", "FAMILIES", "build", "images", "perturb", "relative"]

CLASSES = 3

vit = partial(VisionTransformer, img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=CLASSES)


class OpenClipClassifier(nn.Module):
    """open_clip's image tower with a linear head, as users put it together."""

    def __init__(self) -> None:
        from open_clip.transformer import VisionTransformer as Tower  # slow to import, and only needed here

        super().__init__()
        self.visual = Tower(image_size=32, patch_size=16, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.visual(x))


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        depths=(1, 2),
        embed_dim=16,
        num_heads=(1, 2),
        num_classes=CLASSES,
    )


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer as Torchvision

    return Torchvision(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASSES
    )


def named(name: str, **options: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=CLASSES, **options)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "vit_without_class_token": partial(vit, class_token=False, global_pool="avg"),
    "vit_with_registers": partial(vit, reg_tokens=4),
    "vit_without_qkv_bias": partial(vit, qkv_bias=False),
    "vit_with_layer_scale": partial(vit, init_values=0.5),
    "vit_one_channel": partial(vit, in_chans=1),
    "vit_five_channels": partial(vit, in_chans=5),
    "vit_swiglu": partial(vit, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU),
    "timm_clip_tower": partial(vit, pre_norm=True, norm_layer=partial(nn.LayerNorm, eps=1e-5)),
    "open_clip_tower": OpenClipClassifier,
    "torchvision_vit": torchvision_vit,
    "timm_test_vit2": named("test_vit2", img_size=32, depth=2),
    "timm_test_vit3": named("test_vit3", img_size=32, depth=2),
    "timm_test_vit4": named("test_vit4", img_size=32, depth=2),
    "swin": swin,
    "convnext": named("test_convnext", depths=(1, 1, 1, 1)),
    "convnext_conv_mlp": named("test_convnext", depths=(1, 1, 1, 1), conv_mlp=True),
    "efficientnet": named("test_efficientnet"),
    "resnet": named("test_resnet"),
    "byobnet": named("test_byobnet"),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of the family at evaluation, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(family))
        model = FAMILIES[family]().eval()
        with torch.no_grad():
            for name, value in (*model.named_parameters(), *model.named_buffers()):
                if not value.is_floating_point():
                    continue
                if name.endswith("running_var"):
                    value.uniform_(0.5, 1.5)
                elif name.endswith("gamma"):  # layer scale
                    value.uniform_(0.2, 0.6)
                elif value.dim() <= 1 or not bool(value.any()):  # torchvision's heads are zero
                    value.add_(0.2 * torch.randn_like(value))
    return model.to(dtype)


def images(model: nn.Module, count: int = 2, seed: int = 0) -> torch.Tensor:
    """Random images (count, channels, 32, 32) in the model's dtype."""
    convolution = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, convolution.in_channels, 32, 32, generator=generator, dtype=torch.float64)
    return noise.to(next(model.parameters()).dtype)


@torch.no_grad()
def perturb(parameters: dict[str, nn.Parameter], size: float = 0.05) -> None:
    """Move parameters away from their start, as training would."""
    for parameter in parameters.values():
        parameter.add_(size * torch.randn_like(parameter))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    found, expected = found.double(), expected.double()
    return float((found - expected).detach().norm() / expected.detach().norm())
