"""Blocks that take prompts: where more tokens can be put into a sequence, and the proof that they are prompts there.

A block that works on the *set* of its tokens does with more of them what the papers mean. One that reads them as a
grid, or as a sequence, computes something else, with the right shapes if chance has it. So every block is tried with
noise: rearranged tokens must come out rearranged, places that are arguments or known attributes (rotations, masks,
relative positions, see :mod:`refold.positions`) going along with the tokens they belong to, and each new token must be
read by the others (:mod:`refold.trials`). Blocks on maps take prompts in the windows of their attention, if they have
such a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from refold.errors import SiteError
from refold.places import block_site, blocks, covers
from refold.positions import keeps_positions
from refold.probe import forward, preserved, tensors_of
from refold.residuals import Branch
from refold.sides import map_output
from refold.sites import Route, Site, Skipped
from refold.survey import Survey
from refold.trials import IDLE, Call, form, objection, with_path

__all__ = ["TokenHost", "prove", "token_hosts"]


@dataclass(frozen=True)
class TokenHost:
    """A block that takes prompts.

    Attributes:
        block: its path.
        site: of the module that gets them: the block itself, or its attention on windows where its features are maps.
        mlp: behind such an attention, the site of the MLP through which prompts that are kept go as well.
    """

    block: str
    site: Site
    mlp: Site | None = None


# -- where ------------------------------------------------------------------------------------------------------


def token_hosts(survey: Survey, sites: str | Iterable[str] | None) -> tuple[list[TokenHost], list[Skipped]]:
    """The blocks that prompts could be put into, in the order of the forward, and those left out with reasons.

    Args:
        sites: paths of blocks, of modules around them, or of their window attention (``*`` allowed); None for all.

    Raises:
        SiteError: a path names no such block, or the backbone has none.
    """
    found, skipped, maps = [], [], []
    for path in blocks(survey):
        given, returned = survey.trace.inputs.get(path), survey.trace.shapes.get(path)
        if given != returned:
            skipped.append(Skipped(path, f"given features of shape {given} it returns {returned}"))
        elif given is not None and len(given) != 3:
            maps.append(path)
        else:
            try:
                found.append(TokenHost(path, block_site(survey, path, "tokens")))
            except SiteError as error:
                skipped.append(Skipped(path, error.reason))
    if not found:
        found = [host for path in maps if (host := _windows(survey, path)) is not None]
    held = {host.block for host in found}
    reason = "its features are maps, not a sequence of tokens, and no attention on windows of them follows a norm"
    skipped += [Skipped(path, reason) for path in maps if path not in held]
    skipped += [Skipped(b.inside[-1], "no module gives the result of this residual branch") for b in _homeless(survey)]
    if sites is not None:
        names = (sites,) if isinstance(sites, str) else tuple(sites)
        found = [host for host in found if any(covers(name, host.site.path) for name in names)]
        for name in names:
            if not any(covers(name, host.site.path) for host in found):
                known = next((s.reason for s in skipped if covers(name, s.path)), "no block has this path")
                raise SiteError(known, where=name, remedy=f"Blocks are {', '.join(blocks(survey)[:3])} ...")
        return found, []
    if not found:
        first = next((s for s in skipped if s.path in maps), skipped[0])
        raise SiteError(first.reason, where=first.path, remedy="Choose a method without prompts")
    return found, skipped


def _homeless(survey: Survey) -> list[Branch]:
    """Residual branches that are in no block."""
    known = blocks(survey)
    return [
        branch
        for branch in survey.trace.branches
        if not branch.exit and not any(branch.inside[-1].startswith(f"{path}.") for path in known)
    ]


def _windows(survey: Survey, path: str) -> TokenHost | None:
    """The attention on windows of a block on maps, and the MLP behind it: the two modules that its branches are."""
    shapes, sites = survey.trace.shapes, []
    for branch in survey.trace.branches:
        if not branch.entry.startswith(f"{path}."):
            continue
        readers = [
            p
            for p in branch.inside
            if p.startswith(f"{path}.") and len(shapes.get(p, ())) == 3 and shapes[p] == survey.trace.inputs.get(p)
        ]
        modules = [p for p in readers if any(True for _ in survey.modules[p].children())]
        if not modules or branch.entry.startswith(f"{modules[-1]}."):
            return None
        sites.append(replace(block_site(survey, modules[-1], "tokens"), route=Route(source=branch.entry)))
    return TokenHost(path, sites[0], sites[1] if len(sites) == 2 else None) if sites else None


def _completed(survey: Survey, site: Site) -> Site:
    """With what the site's route still lacks: the prefix its attention knows, modules with positions, the patch."""
    host, route = survey.modules[site.path], site.route
    assert route is not None
    positions = tuple(path for path, module in host.named_modules() if keeps_positions(module))
    stated = {getattr(host.get_submodule(path), "num_prefix_tokens", None) for path in positions} - {None}
    prefix = stated.pop() if len(stated) == 1 else None
    prefix = route.prefix if prefix is None else prefix
    convolutions = [p for p, m in survey.modules.items() if hasattr(m, "kernel_size") and p in survey.trace.order]
    first = min(convolutions, key=survey.trace.order.__getitem__, default=None)
    kernel = () if first is None else survey.modules[first].kernel_size
    patch = prod(kernel) if isinstance(kernel, tuple) and kernel else 0
    return replace(site, route=Route(route.source, prefix, positions=positions, patch=patch))


# -- proof ------------------------------------------------------------------------------------------------------


def prove(
    survey: Survey, hosts: Sequence[TokenHost], counts: Mapping[str, int], *, through: bool
) -> tuple[list[TokenHost], list[Skipped]]:
    """The hosts with complete routes, and those where prompts would do nothing.

    Args:
        counts: host path -> number of prompts.
        through: whether prompts go from one block to the next.

    Raises:
        SiteError: prompts would be something else than tokens among others in some block, or between blocks.
    """
    hosts = [replace(host, site=_completed(survey, host.site)) for host in hosts]
    hosts = [host if host.mlp is None else replace(host, mlp=_completed(survey, host.mlp)) for host in hosts]
    passed = {h.block: [h.site, *([h.mlp] if through and h.mlp is not None else [])] for h in hosts}
    calls = _calls(survey, passed, through=through)
    found, idle, against, known = [], [], {}, {}
    with preserved(survey.model), torch.inference_mode(False), torch.no_grad():
        for host in hosts:
            path = host.site.path
            features = calls[path].features
            if not isinstance(features, Tensor) or tuple(features.shape) != survey.trace.inputs[path]:
                reason = "its first argument is not the tokens"
            else:
                sites = passed[host.block]
                routes = tuple((s.route.prefix, s.route.positions) for s in sites if s.route is not None)
                alike = (form(survey.modules[host.block]), calls[path].shapes, routes, counts[path])
                if alike not in known:
                    known[alike] = objection(survey.modules, host.block, sites, calls, counts[path])
                reason = known[alike]
            if reason == IDLE and not through:
                idle.append(Skipped(path, reason))
            elif reason:
                against[path] = reason
            else:
                found.append(host)
    if against or not found:
        where, reason = next(iter((against or {idle[0].path: IDLE}).items()))
        fitting = ", ".join(h.site.path for h in found[:3])
        remedy = f"Name blocks that take them in sites=: {fitting}" if found else "Choose a method without prompts"
        raise SiteError(f"prompts have no place here: {reason}", where=where, remedy=remedy)
    return found, idle


def _calls(survey: Survey, passed: Mapping[str, Sequence[Site]], *, through: bool) -> dict[str, Call]:
    """What blocks and hosts are called with in a forward; proves that nothing but them sees prompts.

    What a host was given is NaN as soon as its forward is over. Where prompts go from block to block, what a block
    returns is NaN too, and the next one gets what it was. Whatever else reads them shows in the output.

    Args:
        passed: block path -> sites of the hosts in it.

    Raises:
        SiteError: something reads them, or changes them on their way.
    """
    hosts, blocks_in_order = {site.path for sites in passed.values() for site in sites}, list(passed)
    previous = dict(zip(blocks_in_order[1:], blocks_in_order, strict=False)) if through else {}
    calls: dict[str, Call] = {}
    poison: dict[str, tuple[Tensor, Tensor]] = {}  # block -> what it gives now, and what it gave

    def begin(module: nn.Module, args: Any, kwargs: Any, path: str) -> Any:
        call = Call(args, kwargs)
        if path in previous:
            given, meant = poison.get(previous[path], (None, None))
            if meant is None or call.features is not given:
                raise SiteError(f"something lies between this block and {previous[path]}", where=path)
            call = call.of(meant)
        calls[path] = call
        if path in hosts and isinstance(call.features, Tensor):
            call = call.of(call.features.clone())
        return call.args, call.kwargs

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str) -> Any:
        def hidden(y: Tensor) -> Tensor:
            poison[path] = (torch.full_like(y, torch.nan), y)
            return poison[path][0]

        features = Call(args, kwargs).features
        if path in hosts and isinstance(features, Tensor) and features is not next(tensors_of(output), None):
            features.fill_(torch.nan)
        return map_output(output, hidden) if path in previous.values() else None

    handles = []
    for path in dict.fromkeys((*passed, *hosts)):
        module = survey.modules[path]
        handles.append(module.register_forward_pre_hook(with_path(begin, path), with_kwargs=True))
        # Before all other hooks: those that collect features (transformers' do) are to see NaN too.
        handles.append(module.register_forward_hook(with_path(end, path), with_kwargs=True, prepend=True))
    try:
        with preserved(survey.model), torch.inference_mode(False), torch.no_grad():
            final = forward(survey.model, survey.example)
    except SiteError as error:
        cause = error.__cause__ if isinstance(error.__cause__, SiteError) else error
        reason = f"prompts cannot go from block to block: {cause.reason}"
        raise SiteError(reason, where=cause.where, remedy="Use deep=True") from error
    finally:
        for handle in handles:
            handle.remove()
    if any(bool(t.isnan().any()) for t in tensors_of(final) if t.is_floating_point()):
        raise SiteError(
            "the model collects features where prompts are among them",
            where=blocks_in_order[0],
            remedy="Use deep=True" if through else "Use its last features alone",
        )
    return calls
