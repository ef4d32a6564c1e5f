"""FSDP2: what launches are taken, and two processes with a part of the frozen weights each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import refold
from dense_runs import settings
from launched import LAUNCH, learns, looks, spawn, told
from refold.errors import DataError, RefoldError
from refold.training import train
from refold.training.inference import start_accelerator
from refold.training.precision import reduced_precision
from refold.training.sharding import read_launch, sharded

BLOCKS = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
METHODS = [refold.LoRA(rank=4), refold.FacT(rank=4, dropout=0.0)]


# -- the launch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "reason", "remedy"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED is not supported", "--fsdp_version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM is not supported", "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1 is not supported", "Add --fsdp_version 2"),
        ({**LAUNCH, "FSDP_VERSION": "1"}, "FSDP1 is not supported", "Add --fsdp_version 2"),
        ({**LAUNCH, "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params: is not supported", "Leave it out"),
        (
            {**LAUNCH, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "--fsdp_activation_checkpointing: is not",
            "Leave it out",
        ),
        ({**LAUNCH, "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "invalid truth value full_shard", ""),
    ],
)
def test_other_ways_to_divide_a_model_are_refused(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], reason: str, remedy: str
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    for start in (read_launch, start_accelerator):
        with pytest.raises(RefoldError, match=reason) as caught:
            start()
        assert remedy in (caught.value.remedy or "")


def test_accelerate_and_transformers_hear_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one would divide the model as well, and the other load weights on one process alone."""
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    assert str(start_accelerator().distributed_type) == "DistributedType.NO"
    assert {name: os.environ[name] for name in LAUNCH} == {**LAUNCH, "FSDP_CPU_RAM_EFFICIENT_LOADING": "False"}


def test_cached_features_leave_nothing_to_divide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=r"features: no training step runs the backbone.*launch without FSDP"):
        train(settings(tmp_path / "none", tmp_path / "run", features="memory"))
    assert not (tmp_path / "run").exists()


# -- two processes ----------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """A weight that lies in two blocks, a frozen scalar, and one of odd length."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).relu()).relu()) * self.temperature


def vit(method: refold.Method) -> nn.Module:
    torch.manual_seed(0)
    model = refold.attach(timm.create_model("test_vit", num_classes=3, img_size=32), method)
    with torch.no_grad():
        for parameter in refold.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def halves() -> nn.Module:
    torch.manual_seed(0)
    model = Halves().requires_grad_(False)
    model.last.bias.requires_grad_(True)
    return model


def divided_and_whole_again(rank: int) -> None:
    """Twice, and after an error: half of the numbers inside, the same gradients to the bit, no trace afterwards."""
    with told():
        accelerator = start_accelerator()
    cases: list[tuple[dict[str, str], refold.Method]] = [({}, refold.RepAdapter(rank=4, dropout=0.0))]
    for launch, method in cases + [(BLOCKS, method) for method in METHODS]:
        model = vit(method)
        wrapped = DistributedDataParallel(model, static_graph=True)
        x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        expected, before = learns(wrapped, x), looks(model)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        with told(**launch):
            for _ in range(2):
                with sharded(model, accelerator):
                    inside: dict[str, Any] = dict(model.named_parameters())
                    assert {name for name, p in inside.items() if isinstance(p, DTensor)} == frozen.keys()
                    assert all(len(inside[name].to_local()) <= -(-len(p) // 2) for name, p in frozen.items())
                    for found, one in zip(learns(wrapped, x), expected, strict=True):
                        assert torch.equal(found, one), method
                assert looks(model) == before
            with pytest.raises(RuntimeError, match="channels"), sharded(model, accelerator):
                model(x[:, :1])
        assert looks(model) == before
        refold.merge(model)


def what_stays_whole(rank: int) -> None:
    """Weights of several places, scalars, and what trains; in bfloat16, and as float32 afterwards."""
    accelerator = start_accelerator()
    model = halves()
    before = looks(model)
    x = torch.randn(2, 6)
    with told():
        with reduced_precision(model), torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
            with sharded(model, accelerator):
                inside = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
                assert inside == {"first.bias", "second.bias", "last.weight"}
                assert torch.equal(model(x), expected)
        assert looks(model) == before
        model.requires_grad_(True)
        with pytest.raises(RefoldError, match="no weight is frozen"), sharded(model, accelerator):
            pass


def what_is_refused(rank: int) -> None:
    accelerator = start_accelerator()
    for launch, reason in (
        ({**BLOCKS, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Layer"}, "Could not find the transformer layer class Layer"),
        ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}, "no module is a block"),
        ({**BLOCKS, "FSDP_TRANSFORMER_CLS_TO_WRAP": "ModuleList"}, "torch cannot divide it"),
    ):
        model = nn.Sequential(nn.Linear(3, 3), nn.ModuleList([nn.Linear(2, 2)])).requires_grad_(False)
        before = looks(model)
        with told(**launch), pytest.raises(RefoldError, match=reason) as caught, sharded(model, accelerator):
            pass
        assert "--fsdp_transformer_layer_cls_to_wrap" in (caught.value.remedy or "")
        assert looks(model) == before


def test_two_processes_share_the_frozen_weights() -> None:
    spawn(divided_and_whole_again, what_stays_whole, what_is_refused)
