"""Two processes on the CPU, as ``accelerate launch`` starts them, and what it tells them of FSDP2."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

__all__ = ["LAUNCH", "learns", "looks", "spawn", "told"]

#: What ``accelerate launch --use_fsdp --fsdp_version 2`` puts into the environment.
LAUNCH = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true",
}  # fmt: skip


def spawn(*runs: Callable[[int], None]) -> None:
    """Call each with the rank, in one pair of processes: starting them takes longer than what they do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(_work, (port, runs), nprocs=2)


def _work(rank: int, port: int, runs: tuple[Callable[[int], None], ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    try:
        for run in runs:
            run(rank)
        if dist.is_initialized():
            dist.barrier()  # a process that leaves while the other one still exchanges may abort
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def told(**settings: str) -> Iterator[None]:
    """Inside, the launch was told of FSDP2; names are those of the environment."""
    os.environ.update({**LAUNCH, **settings})
    try:
        yield
    finally:
        for name in (*LAUNCH, *settings):
            del os.environ[name]


def looks(model: nn.Module) -> list[Any]:
    """All that must be as before: classes, attributes, hooks, the parameters' identities and values."""
    return [
        (
            path, type(module), sorted(module.__dict__),
            [(name, id(parameter), contents(parameter)) for name, parameter in module._parameters.items()],
            list(module._forward_pre_hooks), list(module._forward_pre_hooks_with_kwargs), list(module._forward_hooks),
            list(module._state_dict_pre_hooks), list(module._load_state_dict_pre_hooks),
        )
        for path, module in model.named_modules()
    ]  # fmt: skip


def contents(parameter: nn.Parameter | None) -> bytes | None:
    return None if parameter is None else parameter.detach().numpy().tobytes()


def learns(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of what trains, which are left at None."""
    model(x).square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in trained if parameter.grad is not None]
    assert len(gradients) == len(trained)
    model.zero_grad(set_to_none=True)
    return gradients
