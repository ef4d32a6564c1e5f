"""Noise through single modules: whether they take more tokens than they were made for as what prompts are.

The weights get noise too, because what is zero at the start, or weak, would not show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from refold.errors import SiteError
from refold.positions import Insertion, cover, spares_prefix, spread, uncover
from refold.probe import tensors_of
from refold.sides import map_output
from refold.sites import Site

__all__ = ["IDLE", "Call", "form", "objection", "with_path"]

IDLE = "none of its tokens reads another, so prompts would do nothing"
#: What rearranged tokens may differ by, relative to what the module adds to them: some attention computes in float32.
_EQUAL = 1e-4


@dataclass(frozen=True)
class Call:
    """A module's call, of which the first argument is features."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def features(self) -> Any:
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Shapes of the tensors, and what else the arguments are."""
        return tuple(map(_plain, tree_leaves((self.args, self.kwargs))))

    @property
    def others(self) -> list[Any]:
        """The arguments behind the first."""
        return [*self.args[1:], *self.kwargs.values()][0 if self.args else 1 :]

    def of(self, features: Tensor) -> Call:
        """The call with other features."""
        if self.args:
            return Call((features, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, next(iter(self.kwargs)): features})

    def map(self, fn: Callable[[Tensor], Tensor]) -> Call:
        """With ``fn`` applied to every tensor."""
        return Call(*tree_map_only(Tensor, fn, (self.args, self.kwargs)))

    def to(self, dtype: torch.dtype) -> Call:
        return self.map(lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t)


def with_path(hook: Callable[..., Any], path: str) -> Callable[..., Any]:
    """The hook with one more argument, the path of its module."""
    return lambda *args: hook(*args, path)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value != 0
    if isinstance(value, (bool, int, str, torch.dtype, torch.device, type(None))):
        return value
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):  # hooks, mostly none
        return tuple(map(id, value.values()))
    if isinstance(value, (tuple, set)):
        return type(value), frozenset(map(_plain, value)) if isinstance(value, set) else tuple(map(_plain, value))
    return id(value)


def form(module: nn.Module) -> tuple[Any, ...]:
    """What modules have in common that compute the same but for the numbers in their tensors: one trial does for all.

    Attributes count by value where they are plain, by whether they are 0 where they are floats, else by identity.
    """

    own = ("_parameters", "_buffers", "_modules")
    return tuple(
        (
            name,
            type(part),
            *((key, _plain(value)) for key, value in part.__dict__.items() if key not in own),
            *((key, _plain(value)) for key, value in (*part._parameters.items(), *part._buffers.items())),
        )
        for name, part in module.named_modules()
    )


def objection(
    modules: Mapping[str, nn.Module], block: str, sites: Sequence[Site], calls: Mapping[str, Call], count: int
) -> str:
    """Why ``count`` prompts would be something else than tokens among others, "" if they would be just that.

    Args:
        modules: the model's, by path.
        block: path of a block.
        sites: of what prompts pass there: the block, or its attention on windows and, where they go on, its MLP.
        calls: module path -> a call.
    """
    checks: list[Callable[[torch.dtype], str]] = []
    if sites[0].route is not None and sites[0].route.source:
        checks.append(lambda dtype: _around_windows(modules, block, sites, calls[block], dtype))
    for site in sites:
        mixes, call = site is sites[0], calls[site.path]
        checks.append(lambda dtype, s=site, c=call, x=mixes: _rearranged(modules[s.path], s, c, count, dtype, mixes=x))
    own = calls[sites[0].path].features.dtype
    return next((reason for check in checks if (reason := _in_some_precision(check, own))), "")


def _in_some_precision(check: Callable[[torch.dtype], str], own: torch.dtype) -> str:
    """The check's verdict in float64, or in the model's own precision where its operations or device have no other."""
    failed = ""
    for dtype in dict.fromkeys((torch.float64, own)):
        try:
            return check(dtype)
        except SiteError as error:
            failed = error.reason
        except Exception as error:
            failed = f"with more tokens it fails ({type(error).__name__}: {error})"
    return failed


class _Noise:
    """Numbers from N(0, 1), the same at every use."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = torch.Generator().manual_seed(0), device, dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def values(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's tensors with noise on its parameters."""
        values: dict[str, Tensor] = {}
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if type(value) in (Tensor, nn.Parameter) and value.is_floating_point():
                values[name] = value.detach().to(self.dtype, copy=True)  # not one of inference mode
                if isinstance(value, nn.Parameter):
                    size = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1
                    values[name] = values[name] + size * self(*value.shape)
        return values


def _rearranged(module: nn.Module, site: Site, call: Call, count: int, dtype: torch.dtype, *, mixes: bool) -> str:
    """Why a module does not treat ``count`` new tokens as tokens among others, "" if it does.

    Args:
        mixes: whether its other tokens must read them.
    """
    route, features = site.route, call.features
    assert route is not None
    (batch, length, width), at = features.shape, route.prefix
    noise, call = _Noise(features.device, dtype), call.to(dtype)
    values, x = noise.values(module), noise(batch, length + count, width)

    # Where tokens have places, new ones can only change theirs with those that have none either.
    placed = any(_has_rows(t, length, at) for t in tree_leaves(call.others))
    placed = placed or any(spares_prefix(module.get_submodule(path)) for path in route.positions)
    free = at + count if placed else length + count
    order = torch.cat((noise.order(free), free + noise.order(length + count - free)))

    def run(x: Tensor, insertion: Insertion) -> Tensor:
        longer = call.map(lambda t: spread(t, insertion))
        if insertion.order is not None:
            behind = order[free:].to(x.device) - free
            longer = longer.map(lambda t: t[..., behind, :] if _has_rows(t, length, at) else t)
        longer, covered = longer.of(x), []

        def see(module: nn.Module, args: Any) -> None:  # a hook, because it must see the values with noise
            covered.extend(cover((module.get_submodule(path) for path in route.positions), insertion))

        handle = module.register_forward_pre_hook(see)
        try:
            return next(tensors_of(functional_call(module, values, longer.args, longer.kwargs)))
        finally:
            handle.remove()
            uncover(covered)

    insertion = Insertion(length, at, count)
    with torch.enable_grad():
        x.requires_grad_()
        y = run(x, insertion)
        if y.shape != x.shape:
            return f"given {tuple(x.shape)} it returns {tuple(y.shape)}"
        kept = insertion.origin(y.device) < length
        (pull,) = torch.autograd.grad((y[:, kept] * noise(batch, length, width).to(y)).sum(), x)
    x, y = x.detach(), y.detach()
    error = (run(x[:, order], replace(insertion, order=order)) - y[:, order]).norm() / (y - x).norm()
    if not float(error) <= max(_EQUAL, 8 * torch.finfo(dtype).eps):
        return "what it computes depends on the order of its tokens in another way than refold knows (a grid, a window)"
    reached = pull[:, ~kept].abs().amax((0, 2)) > 0
    if mixes and not bool(reached.all()):
        return "its tokens read only some of the prompts" if bool(reached.any()) else IDLE
    return ""


def _has_rows(value: Any, length: int, at: int) -> bool:
    """Whether an argument has a row for each token that has a place, as rotations have."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    return value.shape[-2] == length - at and value.shape[-2:] != (length, length)


def _around_windows(
    modules: Mapping[str, nn.Module], path: str, sites: Sequence[Site], call: Call, dtype: torch.dtype
) -> str:
    """Why a block's window attention does not read what the norm in front of it gives, cut into windows, "" if it does.

    Two images of noise pass. Sums over all tokens of an image tell, because cutting and padding with zeros keep them.
    Where prompts go on, attention and MLP return constants, which must arrive in the stream as they are.
    """
    block, width, through = modules[path], sites[0].width, len(sites) > 1
    noise = _Noise(call.features.device, dtype)
    x, values = noise(2, *call.features.shape[1:]), noise.values(block)
    results = {site.path: noise(width) for site in sites}
    norms = {site.path: site.route.source for site in sites if site.route is not None}
    seen: dict[tuple[str, str], Tensor] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str) -> Any:
        seen[path, "in"], seen[path, "out"] = Call(args, kwargs).features, next(tensors_of(output))
        return map_output(output, lambda y: results[path].expand_as(y)) if path in results else None

    watched = (*norms, *norms.values(), path)
    handles = [modules[p].register_forward_hook(with_path(note, p), with_kwargs=True) for p in watched]
    try:
        moved = call.to(dtype).of(x)
        functional_call(block, values, moved.args, moved.kwargs)
    finally:
        for handle in handles:
            handle.remove()

    flat = {key: value.reshape(2, -1, width) for key, value in seen.items()}
    stream = flat[path, "in"]
    for reader, norm in norms.items():
        gives, reads = flat[norm, "out"], flat[reader, "in"]
        if not all(_close(gives.pow(power).sum(1), reads.pow(power).sum(1), dtype) for power in (1, 2)):
            return f"{reader} does not read what {norm} gives"
        below = f"{norm.removeprefix(f'{path}.')}."
        own = {key.removeprefix(below): value for key, value in values.items() if key.startswith(below)}
        if not _close(functional_call(modules[norm], own, (flat[norm, "in"],)), gives, dtype):
            return f"{norm} does not work on single tokens"
        if through and not _close(flat[norm, "in"], stream, dtype):
            return f"something else than attention and MLP changes the tokens before {norm}"
        stream = stream + results[reader]
    if through and not _close(flat[path, "out"], stream, dtype):
        return "something else than attention and MLP changes the tokens"
    return ""


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= max(1e-6, 8 * torch.finfo(dtype).eps) * float(b.norm())
