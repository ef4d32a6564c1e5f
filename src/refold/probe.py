"""One traced forward that finds out what a backbone really does: which layers it calls, and what feeds what.

Names and types say what a model could do; the probe proves what it does. A layer whose ``forward`` is
bypassed (``F.linear`` on its weight) is seen as never called; a norm counts as "the only one that follows"
only if autograd's graph shows that nothing else consumes the layer's output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refold.errors import SiteError
from refold.fold import BatchNorm

__all__ = ["Example", "Trace", "example_input", "forward", "preserved", "trace"]


@dataclass(frozen=True)
class Example:
    """A model's example call: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, value: Any) -> Example:
        """From what a user passes as ``example=``: a tensor, a tuple of arguments, or a dict of keywords."""
        if isinstance(value, dict):
            return cls((), dict(value))
        if isinstance(value, (tuple, list)):
            return cls(tuple(value), {})
        return cls((value,), {})

    def map(self, fn: Any) -> Example:
        """With ``fn`` applied to every tensor among the arguments."""
        apply = lambda v: fn(v) if isinstance(v, Tensor) else v  # noqa: E731
        return Example(tuple(map(apply, self.args)), {k: apply(v) for k, v in self.kwargs.items()})


@dataclass
class Trace:
    """What one forward showed.

    Attributes:
        calls: module path -> number of calls.
        order: module path -> position of its first call.
        batchnorm: layer path -> path of the only BatchNorm that consumes the layer's output and nothing else does.
        norm: layer path -> path of the norm whose output the layer reads and nothing else does.
    """

    calls: dict[str, int] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    batchnorm: dict[str, str] = field(default_factory=dict)
    norm: dict[str, str] = field(default_factory=dict)


def example_input(model: nn.Module) -> Example:
    """A random batch of one in the shape the model says it wants.

    Reads, in this order: timm's ``patch_embed.img_size`` and ``pretrained_cfg``, transformers' ``config``, and
    falls back to 224 x 224 with as many channels as the first convolution takes.
    """
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    first_conv = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))), None)
    channels = first_conv.in_channels if first_conv is not None else 3
    size: tuple[int, int] = (224, 224)
    config = getattr(model, "config", None)
    timm_cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    embed = getattr(model, "patch_embed", None)
    if embed is not None and getattr(embed, "img_size", None) is not None:
        size = _pair(embed.img_size)
    elif isinstance(timm_cfg, dict) and timm_cfg.get("input_size"):
        size = _pair(timm_cfg["input_size"][-2:])
    elif config is not None and getattr(config, "image_size", None) is not None:
        size = _pair(config.image_size)
    else:
        for module in model.modules():  # a wrapped tower (open_clip) knows its own size
            found = getattr(module, "image_size", None) or getattr(module, "img_size", None)
            if isinstance(found, (int, tuple, list)):
                size = _pair(found)
                break
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, channels, *size, generator=generator).to(reference.device, reference.dtype)
    main_input = getattr(model, "main_input_name", None)
    return Example((), {main_input: images}) if isinstance(main_input, str) else Example((images,), {})


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1])) if isinstance(value, (tuple, list)) else (int(value), int(value))


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; RNG state, buffers and every module's mode as before outside, also on errors."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def forward(model: nn.Module, example: Example) -> Any:
    """The model's output, or a :class:`SiteError` that tells how to give a better example."""
    try:
        return model(*example.args, **example.kwargs)
    except Exception as error:
        shapes = [tuple(a.shape) for a in (*example.args, *example.kwargs.values()) if isinstance(a, Tensor)]
        raise SiteError(
            f"the probing forward failed with input shapes {shapes}: {type(error).__name__}: {error}",
            where=type(model).__name__,
            remedy="Pass example= with an input the model accepts (a tensor, a tuple of arguments or a dict)",
        ) from error


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor inside tuples, lists, dicts and objects with ``.tensors``, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif hasattr(value, "tensors"):
        yield from tensors_of(value.tensors)


def trace(model: nn.Module, example: Example) -> Trace:
    """Run one forward at evaluation and record the calls; leaves no hook and no gradient behind.

    Raises:
        SiteError: the forward fails on this example.
    """
    result = Trace()
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for path, module in model.named_modules():

        def record(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            result.calls[path] = result.calls.get(path, 0) + 1
            inputs[path].extend(tensors_of(args))
            inputs[path].extend(tensors_of(kwargs))
            outputs[path].extend(tensors_of(output))

        def enter(module: nn.Module, args: Any, path: str = path) -> None:
            result.order.setdefault(path, len(result.order))

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(record, with_kwargs=True))
    tracked = example.map(lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
    try:
        with preserved(model), torch.enable_grad():
            final = forward(model, tracked)
    finally:
        for handle in handles:
            handle.remove()
    consumers = _consumers(tensors_of(final))
    _find_neighbours(model, result, inputs, outputs, consumers)
    return result


def _consumers(outputs: Iterator[Tensor]) -> dict[Any, set[Any]]:
    """Autograd node -> the nodes that read its result."""
    readers: dict[Any, set[Any]] = defaultdict(set)
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for source, _ in node.next_functions:
            if source is not None:
                readers[source].add(node)
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
    return readers


def _find_neighbours(
    model: nn.Module,
    result: Trace,
    inputs: dict[str, list[Tensor]],
    outputs: dict[str, list[Tensor]],
    consumers: dict[Any, set[Any]],
) -> None:
    """Fill in which norm alone follows, or alone feeds, each layer that is called once."""
    modules = dict(model.named_modules())
    leaves = [p for p, n in result.calls.items() if n == 1 and len(inputs[p]) == 1 and len(outputs[p]) == 1]
    reads: dict[int, list[str]] = defaultdict(list)
    for path in leaves:
        reads[id(inputs[path][0])].append(path)
    norms = (nn.LayerNorm, nn.GroupNorm, BatchNorm)
    for path in leaves:
        value = outputs[path][0]
        # An identity layer passes its input on: the same tensor object would then have two producers.
        if value is inputs[path][0] or value.grad_fn is None or len(consumers[value.grad_fn]) != 1:
            continue
        for reader in reads[id(value)]:
            if isinstance(modules[reader], BatchNorm):
                result.batchnorm[path] = reader
            elif isinstance(modules[path], norms) and not list(modules[reader].children()):
                result.norm[reader] = path
