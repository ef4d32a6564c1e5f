"""refold: train a tiny adapter on a pretrained vision backbone, then fold it into the backbone's own weights.

    model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=37)
    refold.attach(model, refold.RepAdapter(rank=8))
    ...  # train as usual
    refold.merge(model)  # the original architecture, nothing added

Importing refold needs torch alone; ``train``, ``predict`` and everything that needs more is imported on use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from refold.attachment import (
    activate,
    attach,
    detach,
    disabled,
    param_groups,
    trainable_parameters,
)
from refold.combination import combine
from refold.errors import (
    BackboneError,
    DataError,
    MergeError,
    MissingExtraError,
    RefoldError,
    SiteError,
    StoreError,
)
from refold.hub import push_to_hub
from refold.inspection import describe, explain
from refold.interpolation import interpolate
from refold.merging import merge, switch, unmerge
from refold.methods import METHODS, Compose, Method
from refold.methods.shelf import *  # noqa: F403 (every method by its name)
from refold.peft_format import load_peft, save_peft
from refold.preprocessing import Preprocessing
from refold.store import from_pretrained, load, save

if TYPE_CHECKING:
    from refold.sweeps import run_sweep as sweep
    from refold.training import evaluate, predict, train

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BackboneError",
    "Compose",
    "DataError",
    "MergeError",
    "Method",
    "MissingExtraError",
    "Preprocessing",
    "RefoldError",
    "SiteError",
    "StoreError",
    "__version__",
    "activate",
    "attach",
    "combine",
    "describe",
    "detach",
    "disabled",
    "evaluate",
    "explain",
    "from_pretrained",
    "interpolate",
    "load",
    "load_peft",
    "merge",
    "param_groups",
    "predict",
    "push_to_hub",
    "save",
    "save_peft",
    "sweep",
    "switch",
    "train",
    "trainable_parameters",
    "unmerge",
]
__all__ += METHODS  # pyright: ignore[reportUnsupportedDunderAll]

_LAZY = {
    "train": ("refold.training", "train"),
    "evaluate": ("refold.training", "evaluate"),
    "predict": ("refold.training", "predict"),
    "sweep": ("refold.sweeps", "run_sweep"),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'refold' has no attribute {name!r}")
