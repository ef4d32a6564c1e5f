"""Two processes on the CPU: DistributedDataParallel and FSDP2 train adapters; nothing folds a part of a weight."""

from __future__ import annotations

import itertools
import socket
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import refold
from refold.perturbation import Noise
from refold.training.consistency import Consistency
from zoo import build, images, perturb

pytestmark = pytest.mark.slow

FAMILIES = ["vit", "swin", "convnext", "open_clip_tower"]
METHODS = [refold.RepAdapter(rank=4, dropout=0.0), refold.LoRA(rank=4), refold.SSF()]
PROCESSES = 2


def trained(family: str, method: refold.Method) -> nn.Module:
    torch.manual_seed(0)
    model = refold.attach(build(family), method)
    perturb(refold.trainable_parameters(model))
    return model


def step(model: nn.Module, run: nn.Module, x: torch.Tensor) -> torch.Tensor:
    optimizer = torch.optim.SGD(refold.param_groups(model, lr=0.1))
    output = run(x)
    output.pow(2).mean().backward()
    optimizer.step()
    return output.detach()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def distributed_data_parallel(rank: int, family: str, method: refold.Method, folder: Path) -> None:
    alone, model = trained(family, method), trained(family, method)
    x = images(model, count=2 * PROCESSES)
    mine = x[2 * rank : 2 * rank + 2]
    wrapper = DistributedDataParallel(model)
    expected = step(alone, alone, x)
    close(step(model, wrapper, mine), expected[2 * rank : 2 * rank + 2])
    for name, value in refold.trainable_parameters(alone).items():
        close(model.get_parameter(name), value)
    for call in (refold.merge, refold.detach, lambda m: refold.attach(m, method, name="late")):
        with pytest.raises(refold.SiteError, match=r"through DistributedDataParallel.*model\.module"):
            call(wrapper)
    after = model(x).detach()
    assert refold.merge(model).rel_l2 < 1e-5
    with torch.no_grad():
        close(wrapper(mine), after[2 * rank : 2 * rank + 2])


def fully_sharded(rank: int, family: str, method: refold.Method, folder: Path) -> None:
    alone, model = trained(family, method), trained(family, method)
    x = images(model, count=2 * PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in model.modules():
        if type(module).__name__ in ("Block", "SwinTransformerBlock", "ConvNeXtBlock", "ResidualAttentionBlock"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    expected = step(alone, alone, x)
    close(step(model, model, x[2 * rank : 2 * rank + 2]), expected[2 * rank : 2 * rank + 2])

    path = folder / f"{rank}.safetensors"
    calls = [
        refold.merge,
        refold.detach,
        lambda m: refold.save(m, path),
        lambda m: refold.activate(m, "default"),
        lambda m: refold.attach(m, method, name="late"),
    ]
    for call in calls:
        with pytest.raises(refold.SiteError, match=r"sharded over processes.*get_model_state_dict"):
            call(model)
    assert refold.explain(model).state == "attached"

    # What the error says to do.
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        gathered = refold.attach(build(family), method)
        gathered.load_state_dict(whole, strict=True)
        close(gathered(x), alone(x))
        close(refold.load(build(family), refold.save(gathered, path))(x), alone(x))
        assert refold.merge(gathered).rel_l2 < 1e-5


def two_noisy_passes(rank: int, family: str, method: refold.Method, folder: Path) -> None:
    """PACE's two passes before one backward: gradients are exchanged once, and are those of both passes."""
    alone, model = trained(family, method), trained(family, method)
    mine = images(model, count=2 * PROCESSES)[2 * rank : 2 * rank + 2]
    wrapper = DistributedDataParallel(model)
    for inside, run, first_alone in ((alone, alone, nullcontext()), (model, wrapper, wrapper.no_sync())):
        consistency = Consistency(0.5, Noise(0.5, torch.device("cpu")), inside)
        consistency.start(rank)
        with consistency.step():
            first, second = consistency.passes(lambda run=run: run(mine), first_alone)
            (first.pow(2).mean() + consistency.penalty(first, second)).backward()
    for name, value in refold.trainable_parameters(alone).items():
        expected = value.grad.clone()
        dist.all_reduce(expected)
        torch.testing.assert_close(model.get_parameter(name).grad, expected / PROCESSES, rtol=1e-3, atol=1e-5)


def work(rank: int, port: int, case: str, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=PROCESSES)
    try:
        run, families, methods = CASES[case]
        for family, method in itertools.product(families, methods):
            try:
                run(rank, family, method, Path(folder))
            except Exception as error:
                error.add_note(f"{family}, {method}")
                raise
            dist.barrier()
    finally:
        dist.destroy_process_group()


ROWS = [refold.DTL(start=1), refold.LST(reduction=2)]
CASES = {
    "DDP": (distributed_data_parallel, FAMILIES, METHODS),
    "DDP, two passes": (two_noisy_passes, FAMILIES[:3], [*METHODS[:2], *ROWS]),
    "FSDP2": (fully_sharded, FAMILIES, METHODS),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree_with_one(case: str) -> None:
    """Every family and method in one pair of processes: starting them takes longer than what they do."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        mp.spawn(work, (port, case, folder), nprocs=PROCESSES)
