"""GLoRA: "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning" (arXiv 2306.07967).

    W' = W + W * A + B,   b' = b + b * D + E + W c      (* entry by entry)

on every projection of a block. A and B are of low rank, a value for each output or one value in all; c of low rank (as
a product) or free; D and E a value for each output or one in all; each can be left out. Every path is zero at the
start: the identity. Merged as written; a layer without a bias gets A and B alone.

The paper finds the form of each path in each layer by an evolutionary search over a super-net. The search is not part
of the method here: one choice holds for all layers, by default the fullest. Layouts: channels last and channels first,
and ``nn.MultiheadAttention``'s packed projection; in a convolution A and B have its kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from refold.adapters.modulated import PATHS, Modulated
from refold.errors import SiteError
from refold.methods.base import Plan, require
from refold.methods.weight import WeightMethod
from refold.sites import Site, Skipped
from refold.survey import Survey

__all__ = ["GLoRA", "fitting"]


@dataclass(frozen=True)
class GLoRA(WeightMethod):
    """Weights and biases multiplied and added to, and a prompt; merges exactly.

    Args:
        rank: r of the low-rank paths.
        a, b: factor and addition of the weight: ``"lora"``, ``"vector"``, ``"scalar"`` or ``"none"``.
        c: the prompt: ``"lora"``, ``"vector"`` or ``"none"``.
        d, e: factor and addition of the bias: ``"vector"``, ``"scalar"`` or ``"none"``.
        sites: roles or module paths (``*`` allowed); None is every projection of attention and MLP where the
            backbone has these, else every Linear and every channel-mixing convolution.

    Raises:
        SiteError: a hyper-parameter is out of range.

    Use it where time for choosing is no matter: validation data can tell which of the paths a task needs.
    """

    rank: int = 4
    a: str = "lora"
    b: str = "lora"
    c: str = "lora"
    d: str = "vector"
    e: str = "vector"
    sites: tuple[str, ...] | str | None = None

    summary: ClassVar[str] = "weights and biases multiplied and added to, and a prompt"
    paper: ClassVar[str] = "arXiv 2306.07967"
    shifts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, forms in PATHS.items():
            wants = ", ".join(map(repr, (*forms, "none")))
            require(self, name, getattr(self, name) in (*forms, "none"), f"one of {wants}")
        require(self, "a", any(getattr(self, name) != "none" for name in PATHS), 'other than "none" if all others are')

    def paths(self, site: Site) -> dict[str, str]:
        """The paths that have a place in the site's layer, and their forms."""
        chosen = {name: getattr(self, name) for name in PATHS}
        return fitting({name: form for name, form in chosen.items() if form != "none"}, site)

    def plan(self, survey: Survey) -> Plan:
        plan = super().plan(survey)
        reason = "the layer has no bias for the chosen paths"
        empty = tuple(Skipped(site.path, reason) for site in plan.sites if not self.paths(site))
        if empty and self.sites is not None:
            raise SiteError(reason, where=empty[0].path, remedy="Choose another layer, or a path a or b")
        return Plan(tuple(site for site in plan.sites if self.paths(site)), plan.skipped + empty)

    def build(self, site: Site, device: torch.device | None, dtype: torch.dtype | None) -> Modulated:
        return Modulated(
            site.weight_shape,
            self.rank,
            self.paths(site),
            channel_dim=site.channel_dim,
            device=device,
            dtype=dtype,
        )


def fitting(paths: Mapping[str, str], site: Site) -> dict[str, str]:
    """Those of the ``paths`` that have a place in the site's layer: its own bias can be multiplied, a new one not."""
    target = "none" if site.shift is None else site.shift.target
    places = {"none": "ab", "new_bias": "abce"}.get(target, "abcde")
    return {name: form for name, form in paths.items() if name in places}
