"""LoRA: "Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).

    W' = W + s B A,   A Kaiming-uniform (a = sqrt 5), B zero; s is the paper's alpha / r.

Default place: the attention's joint qkv projection, one A and one B, the variant of the VTAB literature (NOAH);
``rows=("q", "v")`` is the original's choice of query and value, each with an A and a B of its own.
On a convolution A keeps the kernel and the geometry (stride, padding and its mode, dilation) and B is
pointwise. Bias unchanged. Layouts: channels last and channels first, and ``nn.MultiheadAttention``'s packed
projection.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch

from refold.adapters import LowRank, RowBlocks
from refold.errors import SiteError
from refold.methods.base import Method, Plan, are_sites, is_count, is_number, require
from refold.methods.overrides import as_tuples, require_matched
from refold.sites import Site
from refold.survey import Survey

__all__ = ["LoRA"]


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank addition to a frozen weight; merges exactly.

    Args:
        rank: r.
        scale: s, what other libraries write as ``alpha / r``.
        dropout: on the input of A, in training only; not available where the weight itself is replaced
            (``nn.MultiheadAttention``, grouped convolutions), which is refused.
        sites: roles or module paths (``*`` allowed); None is the attention's projection where the backbone has
            one, else every Linear and every channel-mixing convolution.
        rows: output rows that are adapted, None for all. ``("q", "v")`` are the first and the last third, query and
            value of a joint projection; ``("0:96",)`` are rows 0 to 95. Each block has an A and a B of its own.
        overrides: ``(module path, rank, scale)`` of layers that differ (``*`` allowed); the first that matches holds.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it for what it is known to: adapters that other libraries read and write (``save_peft``), parts of a joint
    projection (``rows``), and layers that differ in rank.
    """

    rank: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    sites: tuple[str, ...] | str | None = None
    rows: tuple[str, ...] | None = None
    overrides: tuple[tuple[str, int, float], ...] = ()

    summary: ClassVar[str] = "low-rank addition to a frozen weight"
    paper: ClassVar[str] = "arXiv 2106.09685"
    tasks: ClassVar[str] = "language, classification"
    adapter: ClassVar[type[LowRank]] = LowRank

    def __post_init__(self) -> None:
        require(self, "rank", is_count(self.rank), "a positive integer")
        require(self, "scale", is_number(self.scale, -1e6, 1e6) and self.scale != 0, "a number other than 0")
        require(self, "dropout", is_number(self.dropout, 0.0, 0.999), "in [0, 1)")
        require(self, "sites", are_sites(self.sites), "None, a role or path, or a tuple of them")
        require(self, "rows", are_rows(self.rows), 'None or a tuple of "q", "k", "v" and "first:end"')
        object.__setattr__(self, "overrides", as_tuples(self.overrides))
        require(self, "overrides", are_overrides(self.overrides), "a tuple of (path, rank, scale)")

    def at(self, path: str) -> tuple[int, float]:
        """Rank and scale of the layer at ``path``."""
        for pattern, rank, scale in self.overrides:
            if fnmatchcase(path, pattern):
                return rank, scale
        return self.rank, self.scale

    def plan(self, survey: Survey) -> Plan:
        layers, skipped = survey.resolve(self.sites, ("attention",), moved=False)
        require_matched([pattern for pattern, _, _ in self.overrides], [layer.path for layer in layers])
        sites = tuple(survey.weight_site(layer) for layer in layers)
        for site in sites:
            self._spans(site)
            if set(self.rows or ()) & set(_PARTS):
                survey.require_blocks(site.path)
            if self.dropout and site.owner is not None:
                raise SiteError(
                    f"dropout={self.dropout} has no place: the layer's weight is replaced, its input is out of reach",
                    where=site.path,
                    remedy="Use dropout=0, or other sites",
                )
        return Plan(sites, tuple(skipped))

    def _spans(self, site: Site) -> list[tuple[int, int]]:
        """First row and end of each block of ``rows`` in the site's layer, in ascending order."""
        third, spans = site.out_width // 3, []
        for name in self.rows or ():
            if name in _PARTS and site.out_width % 3:
                reason = f"rows={name!r} needs a joint projection, and its {site.out_width} outputs are no three parts"
                raise SiteError(reason, where=site.path, remedy="Name rows as 'first:end', or other sites")
            start, stop = map(int, name.split(":")) if ":" in name else (0, third)
            shift = _PARTS.index(name) * third if name in _PARTS else 0
            spans.append((start + shift, stop + shift))
        spans.sort()
        if any(stop > following for (_, stop), (following, _) in itertools.pairwise([*spans, (site.out_width, 0)])):
            raise SiteError(
                f"rows={self.rows} overlap, or end behind its {site.out_width} outputs",
                where=site.path,
                remedy="Correct rows=, or choose other sites",
            )
        return spans

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> LowRank | RowBlocks:
        rank, scale = self.at(site.path)

        def adapter(outputs: int) -> LowRank:
            shape = (outputs, *site.weight_shape[1:])
            options = {"channel_dim": site.channel_dim, "device": device, "dtype": dtype}
            return self.adapter(shape, rank, scale, self.dropout, **options)

        if self.rows is None:
            return adapter(site.weight_shape[0])
        blocks = [(start, stop, adapter(stop - start)) for start, stop in self._spans(site)]
        return RowBlocks(blocks, channel_dim=site.channel_dim)


_PARTS = ("q", "k", "v")


def are_rows(value: object) -> bool:
    """None, or a non-empty tuple of parts and ``first:end``."""
    if value is None:
        return True
    return isinstance(value, tuple) and bool(value) and all(isinstance(v, str) and _is_rows(v) for v in value)


def _is_rows(name: str) -> bool:
    start, colon, stop = name.partition(":")
    if not colon:
        return name in _PARTS
    return start.isdecimal() and stop.isdecimal() and len(stop) < 9 and int(start) < int(stop)


def are_overrides(value: object) -> bool:
    """A tuple of ``(path, rank, scale)`` with values that LoRA itself would take."""
    return isinstance(value, tuple) and all(
        isinstance(item, tuple)
        and len(item) == 3
        and isinstance(item[0], str)
        and item[0] != ""
        and is_count(item[1])
        and is_number(item[2], -1e6, 1e6)
        and item[2] != 0
        for item in value
    )
