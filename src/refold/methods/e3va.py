"""E3VA: "Parameter-efficient is not sufficient: Exploring Parameter, Memory, and Time Efficient Adapter Tuning for
Dense Predictions" (arXiv 2306.09729).

    h <- h + A(z),   A(z) = U1 U2 GELU(D1 D2 z + p) + q      for the result z of every attention and every MLP
    h <- D(h)                                                with the backbone's own down-sampling D between stages
    LN(h + y) in place of y                                  where the model reads a block's result y out

A highway beside the frozen backbone: it reads, and gives nothing back before a stage is read out, so that the backbone
records no graph; kept for a backward pass are the features z that the adapters read. D2 and U2 have the ``rank``, the
bottleneck is ``width / reduction`` wide. U1 and q zero: the backbone's features, normed, at the start. With rank 16 and
reduction 2 an adapter has 49.5 C parameters; with a LayerNorm for each of the four maps 1,195,008 on Swin-B and
1,792,512 on Swin-L, read out by stages (``features_only`` in timm). A classifier reads the last block out alone. It
does not fold.

The equations are a reconstruction: the paper's own could not be read here. Known of it are the taps behind W-MSA and
MLP, the two low-rank projections, adapters side by side along the highway, inherited down-sampling layers, and the
trainable norms in front of the neck; these sizes give its printed counts (1.20M, 1.79M) to the last digit, which does
not prove the structure. What it leaves open are hyper-parameters: ``start`` (what the state begins as), ``skip``
(whether the backbone's own features are added where they are read out) and ``tap`` (a branch's result before or after
it is added to the residual stream). A benchmark (docs/dense.md) found none of the eight clearly better than the others.
Without ``skip`` and with an empty start, U1 starts at random.

A backbone without attention and MLP roles (ConvNeXt) has one tap for each residual branch. A plain ViT has no
down-sampling: one highway of one scale. Layouts: tokens, (B, H, W, C) and (B, C, H, W). Gradient checkpointing is
refused: there is nothing for it to save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch

from refold.adapters import Adapter
from refold.adapters.highway import Highway, Joint, Junction, Ramp, ReadOut
from refold.adapters.ladder import chain
from refold.errors import SiteError
from refold.junctions import between_stages, continuing, read_out
from refold.methods.base import Method, Plan, is_count, require
from refold.methods.weight import check_usual
from refold.places import block_site, blocks, branch_sites, spatial
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["E3VA"]

_RECOMPUTES = ("inside", "taps", "nothing")
_STARTS, _TAPS = ("zero", "stem"), {"branch": "output", "stream": "sum"}


@dataclass(frozen=True)
class E3VA(Method):
    """Low-rank adapters on a highway beside the backbone, of which autograd keeps only what they read.

    Args:
        rank: of both projections of an adapter.
        reduction: how many times narrower than the features an adapter's bottleneck is.
        start: ``"zero"``, or ``"stem"`` for the features that enter the first block.
        skip: whether the backbone's own features are added where they are read out.
        tap: ``"branch"`` reads what a residual branch gives, ``"stream"`` what leaves it: stream plus branch.
        recompute: what is computed again in the backward pass instead of being kept: ``"inside"`` an adapter's own
            parts, ``"taps"`` the features that adapters read as well, by one more forward of the model, and the state
            from its codes, ``"nothing"``. Compiled by torch, ``"taps"`` keeps what ``"inside"`` keeps.
        sites: roles, or paths (``*`` allowed) of residual branches that fill the state; None is attention and MLP.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for dense prediction where full tuning does not fit: a sixth to a third of its memory on Swin.
    """

    rank: int = 16
    reduction: int = 2
    start: str = "zero"
    skip: bool = True
    tap: str = "branch"
    recompute: str = "inside"
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "low-rank adapters on a highway beside a backbone without a graph"
    paper: ClassVar[str] = "arXiv 2306.09729"
    tasks: ClassVar[str] = "detection, segmentation"
    folds: ClassVar[str] = "no"

    def __post_init__(self) -> None:
        check_usual(self)
        require(self, "reduction", is_count(self.reduction), "a positive integer")
        require(self, "start", self.start in _STARTS, f"one of {', '.join(_STARTS)}")
        require(self, "tap", self.tap in _TAPS, f"one of {', '.join(_TAPS)}")
        require(self, "skip", isinstance(self.skip, bool), "True or False")
        require(self, "recompute", self.recompute in _RECOMPUTES, f"one of {', '.join(_RECOMPUTES)}")

    def plan(self, survey: Survey) -> Plan:
        row = spatial(survey, blocks(survey))
        ends = read_out(survey, row)
        row = row[: row.index(ends[-1]) + 1]
        found, skipped = branch_sites(survey, self.sites, ("attention", "mlp"), _TAPS[self.tap])
        taps: dict[str, list[Site]] = {path: [] for path in row}
        for site in found:
            around = next((path for path in row if site.path == path or site.path.startswith(f"{path}.")), None)
            if around is None:
                skipped.append(Skipped(site.path, "it lies in no block that leads to what the model reads out"))
            else:
                taps[around].append(replace(site, tag="tap"))
        first = next((path for path in row if taps[path]), None)
        if first is None:
            raise SiteError("no residual branch lies in its blocks", where=type(survey.model).__name__)
        if survey.modules[first] is not survey.modules[row[0]]:
            skipped += [Skipped(path, "it has no residual branch") for path in row[: row.index(first)]]
            row = row[row.index(first) :]
        shapes = survey.trace.shapes
        changes = [(at, following) for at, following in pairwise(row) if shapes[at] != shapes[following]]
        joints = between_stages(survey, changes) if changes else {}
        following = dict(pairwise(row))
        sites: list[Site] = []
        for path in row:
            sites += taps[path]
            if path in ends:
                sites.append(self._read_out(survey, path, following.get(path)))
            sites += [
                replace(block_site(survey, step, "again"), role="joint", tag="joint") for step in joints.get(path, ())
            ]
        if self.start == "stem":
            sites.insert(0, replace(self._ramp(survey, sites[0]), role="ramp", tag="ramp"))
        return Plan(tuple(sites), tuple(skipped))

    @staticmethod
    def _ramp(survey: Survey, tap: Site) -> Site:
        """Where the features are seen that enter the first block: at the start of its first branch."""
        (site,), _ = branch_sites(survey, tap.path, (), "stream")
        return site

    @staticmethod
    def _read_out(survey: Survey, path: str, following: str | None) -> Site:
        site = block_site(survey, path, "readout")
        assert site.route is not None
        readers = continuing(survey, path, following) if following else ()
        return replace(site, role="read out", tag="read", route=replace(site.route, readers=readers))

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Highway:
        if site.role == "read out":
            return ReadOut(site.width, skip=self.skip, device=device, dtype=dtype)
        if site.role in ("ramp", "joint"):
            return Ramp() if site.role == "ramp" else Joint(recompute=self.recompute == "taps")
        return Junction(
            site.width,
            max(site.width // self.reduction, 1),
            self.rank,
            empty=self.skip or self.start != "zero",
            recompute=self.recompute,
            device=device,
            dtype=dtype,
        )

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        chain(adapter for adapter in adapters.values() if isinstance(adapter, Highway))
