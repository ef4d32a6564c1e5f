"""VPT: "Visual Prompt Tuning" (arXiv 2203.12119).

    shallow   [c, Z, E] = L_i([c, Z, E])   for every block L_i, Z = P before the first
    deep      [c, _, E] = L_i([c, P_i, E])

p learned tokens behind class and register tokens, whose results are kept from block to block (shallow, p d
parameters) or dropped, with new ones for each of the L blocks (deep, L p d): with p = 100 on ViT-B/16 76,800 and
921,600. Start: uniform in +-sqrt(6 / (3 P^2 + d)), P^2 being the pixels of a patch: the kernel of the first
convolution, 16 x 16 if there is none. It does not fold: the sequence is longer.

Deep, a block takes its prompts out of its own result, which is what replacing them before the next comes to. So
nothing outside of blocks ever sees them: no pool, no convolution between blocks, no feature collected behind one.

Places: rotations leave prompts alone as they do class tokens, a bias by relative position or a mask is zero for them.
Blocks on maps (Swin): in every window of the attention, behind its norm. Shallow, their mean over the windows goes on
through the MLP to the next block, and they end with the first stage, the paper ignoring prompts in patch merging.
Every block is proved to take tokens as tokens (see :mod:`refold.prompting`), or refused.

Deviations from the released code, on purpose: each width has its own bound at the start (there the first stage's, for
all of Swin); prompts of Swin stay with their image (there its windows mix those of a batch), do not go on fourfold
through patch merging, and are not dropped by its drop path. Layouts: tokens (B, N, C); maps with window attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from refold.adapters.prompts import Prompts
from refold.errors import SiteError
from refold.methods.base import Method, Plan, are_sites, is_count, is_number, require
from refold.methods.overrides import Sizes, are_sizes, as_tuples, require_matched, size_at
from refold.prompting import TokenHost, prove, token_hosts
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["VPT"]

#: Attach runs blocks with that many, and files of strangers say how many: attention over them must stay small.
_MOST = 1024


@dataclass(frozen=True)
class VPT(Method):
    """Learned tokens in the sequence of every block, or from the first block on.

    Args:
        tokens: p, at most 1024; the paper has up to 200.
        deep: new prompts for every block; False lets those of the first go through all.
        dropout: of the prompts, in training only.
        sites: paths of blocks or of modules around them (``*`` allowed); None is all of them.
        overrides: ``(path, tokens)`` of blocks that differ, by their path as ``explain`` shows it (``*`` allowed);
            the first that matches holds. Deep only.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where no layer may be touched: all it adds are tokens. Every inference pays for attention over them.
    """

    tokens: int = 10
    deep: bool = True
    dropout: float = 0.0
    sites: tuple[str, ...] | str | None = None
    overrides: Sizes = ()

    summary: ClassVar[str] = "learned tokens in the sequence"
    paper: ClassVar[str] = "arXiv 2203.12119"
    tasks: ClassVar[str] = "classification, segmentation"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        require(self, "tokens", is_count(self.tokens) and self.tokens <= _MOST, f"a positive integer up to {_MOST}")
        require(self, "deep", isinstance(self.deep, bool), "True or False")
        require(self, "dropout", is_number(self.dropout, 0.0, 0.999), "in [0, 1)")
        require(self, "sites", are_sites(self.sites), "None, a path, or a tuple of them")
        object.__setattr__(self, "overrides", as_tuples(self.overrides))
        fits = are_sizes(self.overrides) and all(tokens <= _MOST for _, tokens in self.overrides)
        wants = f"a tuple of (path, tokens up to {_MOST})" if self.deep else "empty: shallow prompts are one set"
        require(self, "overrides", fits and (self.deep or not self.overrides), wants)

    def plan(self, survey: Survey) -> Plan:
        hosts, skipped = token_hosts(survey, self.sites)
        ended: list[Skipped] = []
        if not self.deep:
            hosts, ended = _first_stage(hosts)
        paths = [host.site.path for host in hosts]
        require_matched([pattern for pattern, _ in self.overrides], paths)
        counts = {path: size_at(path, self.overrides, self.tokens) for path in paths}
        hosts, idle = prove(survey, hosts, counts, through=not self.deep)
        sites = [host.site for host in hosts] if self.deep else _through(hosts)
        return Plan(tuple(sites), (*skipped, *ended, *idle))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Prompts:
        assert site.route is not None
        bound = math.sqrt(6 / (3 * (site.route.patch or 256) + site.width))
        tokens = size_at(site.path, self.overrides, self.tokens)
        return Prompts(site.width, tokens, bound, self.dropout, device=device, dtype=dtype)


def _first_stage(hosts: list[TokenHost]) -> tuple[list[TokenHost], list[Skipped]]:
    """The hosts up to where the features get another width, which prompts do not."""
    width = hosts[0].site.width
    end = next((number for number, host in enumerate(hosts) if host.site.width != width), len(hosts))
    again = next((host for host in hosts[end:] if host.site.width == width), None)
    if again is not None:
        raise SiteError("blocks of several widths take turns", where=again.site.path, remedy="Use deep=True, or sites=")
    reason = "prompts end with the first stage: the paper ignores them where patches are merged"
    return hosts[:end], [Skipped(host.site.path, reason) for host in hosts[end:]]


def _through(hosts: list[TokenHost]) -> list[Site]:
    """The sites of one set of prompts that goes through all hosts."""
    sites: list[Site] = []
    for number, host in enumerate(hosts):
        sites.append(host.site)
        if host.site.route is not None and host.site.route.source and number < len(hosts) - 1:
            if host.mlp is None:
                raise SiteError(
                    "no MLP behind its attention takes prompts on", where=host.block, remedy="Use deep=True"
                )
            sites.append(host.mlp)
    first, *others = [
        replace(site, route=None if site.route is None else replace(site.route, span=span))
        for site, span in zip(sites, ["first", *["inside"] * (len(sites) - 2), "last"], strict=False)
    ]
    if not others:
        return sites
    note = f"the prompts of {first.path} go on"
    return [first, *(replace(site, shares=first.path, note=note) for site in others)]
