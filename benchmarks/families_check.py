"""One backbone, one method: attach, perturb, merge, compare, restore. No library's own check is trusted.

Everything runs in float64, so that a wrong fold cannot hide in rounding, on weights that hide nothing: fresh models
have zero biases, unit norms and layer scales near zero, under which a misplaced shift changes nothing.
"""

from __future__ import annotations

import copy
import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import refold
from families_reach import affine_layers, head_of, roles_complete
from refold.survey import Survey

__all__ = ["EXACT", "METHODS", "Family", "check", "fill"]

#: Largest relative L2 distance of merged and unmerged outputs in float64 that counts as exact.
EXACT = 1e-10
RANK = 8


@dataclass(frozen=True)
class Family:
    """A backbone of the sweep.

    Attributes:
        library: timm, transformers, torchvision, open_clip or research.
        name: the family; unique within its library.
        build: makes the model.
        inputs: makes the arguments of a call at a batch size: a tuple, or a dict of keywords.
        model: what is built, in words.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    model: str = ""

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"


@dataclass
class Row:
    """A verdict: exact, refused (a RefoldError), wrong (outputs differ in silence) or error (anything else)."""

    verdict: str = "error"
    reason: str = ""
    error: float = math.nan  # relative L2 distance of merged and unmerged
    limit: float = EXACT  # what counts as exact
    effect: float = math.nan  # relative L2 distance of adapted and plain: what there was to get wrong
    restored: bool | None = None
    layers: int = 0  # with a site
    layers_total: int = 0
    weights: int = 0
    weights_total: int = 0
    roles: dict[str, int] = field(default_factory=dict)
    roles_complete: bool | None = None  # every block has every role; None where the default has none
    dead: list[str] = field(default_factory=list)  # sites whose adapter does nothing though the layer does
    gaps: dict[str, int] = field(default_factory=dict)  # why layers have no site -> their weights
    seconds: float = 0.0


# -- models -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic values that matter: vectors, constants and zeros above all."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        low, high = float(parameter.min()), float(parameter.max())
        if low == high and 0 < abs(low) < 0.2:  # layer scale
            parameter.copy_(0.4 + 0.1 * noise(parameter).clamp(-2, 2))
        elif parameter.dim() > 1 and max(abs(low), abs(high)) < 1e-6:  # projections that start at zero, or nearly
            parameter.copy_(0.05 * noise(parameter))
        elif parameter.dim() <= 1 or low == high:
            parameter.add_(0.1 * noise(parameter))
    for module in model.modules():
        if isinstance(module, _BatchNorm) and isinstance(module.running_var, Tensor):
            assert module.running_mean is not None
            module.running_mean.add_(0.1 * noise(module.running_mean))
            module.running_var.copy_(1 + 0.2 * noise(module.running_var).clamp(-2, 2))
    return model


def tensors(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in an output, whatever it is wrapped in."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield from value.unbind() if value.is_nested else (value,)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any) -> Tensor:
    model.eval()
    torch.manual_seed(0)  # some models draw random numbers at evaluation too
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return torch.cat([t.flatten().double() for t in tensors(output)])


def distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def perturb(parameters: Iterable[nn.Parameter], size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def limit_of(model: nn.Module, family: Family) -> float:
    """The largest distance that counts as exact: ``EXACT``, or more for a model that computes in float32 inside.

    Such a model (DeepSeek's norms, for one) turns one flipped rounding of a weight into 1e-9 of its output. What that
    does is measured: every weight is moved by about one unit in the last place of float64.
    """
    inputs = family.inputs(2)
    plain, moved = outputs(model, inputs), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.dtype == torch.float64:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.mul_(1 + torch.finfo(torch.float64).eps * noise)
    return max(EXACT, 10 * distance(outputs(moved, inputs), plain))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """State dict equal bit for bit, no hook and no key more or less."""
    now = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    return list(now) == list(before) and all(
        now[k].dtype == v.dtype and now[k].shape == v.shape and bool(torch.equal(now[k], v)) for k, v in before.items()
    )


# -- refold -----------------------------------------------------------------------------------------------------


def _everywhere(model: nn.Module, example: Any, head: tuple[str, ...], make: Callable[..., Any]) -> tuple[Any, dict]:
    """The method at every layer it can reach, and the reasons against the others."""
    survey = Survey(model, example, head=head)
    paths = tuple(p for p, layer in survey.layers.items() if layer.operator.folds_input)
    grouped = {p: survey.layers[p].operator.groups for p in paths}
    reasons = {s.path: s.reason for s in survey.skipped}
    return make(paths, grouped, reasons), reasons


def _dense(paths: tuple[str, ...], grouped: dict[str, int], reasons: dict[str, str]) -> Any:
    for path in paths:
        if grouped[path] > 1:
            reasons[path] = "a channel-mixing map before a grouped convolution would make it dense"
    return refold.RepAdapter(rank=RANK, groups=1, sites=tuple(p for p in paths if grouped[p] == 1))


def _lora(paths: tuple[str, ...], grouped: dict[str, int], reasons: dict[str, str]) -> Any:
    return refold.LoRA(rank=RANK, sites=paths)


def _oft(paths: tuple[str, ...], grouped: dict[str, int], reasons: dict[str, str]) -> Any:
    return refold.OFT(sites=paths)


#: Name -> makes (method, reasons against layers) for a model.
METHODS: dict[str, Callable[[nn.Module, Any, tuple[str, ...]], tuple[Any, dict[str, str]]]] = {
    "RepAdapter": lambda model, example, head: (refold.RepAdapter(rank=RANK), {}),
    "RepAdapter everywhere": lambda model, example, head: _everywhere(model, example, head, _dense),
    "LoRA everywhere": lambda model, example, head: _everywhere(model, example, head, _lora),
    "SSF": lambda model, example, head: (refold.SSF(), {}),
    "OFT everywhere": lambda model, example, head: _everywhere(model, example, head, _oft),
}
PEFT = {"PEFT LoRA": False, "PEFT LoRA with grouped convolutions": True}


def check_refold(model: nn.Module, family: Family, method: str, row: Row) -> None:
    before, head = snapshot(model), head_of(model)
    example, two = family.inputs(1), family.inputs(2)
    plain, layers = outputs(model, two), affine_layers(model, head, norms=method == "SSF")
    try:
        recipe, reasons = METHODS[method](model, example, head)
        refold.attach(model, recipe, example=example, trainable=None if head else ())
        record = model.__dict__["_refold"].record()
        sites = record.sites
        _reach(model, layers, sites, {**reasons, **{s.path: s.reason for s in record.skipped}}, method, row)
        perturb(list(refold.trainable_parameters(model).values()))
        unmerged = outputs(model, two)
        row.effect = distance(unmerged, plain)
        row.dead = dead_sites(model, {site.path for site in sites}, two)
        with refold.disabled(model):
            if not distance(outputs(model, two), plain) <= row.limit:
                raise RuntimeError("disabled adapters still change the output")
        refold.merge(model, check=False)
        merged = outputs(model, two)
        row.error = distance(merged, unmerged)
        if not bool(torch.isfinite(unmerged).all()):
            raise RuntimeError("the unmerged output is not finite: nothing can be compared")
        if list(model.state_dict()) != list(before):
            row.verdict, row.reason = "wrong", "the merged model has other state-dict keys"
        elif not row.error <= row.limit:
            row.verdict, row.reason = "wrong", f"merged and unmerged differ by {row.error:.1e}"
            refold.unmerge(model)
            try:
                refold.merge(model)
            except refold.MergeError as error:
                row.verdict, row.reason = "refused", str(error)
        elif row.dead:
            row.verdict, row.reason = "wrong", f"{len(row.dead)} adapters change nothing, {row.dead[0]} for one"
        elif not row.effect > 1e-6:
            row.verdict, row.reason = "wrong", f"the adapters change nothing ({row.effect:.1e})"
        else:
            row.verdict = "exact"
        refold.detach(model)
        # The same bits give the same output up to the alignment of memory, on which the order of sums depends.
        row.restored = same_bits(model, before) and distance(outputs(model, two), plain) <= 1e-13
        if not row.restored:
            row.verdict, row.reason = "wrong", f"{row.reason}; detach does not restore the backbone".lstrip("; ")
    except refold.RefoldError as error:
        row.verdict, row.reason = "refused", str(error)
        row.restored = same_bits(model, before)


def dead_sites(model: nn.Module, paths: set[str], inputs: Any) -> list[str]:
    """The sites whose layer matters to the output while its adapter does not, as autograd sees it: silent no-ops."""
    hosts = {path: model.get_submodule(path) for path in paths}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for host in hosts.values():
        for parameter in host.parameters(recurse=False):
            parameter.requires_grad_(True)
    model.zero_grad()
    with torch.enable_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        flat = torch.cat([t.flatten().double() for t in tensors(output)])
        generator = torch.Generator().manual_seed(3)
        (flat * torch.randn(flat.shape, generator=generator, dtype=torch.float64)).sum().backward()

    def slope(parameters: Iterable[nn.Parameter]) -> float:
        return max((float(p.grad.abs().max()) for p in parameters if p.grad is not None), default=0.0)

    # Weights alone: behind a dead ReLU a layer is its bias, and a map of its weight or input rightly does nothing.
    own = {p: slope([w for n, w in h._parameters.items() if w is not None and "weight" in n]) for p, h in hosts.items()}
    floor = 1e-12 * max(own.values(), default=0.0)  # gradients that are zero but for rounding
    dead = [p for p, host in hosts.items() if own[p] > floor and slope(host.get_submodule("refold").parameters()) == 0]
    model.zero_grad()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return sorted(dead)


def _reach(
    model: nn.Module, layers: dict[str, int], sites: Any, reasons: dict[str, str], method: str, row: Row
) -> None:
    paths = {site.path for site in sites}
    reached = {p for p in layers if p in paths}
    row.layers, row.layers_total = len(reached), len(layers)
    row.weights, row.weights_total = sum(layers[p] for p in reached), sum(layers.values())
    roles = {site.path: site.role for site in sites}
    row.roles = dict(Counter(r for r in roles.values() if r))
    row.roles_complete = roles_complete(model, roles)
    if method == "RepAdapter" and row.roles:
        return  # chosen by role: what is left is left on purpose
    gaps: Counter[str] = Counter()
    for path in set(layers) - reached:
        reason = reasons.get(path, "no reason given")
        reason = re.sub(r"shared with .*?:", "shared with another layer:", reason)
        gaps[f"{type(model.get_submodule(path)).__name__}: {re.sub(r'[0-9]+', 'N', reason)}"] += layers[path]
    row.gaps = dict(gaps)


# -- PEFT -------------------------------------------------------------------------------------------------------


def check_peft(model: nn.Module, family: Family, method: str, row: Row) -> None:
    """LoRA with every Linear and convolution named explicitly, the head left alone, by PEFT's own merge."""
    from peft import LoraConfig, get_peft_model

    before, head, two = snapshot(model), head_of(model), family.inputs(2)
    layers = affine_layers(model, head, norms=False)
    modules = dict(model.named_modules())
    targets = [
        p
        for p in layers
        if isinstance(modules[p], nn.Linear)
        or (isinstance(modules[p], (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and (PEFT[method] or modules[p].groups == 1))
    ]
    row.layers, row.layers_total = len(targets), len(layers)
    row.weights, row.weights_total = sum(layers[p] for p in targets), sum(layers.values())
    plain = outputs(model, two)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="|".join(map(re.escape, targets)))
    wrapped = get_peft_model(model, config).double()
    perturb([p for n, p in wrapped.named_parameters() if "lora_" in n])
    unmerged = outputs(wrapped, two)
    row.effect = distance(unmerged, plain)
    twin = copy.deepcopy(wrapped)
    row.restored = same_bits(twin.unload(), before)  # type: ignore[operator]
    del twin
    merged = outputs(wrapped.merge_and_unload(), two)  # type: ignore[operator]
    row.error = distance(merged, unmerged)
    if row.error <= row.limit and row.effect > 1e-6:
        row.verdict = "exact"
    else:
        row.verdict, row.reason = "wrong", f"merged and unmerged differ by {row.error:.1e}"


def check(model: nn.Module, family: Family, method: str, limit: float) -> Row:
    """The verdict of ``method`` on a float64 ``model`` at evaluation, which is not used afterwards."""
    row, start = Row(limit=limit), time.perf_counter()
    try:
        (check_peft if method in PEFT else check_refold)(model, family, method, row)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        row.verdict, row.reason = "error", f"{type(error).__name__}: {str(error)[:300]} ({place})"
    row.seconds = round(time.perf_counter() - start, 2)
    return row
