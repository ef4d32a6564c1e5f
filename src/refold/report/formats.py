"""Numbers as people read them. Every function returns an en dash for None."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["NONE", "compact", "count", "duration", "metric", "percent", "plain", "scientific", "size"]

NONE = "–"
_SHARES = frozenset({"accuracy", "balanced_accuracy", "top5", "pixel_accuracy", "mean_accuracy"})


def count(value: int | None) -> str:
    """Whole numbers with their thousands set apart: 221,184."""
    return NONE if value is None else f"{value:,}"


def compact(value: float | None, unit: str = "") -> str:
    """Three digits and a decimal prefix: 221 k, 22.1 M, 4.61 G."""
    if value is None:
        return NONE
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def size(value: float | None) -> str:
    """Bytes in decimal units, as disks and downloads count them: 959 kB, 88.3 MB."""
    return compact(value, "B")


def duration(seconds: float | None) -> str:
    """48 s, 3 min 12 s, 1 h 02 min; under ten seconds with a decimal."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1]: 85.3 %."""
    return NONE if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def scientific(value: float | None) -> str:
    """Differences: 2.1e-15, and 0 for nothing at all."""
    if value is None:
        return NONE
    return "0" if value == 0 else f"{value:.1e}"


def metric(name: str, value: float | None) -> str:
    """A metric by its name: accuracies in per cent, all others with three or four digits."""
    if value is None or math.isnan(value):
        return NONE
    if name in _SHARES:
        return percent(value)
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def plain(value: object) -> str:
    """A setting of any kind: yes and no for booleans, lists joined, records as name=value."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or NONE
    return str(value)
