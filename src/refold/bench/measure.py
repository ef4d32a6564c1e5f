"""Honest measurements of time, memory and operations, the same for the CLI, the demo and the benchmarks.

A shared machine drifts: its clock, its caches and its neighbours change between one minute and the next.
So candidates are never timed one after the other; :func:`latency` visits all of them in every round, in a
changing order, and compares them by ratios paired within a round, which the drift leaves alone.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from refold.bench.environment import environment
from refold.errors import RefoldError

__all__ = [
    "ParameterCount",
    "Ratio",
    "StoredBytes",
    "Timing",
    "Timings",
    "cost_rows",
    "count_operations",
    "count_parameters",
    "environment",
    "latency",
    "peak_memory",
    "stored_bytes",
]


# --- time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds a call took, one value a round (the mean over the round's calls).

    Attributes:
        seconds: one value a round, in the order of the rounds.
        calls: calls made in each round.
    """

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """Lower quartile over the rounds, in seconds."""
        return _quartiles(self.seconds)[0]

    @property
    def high(self) -> float:
        """Upper quartile over the rounds, in seconds."""
        return _quartiles(self.seconds)[1]


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with its confidence interval.

    Attributes:
        value: median over the rounds of numerator / denominator.
        low, high: distribution-free interval of that median, at 95 % or more from six rounds on; with fewer
            rounds no such interval exists and these are the extremes.
        rounds: number of pairs.
    """

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Timings(dict[str, Timing]):
    """The candidates of one run of :func:`latency`, by name. Only these are paired round by round."""

    def ratio(self, a: str, b: str) -> Ratio:
        """Time of ``a`` over time of ``b``: the median of the ratios within each round.

        Raises:
            RefoldError: a name was not measured in this run.
        """
        for name in (a, b):
            if name not in self:
                raise RefoldError(f"{name!r} was not measured in this run", remedy=f"Measured: {', '.join(self)}")
        pairs = zip(self[a].seconds, self[b].seconds, strict=True)
        return _median_interval([x / y for x, y in pairs])


def latency(
    functions: dict[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    min_seconds: float = 0.05,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> Timings:
    """Time candidates side by side.

    Every round times every candidate once; the order is shuffled, and reversed in the following round so
    that none profits from its neighbour. A candidate is called often enough for a round to last
    ``min_seconds``, so that the clock and the synchronisation do not count.

    Args:
        functions: candidates by name; each is called without arguments and does one whole piece of work.
        rounds: measurements of each candidate.
        warmup: untimed calls of each before the first round (at least one is made).
        min_seconds: shortest time one candidate is measured for in one round.
        device: device to wait for; None means the current CUDA device where CUDA is in use, else the CPU.
        seed: of the order of the candidates.

    Raises:
        RefoldError: no candidate or no round was asked for.
    """
    if not functions or rounds < 1:
        raise RefoldError("needs at least one candidate and one round", where="latency")
    for function in functions.values():
        for _ in range(max(warmup, 1)):
            function()
    wait = _synchroniser(device)  # after the warm-up, which may be what first touches CUDA
    calls = {
        name: max(1, math.ceil(min_seconds / max(_seconds(function, 1, wait), 1e-9)))
        for name, function in functions.items()
    }
    shuffle = random.Random(seed)
    order = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        if index % 2:
            order.reverse()
        else:
            shuffle.shuffle(order)
        for name in order:
            seconds[name].append(_seconds(functions[name], calls[name], wait) / calls[name])
    return Timings({name: Timing(tuple(seconds[name]), calls[name]) for name in functions})


def cost_rows(timings: Timings, *, batch: int, reference: str) -> list[dict[str, Any]]:
    """The rows of ``cost.json``: milliseconds a call, and the ratio to ``reference`` with its interval.

    Args:
        timings: one run of :func:`latency`.
        batch: images a call.
        reference: the candidate that the ratios divide by.
    """
    rows = []
    for name, timing in timings.items():
        ratio = timings.ratio(name, reference)
        rows.append(
            {
                "name": name,
                "batch": batch,
                "median_ms": 1e3 * timing.median,
                "low_ms": 1e3 * timing.low,
                "high_ms": 1e3 * timing.high,
                "ratio": ratio.value,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
            }
        )
    return rows


def _seconds(function: Callable[[], object], calls: int, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return time.perf_counter() - start


def _synchroniser(device: torch.device | str | None) -> Callable[[], None]:
    device = _device(device)
    return (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
    return torch.device(device)


def _quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _median_interval(values: list[float]) -> Ratio:
    """Median and the order statistics that bracket it: the sign test turned round, no shape assumed."""
    ordered, n = sorted(values), len(values)
    cut, tail = 0, 0.5**n  # `tail` is P(at most `cut` of n values lie below the true median)
    while tail <= 0.025:
        cut += 1
        tail += math.comb(n, cut) * 0.5**n
    index = max(cut - 1, 0)
    return Ratio(statistics.median(ordered), ordered[index], ordered[n - 1 - index], n)


# --- memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredBytes:
    """What autograd keeps between forward and backward.

    Attributes:
        activations: bytes of the storages saved that are no parameter or buffer of the model.
        parameters: bytes of the saved storages that are: they exist anyway and cost nothing more.
        tensors: number of distinct storages counted under ``activations``.
    """

    activations: int
    parameters: int
    tensors: int


def stored_bytes(step: Callable[[], object], model: nn.Module) -> StoredBytes:
    """Bytes that autograd saves for the backward pass while ``step`` runs.

    A storage saved by several operations, or as several views, counts once and whole: that is what it
    occupies. Input images count if they are saved. Tensors hidden from autograd (attributes of a custom
    Function, inputs of ``torch.utils.checkpoint``) are not seen.

    Args:
        step: one forward pass, usually up to the loss; no backward pass, for nothing is kept.
        model: its parameters and buffers are told apart from activations.
    """
    own = {_storage_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[tuple[torch.device, int], StorageWeakRef] = {}
    sizes: dict[bool, list[int]] = {True: [], False: []}  # the model's own, and activations

    def pack(tensor: Tensor) -> Tensor:
        key, storage = _storage_key(tensor), tensor.untyped_storage()
        known = seen.get(key)
        if storage.nbytes() and (known is None or known.expired()):  # expired: the address belongs to another now
            seen[key] = StorageWeakRef(storage)
            sizes[key in own].append(storage.nbytes())
        return torch.empty(0)  # nothing is kept: what a step would store may be more than there is

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return StoredBytes(activations=sum(sizes[False]), parameters=sum(sizes[True]), tensors=len(sizes[False]))


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def peak_memory(device: torch.device | str | None = None) -> int:
    """Peak memory in bytes: resident memory of this process since its start, or torch's own on CUDA.

    On CUDA it is what torch allocated since the last ``torch.cuda.reset_peak_memory_stats``. None means the
    current CUDA device where CUDA is in use, else the process.
    """
    device = _device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        # Not getrusage: there a child (vfork, then exec) begins with the peak of the process that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Unix alone has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS


# --- operations and parameters ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters, a shared one counted once."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> ParameterCount:
    """Parameters of ``model``, and those of them that require a gradient."""
    parameters = list(model.parameters())
    return ParameterCount(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
    )


def count_operations(model: nn.Module, example: Tensor) -> int:
    """Floating-point operations of one forward pass in eval mode (a multiply-add is two).

    Matrix products, convolutions and attention count; elementwise work and normalisation do not. The
    model's modes are restored, and its statistics are untouched.

    Args:
        model: called as ``model(example)``.
        example: one batch of inputs, such as (B, C, H, W).
    """
    from torch.utils.flop_counter import FlopCounterMode

    modes = {module: module.training for module in model.modules()}
    # The fused path of nn.MultiheadAttention and nn.TransformerEncoderLayer is one opaque operation that
    # counts as nothing; without it they run the products that it stands for.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example)
        return counter.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes.items():
            module.training = training
