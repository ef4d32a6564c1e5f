"""Names beside the dots of a figure, placed where they hide the least of what is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

__all__ = ["name_dots"]

_ARMS = (5, 10, 18, 28, 40)  # points from a dot to its name
_TURNS = [(math.cos(turn * math.pi / 6), math.sin(turn * math.pi / 6)) for turn in range(12)]
_DOT, _FAR = 4, 12  # a dot's radius; from how far on a line leads to the name, in points


def name_dots(axes: Axes, dots: Sequence[tuple[str, float, float]], *, size: float = 7.0) -> None:
    """Write each name near its dot, with a thin line to a distant one. The layout of the figure must be final.

    Args:
        axes: with its limits and scales.
        dots: name, x and y in data coordinates.
        size: of the letters, in points.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    unit = figure.dpi / 72  # pixels a point
    places = axes.transData.transform([(x, y) for _, x, y in dots])
    others = [Bbox.from_bounds(x - _DOT * unit, y - _DOT * unit, 2 * _DOT * unit, 2 * _DOT * unit) for x, y in places]
    frame = axes.get_window_extent()
    for index, (name, x, y) in enumerate(dots):
        text = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", ha="center", va="center", fontsize=size)
        extent = text.get_window_extent()
        taken = others[:index] + others[index + 1 :]

        def cost(choice: tuple[float, float, float], place=places[index], extent=extent, taken=taken) -> float:
            box = _box(choice, place, extent, unit)
            outside = box.width * box.height - _overlap(box, frame)
            return sum(_overlap(box, other) for other in taken) + 3 * outside + choice[0] * unit

        best = min(((arm, *turn) for arm in _ARMS for turn in _TURNS), key=cost)
        box = _box(best, places[index], extent, unit)
        others.append(box)
        shift = ((box.x0 + box.x1) / 2 - places[index][0], (box.y0 + box.y1) / 2 - places[index][1])
        text.set_position((shift[0] / unit, shift[1] / unit))
        if best[0] > _FAR:
            end = (best[0] * best[1], best[0] * best[2])
            line = {"arrowstyle": "-", "color": text.get_color(), "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, y), end, textcoords="offset points", arrowprops=line)


def _box(choice: tuple[float, float, float], place: Sequence[float], extent: Bbox, unit: float) -> Bbox:
    """The name's box, in pixels, at the end of an arm (length, cosine, sine), on the far side of it."""
    from matplotlib.transforms import Bbox

    arm, cosine, sine = choice
    x = place[0] + arm * unit * cosine + cosine * extent.width / 2
    y = place[1] + arm * unit * sine + sine * extent.height / 2
    return Bbox.from_bounds(x - extent.width / 2, y - extent.height / 2, extent.width, extent.height)


def _overlap(a: Bbox, b: Bbox) -> float:
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0.0) * max(height, 0.0)
