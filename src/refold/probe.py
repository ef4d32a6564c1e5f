"""One traced forward that finds out what a backbone really does: which layers it calls, and what feeds what.

Names and types say what a model could do; the probe proves what it does. A layer whose ``forward`` is
bypassed (``F.linear`` on its weight) is seen as never called; a norm counts as "the only one that follows"
only if autograd's graph shows that nothing else consumes the layer's output.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from refold.errors import SiteError
from refold.flow import Flow, flow_of
from refold.fold import NORMS, BatchNorm, kind_of
from refold.residuals import Branch, residual_branches

__all__ = ["Example", "Trace", "example_input", "forward", "preserved", "tensor_name", "trace"]


@dataclass(frozen=True)
class Example:
    """A model's example call: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, value: Any) -> Example:
        """From what a user passes as ``example=``: a tensor, a tuple of arguments, or a dict of keywords."""
        if isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls((), dict(value))
        if isinstance(value, (tuple, list)):
            return cls(tuple(value), {})
        return cls((value,), {})

    def map(self, fn: Any) -> Example:
        """With ``fn`` applied to every tensor in the arguments, nested ones included."""
        return Example(*tree_map_only(Tensor, fn, (self.args, self.kwargs)))


@dataclass
class Trace:
    """What one forward showed.

    Attributes:
        calls: module path -> number of calls.
        order: module path -> position of its first call.
        batchnorm: layer path -> path of the only BatchNorm that consumes the layer's output and nothing else does.
        norm: layer path -> path of the norm whose output the layer reads and nothing else does.
        source: layer path -> a number that layers called once have in common if they read the same tensor.
        uses: parameter name -> paths of the modules whose own forward reads its value.
        branches: the residual branches, in the order of the forward.
        shapes: module path -> shape of what it returned first, for the modules called once.
        inputs: module path -> shape of what it was given first, for the modules called once.
        repeated: module path -> shape of what it returns at every call, for those called several times.
        flow: which module's result leads to which, among those called once.
    """

    calls: dict[str, int] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    batchnorm: dict[str, str] = field(default_factory=dict)
    norm: dict[str, str] = field(default_factory=dict)
    source: dict[str, int] = field(default_factory=dict)
    uses: dict[str, frozenset[str]] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    repeated: dict[str, tuple[int, ...]] = field(default_factory=dict)
    flow: Flow = field(default_factory=Flow)


def example_input(model: nn.Module) -> Example:
    """A random batch of one in the shape the model says it wants.

    Reads, in this order: our own models' ``example_input()``, timm's ``patch_embed.img_size`` and ``pretrained_cfg``,
    transformers' ``config``, and falls back to 224 x 224 with as many channels as the first convolution takes.
    """
    if callable(own := getattr(model, "example_input", None)):
        return Example.of(own())
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
    """Evaluation mode without autocast inside; RNG, buffers and modules' modes as before outside, also on errors."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [
        (m, name, b, b.detach().clone())
        for m in model.modules()
        for name, b in m._buffers.items()
        if b is not None and b.device.type != "meta"
    ]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    kinds = {p.device.type for p in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for kind in filter(torch.amp.is_autocast_available, kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    buffer.copy_(before)
                    present = module._buffers.get(name)
                    # A buffer of another shape is a table the model made for this input, and may rely on.
                    if present is not None and present.shape == before.shape:
                        module._buffers[name] = buffer


def forward(model: nn.Module, example: Example) -> Any:
    """The model's output, or a :class:`SiteError` that tells how to give a better example."""
    # Compiled code does not see the hooks that probing adds, and comparing outputs is not worth compiling for.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with eager:
            return model(*example.args, **example.kwargs)
    except Exception as error:
        shapes = [tuple(a.shape) for a in (*example.args, *example.kwargs.values()) if isinstance(a, Tensor)]
        raise SiteError(
            f"the probing forward failed with input shapes {shapes}: {type(error).__name__}: {error}",
            where=type(model).__name__,
            remedy="Pass example= with an input the model accepts (a tensor, a tuple of arguments or a dict)",
        ) from error


def tensors_of(value: Any, above: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """Every tensor inside tuples, lists, dicts and the attributes of other objects, depth first.

    Args:
        above: ids of what contains ``value``: objects may refer to one another in circles.
    """
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (tuple, list)):
        items = value
    elif isinstance(value, nn.Module) or callable(value) or id(value) in above:
        return
    else:
        items = list(getattr(value, "__dict__", {}).values())
    for item in items:
        yield from tensors_of(item, above | {id(value)})


def tensor_name(path: str, leaf: str) -> str:
    """State-dict name of a layer's tensor; the layer may be the model itself, whose path is empty."""
    return f"{path}.{leaf}" if path else leaf


#: Functions that read no more than the type or the shape of their second argument.
_LIKE = {torch.Tensor.type_as, torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.reshape_as}
_LIKE_FIRST = {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like}


class ParameterUses(TorchFunctionMode):
    """Sees which module's own forward passes which parameter to a torch function.

    A layer's weight is usually read by the layer itself; ``F.linear(x, self.qkv.weight)`` in its parent is not,
    and no hook on the layer would tell.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names[id(parameter)].append(name)
        self.running = [""]
        self.users: dict[int, set[str]] = defaultdict(set)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _LIKE_FIRST or next(tensors_of(result), None) is None:
            return result
        read = args[:1] if func in _LIKE or func is torch.Tensor.to else (args, kwargs)
        for tensor in tensors_of(read):
            if id(tensor) in self.names:
                self.users[id(tensor)].add(self.running[-1])
        return result

    def by_name(self) -> dict[str, frozenset[str]]:
        return {name: frozenset(self.users[key]) for key, names in self.names.items() for name in names}


def trace(model: nn.Module, example: Example) -> Trace:
    """Run one forward at evaluation and record the calls; leaves no hook and no gradient behind.

    Raises:
        SiteError: the forward fails on this example.
    """
    if any(p.is_inference() for p in model.parameters()):
        with torch.inference_mode(False):
            model = copy.deepcopy(model)  # autograd records nothing through tensors made in inference mode
    result = Trace()
    inputs: dict[str, list[Value]] = defaultdict(list)
    outputs: dict[str, list[Value]] = defaultdict(list)
    uses = ParameterUses(model)
    handles = []
    for path, module in model.named_modules():

        def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            uses.running.append(path)
            result.order.setdefault(path, len(result.order))
            inputs[path].extend(map(Value.of, tensors_of((args, kwargs))))

        def leave(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            uses.running.pop()
            result.calls[path] = result.calls.get(path, 0) + 1
            outputs[path].extend(map(Value.of, tensors_of(output)))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with ExitStack() as stack:
            for context in (preserved(model), torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(context)
            tracked = stack.enter_context(_graph(model, example))
            with uses:  # last, so that it sees what the model does to its parameters and not what we do
                final = forward(model, tracked)
    finally:
        for handle in handles:
            handle.remove()
    result.uses = uses.by_name()
    consumers = _consumers(tensors_of(final))
    _find_neighbours(model, result, inputs, outputs, consumers)
    _find_flow(result, inputs, outputs, [t.grad_fn for t in tensors_of(final) if t.grad_fn is not None])
    return result


@dataclass(frozen=True)
class Value:
    """A tensor as it was at one moment: operations in place, such as ``ReLU(inplace=True)``, change it later."""

    tensor: Tensor
    version: int
    producer: Any

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        # What inference mode made has no version, and no graph behind it either.
        return cls(tensor, 0 if tensor.is_inference() else tensor._version, tensor.grad_fn)

    @property
    def key(self) -> tuple[int, int]:
        return id(self.tensor), self.version


@contextmanager
def _graph(model: nn.Module, example: Example) -> Iterator[Example]:
    """The example, made so that autograd records a graph from it, on frozen backbones too."""
    # A clone, because a leaf that requires gradients cannot be changed in place, which a model may do.
    tracked = example.map(lambda t: t.detach().clone().requires_grad_().clone() if t.is_floating_point() else t)
    if any(t.requires_grad for t in tensors_of((tracked.args, tracked.kwargs))):
        yield tracked
        return
    # Token ids, and tensors inside objects, carry no gradient: the graph then starts at the parameters.
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield tracked
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _consumers(outputs: Iterator[Tensor]) -> dict[Any, set[Any]]:
    """Autograd node -> the nodes that read its result; None among them where the model gives it away."""
    readers: dict[Any, set[Any]] = defaultdict(set)
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(pending)
    for node in pending:
        readers[node].add(None)
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
    inputs: dict[str, list[Value]],
    outputs: dict[str, list[Value]],
    consumers: dict[Any, set[Any]],
) -> None:
    """Fill in which layers read the same tensor, and which norm alone follows, or feeds, each that is called once."""
    modules = dict(model.named_modules())
    leaves = [p for p, n in result.calls.items() if n == 1 and len(inputs[p]) == 1 and len(outputs[p]) == 1]
    reads: dict[tuple[int, int], list[str]] = defaultdict(list)
    for path in leaves:
        reads[inputs[path][0].key].append(path)
    result.source = {path: number for number, paths in enumerate(reads.values()) for path in paths}
    # A norm with children (timm's BatchNormAct2d) may apply an activation after its bias.
    norms = {p for p in leaves if isinstance(modules[p], NORMS) and not any(True for _ in modules[p].children())}
    for path in leaves:
        value = outputs[path][0]
        # An identity layer passes its input on: the same tensor object would then have two producers.
        if value.tensor is inputs[path][0].tensor or value.producer is None or len(consumers[value.producer]) != 1:
            continue
        for reader in reads[value.key]:
            if isinstance(modules[reader], BatchNorm):
                result.batchnorm[path] = reader
            elif path in norms and kind_of(modules[reader]) is not None:
                result.norm[reader] = path


def _find_flow(
    result: Trace,
    inputs: dict[str, list[Value]],
    outputs: dict[str, list[Value]],
    ends: list[Any],
) -> None:
    """Fill in the flow of features, its residual branches, and the shapes that tell how features are laid out."""
    once = [path for path, calls in result.calls.items() if calls == 1]
    result.inputs = {p: tuple(inputs[p][0].tensor.shape) for p in once if inputs[p]}
    result.shapes = {p: tuple(outputs[p][0].tensor.shape) for p in once if outputs[p]}
    found = {p: {tuple(value.tensor.shape) for value in outputs[p]} for p, calls in result.calls.items() if calls > 1}
    result.repeated = {p: shapes.pop() for p, shapes in found.items() if len(shapes) == 1}
    around = {parent for p in result.calls if p for parent in _parents(p)}
    leaves = frozenset(p for p in once if p not in around)  # no child ran: an adapter on it is none, either
    given, made = _by_producer(inputs), _by_producer(outputs)
    result.branches = residual_branches(ends, given, made, leaves)
    first = {p: outputs[p][0].producer for p in once if p and outputs[p] and outputs[p][0].producer is not None}
    result.flow = flow_of(ends, given, first)


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _by_producer(values: dict[str, list[Value]]) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = defaultdict(list)
    for path, tensors in values.items():
        for value in tensors:
            if value.producer is not None and path not in found[value.producer]:
                found[value.producer].append(path)
    return found
