"""FSDP2 under every method: two processes compute, to the bit, what they compute with whole weights."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import refold
from dense_runs import settings
from launched import learns, looks, spawn, told
from refold.dense.shapes import shapes
from refold.training import train
from refold.training.inference import start_accelerator
from refold.training.sharding import sharded
from zoo import build, images, perturb

sys.path.append(str(Path(__file__).parents[1] / "contract"))
from test_contract_methods import METHODS

pytestmark = pytest.mark.slow

#: What is divided apart, by family.
BLOCKS = {
    "vit": "Block", "torchvision_vit": "EncoderBlock", "open_clip_tower": "ResidualAttentionBlock",
    "swin": "SwinTransformerBlock", "convnext": "ConvNeXtBlock",
}  # fmt: skip
MORE = {
    "Compose": refold.Compose([refold.VPT(tokens=3), refold.LoRA()]),
}


def every_method(rank: int) -> None:
    """Also two in one, and parameters that blocks share."""
    accelerator = start_accelerator()
    skipped = []
    for family, block in BLOCKS.items():
        for name, method in {**METHODS, **MORE}.items():
            if name == "FullFineTune":  # leaves nothing frozen
                continue
            torch.manual_seed(0)
            model = build(family)
            x = images(model, count=2, seed=rank)
            try:
                refold.attach(model, method)
            except refold.SiteError:
                skipped.append((family, name))
                continue
            perturb(refold.trainable_parameters(model))
            wrapped = DistributedDataParallel(model, static_graph=True)
            expected, before = learns(wrapped, x), looks(model)
            settings = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": block}
            try:
                with told(**settings), sharded(model, accelerator):
                    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
                    for found, one in zip(learns(wrapped, x), expected, strict=True):
                        assert torch.equal(found, one)
                assert looks(model) == before
            except Exception as error:
                error.add_note(f"{family}, {name}")
                raise
    assert len(skipped) < 10, skipped


def a_second_forward_in_the_backward_pass(rank: int) -> None:
    """It finds the weights if they are gathered all at once; of blocks they are gone, which is refused."""
    accelerator = start_accelerator()
    model = refold.attach(build("swin"), refold.E3VA(rank=4, recompute="taps"))
    perturb(refold.trainable_parameters(model))
    x, before = images(model, seed=rank), looks(model)
    expected = learns(model, x)
    with told(), sharded(model, accelerator):
        for found, one in zip(learns(model, x), expected, strict=True):
            assert torch.equal(found, one)
    assert looks(model) == before
    with (
        told(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="SwinTransformerBlock"),
        pytest.raises(refold.SiteError, match="use recompute='inside'"),
        sharded(model, accelerator),
    ):
        learns(model, x)
    assert looks(model) == before


def dense_tasks(rank: int, data: Path, folder: Path) -> None:
    """Whole runs: decoders with batch statistics, detectors with losses of their own, images of different sizes."""
    for name, changes in DENSE.items():
        config = settings(data, folder / f"{name}-ddp", batch_size=4, epochs=2, **changes)
        whole = train(config)
        with told(FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP="ConvNeXtBlock"):
            divided = train(config, output=str(folder / f"{name}-fsdp"))
        assert divided.metrics == whole.metrics, name
        if rank == 0:
            assert divided.adapter.read_bytes() == whole.adapter.read_bytes(), name
        assert not any(isinstance(parameter, DTensor) for parameter in divided.model.parameters())


DENSE: dict[str, dict[str, Any]] = {
    "segment": {"decoder": "upernet", "method": refold.RepAdapter(rank=4)},
    "detect": {"task": "detect", "decoder": "fcos", "method": refold.LoRA(rank=4), "lr": 1e-3},
}


def test_dense_tasks(tmp_path: Path) -> None:
    data = shapes(tmp_path / "data", counts=(6, 3, 3), side=64).root
    spawn(partial(dense_tasks, data=data, folder=tmp_path))


def test_every_method() -> None:
    spawn(every_method, a_second_forward_in_the_backward_pass)
