"""Forward passes over a whole image set, shared by validation, evaluation and prediction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from refold.preprocessing import Preprocessing
from refold.training.progress import counting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from refold.data import ImageSet

Batches = Iterable[tuple[Tensor, Tensor]]

__all__ = ["Batches", "autocast", "compute_logits", "evaluation_loader", "in_evaluation", "start_accelerator"]


def start_accelerator() -> Accelerator:
    """The processes and the device that ``accelerate launch`` set up; one process without it.

    Mixed precision stays with refold, which holds frozen weights in bfloat16 itself, and so does FSDP2, see
    :mod:`refold.training.sharding`.

    Raises:
        RefoldError: another Accelerator with mixed precision or FSDP is alive in this process, or the launcher shall
            divide the model in a way that is not supported.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

    from refold.errors import RefoldError
    from refold.training.sharding import hidden_launch

    remedy = "Create no other Accelerator in this process, or one with mixed_precision='no' and without FSDP"
    try:
        with hidden_launch():
            accelerator = Accelerator(
                mixed_precision="no",
                # Without it, processes on CPUs alone would not find each other.
                cpu=not torch.accelerator.is_available(),
                # The graph of a step never changes; parts of the backbone that it does not reach are no error.
                kwargs_handlers=[DistributedDataParallelKwargs(static_graph=True)],
            )
    except ValueError as error:
        raise RefoldError(f"accelerate cannot start ({error})", remedy=remedy) from error
    if accelerator.distributed_type == DistributedType.FSDP:
        raise RefoldError("another Accelerator divides models with FSDP", remedy=remedy)
    return accelerator


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext[None]:
    """Autocast to bfloat16 for ``"bf16"``, nothing for ``"fp32"``."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside; every module's own mode outside, also on errors."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluation_loader(
    image_set: ImageSet,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int = 0,
) -> Batches:
    """This process's share of ``image_set``: every world-th image from its rank on, in order."""
    from refold.data import Loader
    from refold.data.streams import StreamLoader, StreamSet

    rank, world = accelerator.process_index, accelerator.num_processes
    if isinstance(image_set, StreamSet):
        return StreamLoader(
            image_set, preprocessing, batch_size=batch_size * world, workers=workers, rank=rank, world=world
        )  # fmt: skip
    part = image_set.subset(range(rank, len(image_set), world)) if world > 1 else image_set
    if not len(part):
        return ()
    return Loader(part, preprocessing, batch_size=batch_size, workers=workers)


@torch.no_grad()
def compute_logits(
    model: nn.Module,
    loader: Batches,
    count: int,
    accelerator: Accelerator,
    *,
    precision: str = "fp32",
    what: str = "images",
) -> Tensor:
    """Outputs for every image of a set in order, (``count``, K) float32 on the CPU, the same on every process.

    The model runs in eval mode; its mode is restored.

    Args:
        model: on the accelerator's device.
        loader: of :func:`evaluation_loader`.
        count: images of the whole set.
        accelerator: of :func:`start_accelerator`.
        precision: ``"fp32"`` or ``"bf16"``.
        what: is counted, for :func:`refold.training.progress.counting`.
    """
    from refold.backbones import fixed_texts

    device, world = accelerator.device, accelerator.num_processes
    outputs: list[Tensor] = []
    bar = counting(what, total=count, main=accelerator.is_main_process)
    with in_evaluation(model), fixed_texts(model), autocast(device, precision), bar as more:
        for images, _ in loader:
            outputs.append(model(images.to(device, non_blocking=True)).float())
            more(len(outputs[-1]) * world)
    if world == 1:
        return torch.cat(outputs).cpu()
    # Image i is row i // world of process i % world. Processes with fewer images pad one row, or, of sets
    # smaller than the world, have nothing but padding, whose width they learn from the others.
    rows = -(-count // world)
    width = torch.tensor([outputs[0].shape[1] if outputs else 0], device=device)
    widths = accelerator.gather(width)
    assert isinstance(widths, Tensor)
    padded = torch.zeros(rows, int(widths.max()), device=device)
    if outputs:
        logits = torch.cat(outputs)
        padded[: len(logits)] = logits
    gathered = accelerator.gather(padded)
    assert isinstance(gathered, Tensor)
    return gathered.unflatten(0, (world, rows)).transpose(0, 1).flatten(0, 1)[:count].cpu()
