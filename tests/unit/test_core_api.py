"""The public surface: names, signatures, and what importing costs."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import refold

NAMES = {
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
}

REQUIRED = inspect.Parameter.empty
#: The frozen part of each signature: name -> default, keyword-only after "*".
SIGNATURES = {
    "attach": (
        {"model": REQUIRED, "method": REQUIRED},
        {"name": "default", "example": None, "trainable": None, "allow_new_bias": False, "strict": False},
    ),
    "detach": ({"model": REQUIRED}, {}),
    "disabled": ({"model": REQUIRED}, {}),
    "merge": ({"model": REQUIRED}, {"check": True, "keep_base": True}),
    "unmerge": ({"model": REQUIRED}, {}),
    "switch": ({"model": REQUIRED, "name": REQUIRED}, {}),
    "combine": ({"model": REQUIRED, "weights": REQUIRED}, {"name": "combined", "head": None}),
    "activate": ({"model": REQUIRED, "name": REQUIRED}, {}),
    "explain": ({"model": REQUIRED}, {}),
    "save": ({"model": REQUIRED, "path": REQUIRED}, {"name": None}),
    "push_to_hub": ({"model": REQUIRED, "repo_id": REQUIRED}, {"name": None, "private": None, "token": None}),
    "load": ({"model": REQUIRED, "source": REQUIRED}, {"name": None}),
    "from_pretrained": ({"source": REQUIRED}, {}),
    "trainable_parameters": ({"model": REQUIRED}, {}),
    "param_groups": ({"model": REQUIRED, "lr": 1e-3, "head_lr": None, "weight_decay": 1e-4}, {}),
}

METHODS = {
    "RepAdapter": {
        "rank": 8,
        "groups": 2,
        "scale": 1.0,
        "dropout": 0.1,
        "sites": None,
        "position": "before",
        "activation": "identity",
    },
    "LoRA": {"rank": 8, "scale": 1.0, "dropout": 0.0, "sites": None, "rows": None, "overrides": ()},
    "DoRA": {"rank": 8, "scale": 1.0, "dropout": 0.0, "sites": None, "rows": None, "overrides": ()},
    "OFT": {"block": 32, "sites": None},
    "FacT": {"rank": 16, "form": "tk", "scale": 1.0, "dropout": 0.1, "sites": None},
    "Hydra": {"rank": 2, "scale": 1.0, "dropout": 0.2, "sites": None},
    "KronA": {"size": None, "scale": 1.0, "form": "weight", "sites": None},
    "KAdaptation": {"rank": 32, "scale": 160.0, "sites": None},
    "ARC": {"rank": 50, "dropout": 0.1, "sites": None},
    "RLRR": {"ssf": True, "sites": None},
    "GLoRA": {"rank": 4, "a": "lora", "b": "lora", "c": "lora", "d": "vector", "e": "vector", "sites": None},
    "PACE": {"rank": 10, "sites": None},
    "SSF": {"sites": None},
    "Adapter": {
        "variant": "pfeiffer",
        "hidden": 8,
        "activation": None,
        "dropout": None,
        "sites": None,
        "overrides": (),
    },
    "AdaptFormer": {"hidden": 8, "scale": 0.1, "dropout": 0.1, "activation": "relu", "sites": None, "overrides": ()},
    "Unified": {
        "hidden": 8,
        "scale": 4.0,
        "position": "parallel",
        "representation": "branch",
        "reads": "normed",
        "composition": "add",
        "activation": "relu",
        "dropout": 0.0,
        "sites": None,
    },
    "LoRand": {"rank": 8, "branches": 2, "sites": None},
    "Mona": {"hidden": 64, "dropout": 0.1, "sites": None},
    "Convpass": {
        "hidden": 8,
        "scale": 1.0,
        "dropout": 0.1,
        "activation": "quick_gelu",
        "start": "identity",
        "sites": None,
    },
    "STAdapter": {"hidden": 384, "frames": 8, "activation": "identity", "sites": None},
    "VPT": {"tokens": 10, "deep": True, "dropout": 0.0, "sites": None, "overrides": ()},
    "ConvAdapter": {"reduction": 4, "activation": "relu", "position": "conv_parallel", "sites": None},
    "DTL": {"rank": 2, "beta": 100.0, "start": None, "plus": False, "sites": None},
    "LST": {"reduction": 8, "sites": None},
    "E3VA": {
        "rank": 16,
        "reduction": 2,
        "start": "zero",
        "skip": True,
        "tap": "branch",
        "recompute": "inside",
        "sites": None,
    },
    "ProTuning": {"hidden": 64, "activation": "gelu", "sites": None},
    "SPM": {"hidden": 64, "classes": 32, "steps": 2, "sites": None},
    "LVAdapter": {"hidden": 64, "prompts": 16, "text_width": 512, "sites": None},
    "BitFit": {},
    "LayerNormTune": {},
    "Partial": {"blocks": 1},
    "LinearProbe": {},
    "FullFineTune": {},
}


def test_the_names_are_these():
    assert set(refold.__all__) == NAMES | METHODS.keys()
    assert all(hasattr(refold, name) for name in NAMES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_are_those_of_the_design(name):
    positional, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(refold, name)).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert found == positional
    only = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {n: only.get(n, "absent") for n in keywords} == keywords
    assert all(p.default is not REQUIRED for p in parameters if p.name not in positional)
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def test_the_methods_and_their_defaults_are_those_of_the_papers():
    assert {n: {f.name: f.default for f in dataclasses.fields(m)} for n, m in refold.METHODS.items()} == METHODS
    for name, method in refold.METHODS.items():
        assert method is getattr(refold, name)
        assert method.summary
        assert method.paper
        assert method() == method.from_json(method().to_json())
        with pytest.raises(dataclasses.FrozenInstanceError):
            method().rank = 3


def test_methods_print_what_differs_from_the_default():
    assert refold.RepAdapter().describe() == "RepAdapter()"
    assert refold.RepAdapter(rank=4, sites="mlp").describe() == "RepAdapter(rank=4, sites='mlp')"


def test_every_public_name_says_what_it_is():
    names = (NAMES | METHODS.keys()) - {"METHODS", "__version__"}
    undocumented = [name for name in names if not inspect.getdoc(getattr(refold, name))]
    assert not undocumented


def test_unknown_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'refold' has no attribute 'nothing'"):
        _ = refold.nothing


PROGRAM = """
import sys
import torch
before = set(sys.modules)
import refold
new = set(sys.modules) - before
print(*sorted({name.partition(".")[0] for name in new} - sys.stdlib_module_names - {"refold", "torch", "safetensors"}))
print(*sorted({"torch._dynamo", "torch._inductor", "torch.onnx"} & new))
"""


def test_importing_needs_torch_alone_and_not_its_compilers():
    """What makes an import slow: other packages, and the large parts of torch that it leaves out itself."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_attaching_does_not_load_the_compiler():
    """The compiler takes seconds to import, and a plain model has no use for it."""
    program = (
        "import sys, torch, refold; from torch import nn; m = nn.Sequential(nn.Linear(8, 8)); "
        "refold.attach(m, refold.RepAdapter(), example=torch.ones(1, 8), trainable=()); refold.merge(m); "
        "refold.detach(m); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
