"""Query, key and value in an attention's projection, joint or separate: which rows of which layer they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from refold.adapters import RowBlocks, WeightAdapter
from refold.errors import SiteError
from refold.methods.base import Plan
from refold.methods.weight import WeightMethod, noted
from refold.roles import PARTS
from refold.sites import Site, Skipped
from refold.survey import Survey, matches

__all__ = ["PartsMethod", "rows_of"]

_NAMES = {"q": "query", "k": "key", "v": "value"}


def rows_of(site: Site, wanted: str) -> dict[str, tuple[int, int]] | None:
    """First row and end of each ``wanted`` part (letters of "qkv") of the site's layer, in ascending order.

    {} for a layer that was chosen by its role and has none of them, such as a separate key; None where nothing tells
    parts: the layer is meant as a whole.
    """
    for letters, patterns in PARTS.items():
        if not any(matches(site.path, pattern) for pattern in patterns):
            continue
        if len(letters) == 1:
            return {letters: (0, site.out_width)} if letters in wanted else {} if site.role else None
        if site.out_width == len(letters) * site.width:
            spans = {letter: (i * site.width, (i + 1) * site.width) for i, letter in enumerate(letters)}
            return {letter: rows for letter, rows in spans.items() if letter in wanted}
    return None


@dataclass(frozen=True)
class PartsMethod(WeightMethod):
    """Base of methods with a map of its own for each of some parts of the attention's projection."""

    #: Letters of the parts that are adapted: of "qkv".
    letters: ClassVar[str]

    def plan(self, survey: Survey) -> Plan:
        plan = super().plan(survey)
        sites, skipped = [], list(plan.skipped)
        for site in plan.sites:
            rows = rows_of(site, self.letters)
            try:
                if rows is not None and len(rows) > 1:
                    survey.require_blocks(site.path)
            except SiteError as error:
                skipped.append(Skipped(site.path, error.reason))
                continue
            if rows != {}:
                sites.append(self._told(site))
        return Plan(tuple(sites), tuple(skipped))

    def _told(self, site: Site) -> Site:
        """With a note on the rows that are adapted, where these are not all or nothing told them apart."""
        rows = rows_of(site, self.letters)
        if rows is None:
            unknown = site.role == "attention" and site.out_width != site.width
            return noted(site, "its query, key and value are not told apart: all rows are adapted") if unknown else site
        if sum(stop - start for start, stop in rows.values()) == site.out_width:
            return site
        return noted(site, f"rows of {' and '.join(_NAMES[letter] for letter in rows)}")

    def by_parts(self, site: Site, make: Callable[[tuple[int, ...], str], WeightAdapter]) -> WeightAdapter:
        """One adapter for the site, of as many as it has parts; ``make(weight shape, letter or "")`` makes each."""
        rows, inside = rows_of(site, self.letters), site.weight_shape[1:]
        if rows is None or (len(rows) == 1 and (0, site.out_width) in rows.values()):
            return make(site.weight_shape, "".join(rows or ""))
        blocks = [(start, stop, make((stop - start, *inside), letter)) for letter, (start, stop) in rows.items()]
        return RowBlocks(blocks, channel_dim=site.channel_dim)
