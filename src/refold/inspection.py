"""explain: what is attached where, what merges, and where each shift goes; describe: what its file should say."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from refold.hosting import adapter_parameters, adapters_of
from refold.preprocessing import Preprocessing
from refold.state import Record, get_tensor, require_state

__all__ = ["Explanation", "Row", "describe", "description", "explain"]


@dataclass(frozen=True)
class Row:
    """One line of :func:`explain`.

    Attributes:
        path: module path; for parts trained in place, of the module that owns the parameters.
        slot: ``"input"``, ``"output"``, ``"weight"``, ``"in place"``, ``"head"``, or ``"-"`` for a layer that was
            left out.
        role: the paper's name of the place, "" if none.
        width: channels the adapter sees; 0 where there is no adapter.
        parameters: number of trainable values here.
        mergeable: whether this part ends up in the backbone's own weights.
        reason: why it does, does not, or was left out.
        shift: where the constant part of the map goes.
    """

    path: str
    slot: str
    role: str
    width: int
    parameters: int
    mergeable: bool
    reason: str
    shift: str


@dataclass(frozen=True)
class Explanation:
    """The rows of one adapter; prints as a table.

    Attributes:
        name, method: the adapter's name and its method as text.
        state: ``"attached"`` or ``"merged"``.
        rows: one a site, then what trains in place, the head, and the layers left out.
        total: parameters of the backbone without adapters.
    """

    name: str
    method: str
    state: str
    rows: tuple[Row, ...]
    total: int

    @property
    def trainable(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def adapter_parameters(self) -> int:
        """Trainable values outside the head."""
        return sum(row.parameters for row in self.rows if row.slot != "head")

    def __str__(self) -> str:
        header = ("path", "slot", "role", "width", "params", "merges", "shift", "reason")
        lines = [header] + [
            (
                r.path,
                r.slot,
                r.role,
                str(r.width or ""),
                f"{r.parameters:,}",
                "yes" if r.mergeable else "no",
                r.shift,
                r.reason,
            )
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        body = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        share = 100 * self.trainable / max(self.total, 1)
        title = f"{self.name}: {self.method}, {self.state}; {self.trainable:,} of {self.total:,} train ({share:.2f} %)"
        return f"{title}\n{body}"


def explain(model: nn.Module) -> Explanation:
    """Verdicts on the adapter in use (or folded in), one row a site.

    Raises:
        SiteError: nothing is attached.
    """
    state = require_state(model, "explain", sharded=True)
    record = state.record()
    name = state.active or state.merged or ""
    rows = _site_rows(model, record, name, merged=state.merged is not None) + _owned_rows(model, record)
    rows += [Row(s.path, "-", "", 0, 0, False, f"left out: {s.reason}", "") for s in record.skipped]
    adapters = adapter_parameters(model)
    total = sum(p.numel() for p in model.parameters() if id(p) not in adapters)
    return Explanation(name, record.method.describe(), "merged" if state.merged else "attached", tuple(rows), total)


def _site_rows(model: nn.Module, record: Record, name: str, *, merged: bool) -> list[Row]:
    adapters = record.parked if merged else adapters_of(model, record.sites, name)
    rows = []
    for site in record.sites:
        adapter = adapters[site.key]
        count = 0 if site.shares else sum(p.numel() for p in adapter.parameters())
        folds = site.route is None
        verdict = "folds exactly" if folds else "stays beside the backbone: it is not linear, or mixes tokens"
        reason = "; ".join(filter(None, (verdict, site.note)))
        shift = "" if site.shift is None else str(site.shift)
        rows.append(Row(site.path, site.slot, site.role, site.width, count, folds, reason, shift))
    return rows


def _owned_rows(model: nn.Module, record: Record) -> list[Row]:
    by_module: dict[tuple[str, str], int] = defaultdict(int)
    for name in record.trainable:
        path = name.rpartition(".")[0]
        in_head = any(name == h or name.startswith(f"{h}.") for h in record.head)
        tensor = get_tensor(model, name)
        # A head may be left as it is; what trained in place is frozen by a merge, and still counts.
        trains = 0 if tensor is None or (in_head and not tensor.requires_grad) else tensor.numel()
        by_module[path, "head" if in_head else "in place"] += trains
    reasons = {True: "left as it is", False: "trained in the backbone's own tensors"}
    return [
        Row(path, slot, "", 0, count, True, reasons[slot == "head" and not count], "")
        for (path, slot), count in by_module.items()
    ]


def describe(
    model: nn.Module,
    *,
    backbone: str | None = None,
    classes: list[str] | None = None,
    preprocessing: Preprocessing | None = None,
    task: str | None = None,
    **extra: Any,
) -> None:
    """Tell refold what an adapter file should say about the active adapter; None leaves a field as it is.

    Args:
        backbone: the spec the backbone was loaded from.
        classes: class names in the order of the head's outputs.
        preprocessing: evaluation preprocessing.
        task: ``"classify"``, ``"multilabel"`` or ``"regress"``.
        extra: further values that fit in JSON.
    """
    info = require_state(model, "describe", sharded=True).record().info
    given = {"backbone": backbone, "classes": classes, "preprocessing": preprocessing, "task": task, **extra}
    info.update({key: value for key, value in given.items() if value is not None})


def description(model: nn.Module) -> dict[str, Any]:
    """What :func:`describe` was told about the active adapter."""
    return dict(require_state(model, "read the description", sharded=True).record().info)
