"""The picture of a method: one block of a backbone as a line of layers, with everything its plan puts there.

Drawn from the survey and the plan alone: layers in the order of the forward, residual branches as autograd's graph
shows them, an adapter where its site's slot says that it reads and adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from refold.methods import Plan
from refold.places import blocks
from refold.residuals import Branch
from refold.sites import Site
from refold.survey import Survey

__all__ = ["draw", "places"]

#: Slot -> colour, and what an adapter there does. The first group stands in the line, the second below it.
SLOTS = {
    "input": ("#0072b2", "on what a layer reads"),
    "output": ("#e69f00", "on what a layer or module gives"),
    "before": ("#56b4e9", "on the stream, before a branch"),
    "sum": ("#d55e00", "on the stream, behind a sum"),
    "tokens": ("#999933", "tokens put in, and taken out"),
    "weight": ("#009e73", "on a layer's weight"),
    "parallel": ("#cc79a7", "beside a module: reads what it reads"),
    "stream": ("#882255", "beside a branch: reads the stream"),
    "normed": ("#aa4499", "beside a branch: reads the stream behind the norm"),
    "readout": ("#117733", "in place of what is read out of the backbone"),
    "again": ("#88ccee", "runs a module of the backbone once more"),
}
#: Those that are read and added at the ends of a residual branch.
BRANCHES = ("before", "sum", "stream", "normed")
TRAINED = "#f2c14e"
STEP, LINE, BOX, GAP = 64, 96, 30, 16  # width of an item; height of the line; height of a box; between items
LOW, ROW = LINE + 34, 36  # lower edge of a block's frame; from row to row of adapters below it


@dataclass
class Item:
    """Something in the line: a layer ("layer"), an adapter (its slot), a sum ("plus") or an omission ("dots").

    Attributes:
        label, path: what is written on it; the module's path, "" for what is none.
        x: its left edge.
        trained: share of its parameters that are trained in place.
    """

    kind: str
    label: str = ""
    path: str = ""
    x: float = 0.0
    trained: float = 0.0

    @property
    def width(self) -> float:
        return {"plus": 18.0, "dots": 24.0}.get(self.kind, float(STEP))

    @property
    def end(self) -> float:
        return self.x + self.width


def shown_block(survey: Survey, plan: Plan) -> str:
    """The block with most of the plan in it, a plain one (all its branches residual) before others, then the first."""
    here = Counter(_block_of(path, survey) for path in _touched(plan))
    shapes = {path: len(_branches(survey, path)) for path in blocks(survey)}
    return max(blocks(survey), key=lambda path: (here[path], shapes[path]))


def _touched(plan: Plan) -> list[str]:
    return [site.path for site in plan.sites] + [name.rpartition(".")[0] for name in plan.trained]


def _block_of(path: str, survey: Survey) -> str:
    return next((b for b in blocks(survey) if path == b or path.startswith(f"{b}.")), "")


def _branches(survey: Survey, block: str) -> list[Branch]:
    return [b for b in survey.trace.branches if b.exit.startswith(f"{block}.")]


def places(survey: Survey, plan: Plan) -> str:
    """All sites in words: how many, where in a block, in which slot."""
    found: Counter[tuple[str, str]] = Counter()
    for site in plan.sites:
        block = _block_of(site.path, survey)
        inside = site.path.removeprefix(block).removeprefix(".") if block else site.path
        place = f"the {site.role} branch" if site.slot in BRANCHES and site.role else f"`{inside}`"
        found[place if inside else "the block", site.slot] += 1
    return ", ".join(f"{count} x {place} ({slot})" for (place, slot), count in found.items())


# -- the line -----------------------------------------------------------------------------------------------------


def _line(survey: Survey, plan: Plan, block: str, name: str) -> list[Item]:
    """The items from left to right, with the adapters that stand in the line."""
    order = survey.trace.order
    leaves = [p for p in sorted(order, key=order.__getitem__) if not any(True for _ in survey.modules[p].children())]
    layers = [p for p in leaves if any(True for _ in survey.modules[p].parameters())]
    inside = [p for p in layers if p.startswith(f"{block}.")]
    whole = blocks(survey)
    before = [p for p in layers if order[p] < order[whole[0]]][:1]
    after = [p for p in layers if order[p] > order[whole[-1]] and not p.startswith(f"{whole[-1]}.")][-1:]
    items: list[Item] = []
    for path in before:
        items += _with_adapters(survey, plan, [path], name)
    items.append(Item("dots"))
    items += _with_adapters(survey, plan, inside, name, block)
    items.append(Item("dots"))
    for path in after:
        items += _with_adapters(survey, plan, [path], name)
    items.append(Item("layer", "head", trained=1.0))
    x = 12.0
    for item in items:
        item.x, x = x, x + item.width + GAP
    return items


def _with_adapters(survey: Survey, plan: Plan, layers: list[str], name: str, block: str = "") -> list[Item]:
    order = survey.trace.order
    around = block or layers[0]
    sites = [site for site in plan.sites if site.path == around or site.path.startswith(f"{around}.")]

    def reach(site: Site) -> tuple[str, str]:
        """First and last layer of the site's host; of a host without layers the last one called before it."""
        own = [p for p in layers if p == site.path or p.startswith(f"{site.path}.")]
        earlier = [p for p in layers if order[p] <= order.get(site.path, -1)]
        return (own[0], own[-1]) if own else (earlier[-1], earlier[-1]) if earlier else ("", "")

    branches = _branches(survey, block) if block else []
    starts = {_entry(b, layers): b for b in branches}
    ends = {next((p for p in reversed(layers) if order[p] <= order[b.exit]), ""): b for b in branches}
    items: list[Item] = []
    for path in layers:
        if path in starts:
            items += [Item("before", name) for s in sites if s.slot == "before" and s.path == starts[path].exit]
        items += [Item("tokens", name) for s in sites if s.slot == "tokens" and reach(s)[0] == path]
        items += [Item("input", name) for s in sites if s.slot == "input" and s.path == path]
        items.append(_layer(survey, plan, path, block))
        items += [Item("output", name) for s in sites if s.slot == "output" and s.path != block and reach(s)[1] == path]
        if path in ends:
            items.append(Item("plus", path=ends[path].exit))
            items += [Item("sum", name) for s in sites if s.slot == "sum" and s.path == ends[path].exit]
        items += [Item("tokens", "out") for s in sites if s.slot == "tokens" and reach(s)[1] == path]
        if block and path == layers[-1]:
            items += [Item("output", name) for s in sites if s.slot == "output" and s.path == block]
    return items


def _entry(branch: Branch, layers: list[str]) -> str:
    return next((p for p in layers if p in branch.inside), "")


def _layer(survey: Survey, plan: Plan, path: str, block: str) -> Item:
    own = list(survey.modules[path].named_parameters())
    trained = {name for name in plan.trained if name.startswith(f"{path}.")}
    label = path.rpartition(".")[2] if block else path.split(".")[0]
    if label.isdecimal():  # of a container: its name says more
        label = ".".join(path.split(".")[-2:])
    return Item("layer", label, path, trained=len(trained) / len(own))


# -- drawing ------------------------------------------------------------------------------------------------------


def draw(survey: Survey, plan: Plan, name: str) -> str:
    """An SVG of one block of the survey's backbone with the plan of the method ``name`` in it."""
    block = shown_block(survey, plan)
    items = _line(survey, plan, block, name)
    inside = [i for i in items if i.path == block or i.path.startswith(f"{block}.")]
    first, last = items.index(inside[0]), items.index(inside[-1])
    while items[first - 1].kind != "dots":
        first -= 1
    while items[last + 1].kind != "dots":
        last += 1
    drawn = [f'<path d="M 4 {LINE} H {items[-1].x}" {_STROKE}/>']
    low = LOW + (22 if any(site.slot == "weight" for site in plan.sites) else 0)
    drawn += _frames(survey, block, items, (items[first].x, items[last].end), low)
    for branch in _branches(survey, block):
        drawn += _skip(items, branch)
    for item in items:
        drawn += _shape(item)
    beside, height = _beside(survey, plan, block, items, (items[first].x, items[last].end), low, name)
    notes, height = _legend([slot for slot in SLOTS if any(slot == site.slot for site in plan.sites)], height)
    width = max(items[-1].end + 12, 520)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="sans-serif" font-size="11">\n'
        '<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join([*drawn, *beside, *notes]) + "\n</svg>\n"
    )


_STROKE = 'fill="none" stroke="#444" stroke-width="1.2"'


def _text(x: float, y: float, text: str, extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" {extra}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, fill: str, label: str, colour: str = "#fff") -> list[str]:
    size = f'font-size="{min(11, 1.6 * width / max(len(label), 1)):.3g}" fill="{colour}"'
    frame = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX}" rx="4" fill="{fill}" stroke="#444"/>'
    return [frame, _text(x + width / 2, y + BOX / 2 + 4, label, size)]


def _shape(item: Item) -> list[str]:
    top = LINE - BOX / 2
    if item.kind == "plus":
        centre = f'cx="{item.x + 9:g}" cy="{LINE}" r="9"'
        return [f'<circle {centre} fill="#fff" stroke="#444"/>', _text(item.x + 9, LINE + 5, "+", 'font-size="15"')]
    if item.kind == "dots":
        return [
            f'<rect x="{item.x:g}" y="{top:g}" width="24" height="{BOX}" fill="#fff"/>',
            _text(item.x + 12, LINE, "…"),
        ]
    if item.kind != "layer":
        return _box(item.x, top, item.width, SLOTS[item.kind][0], item.label)
    drawn = _box(item.x, top, item.width, TRAINED if item.trained == 1 else "#eee", item.label, "#222")
    if 0 < item.trained < 1:  # a part of it, such as the bias: a strip
        drawn.insert(
            1, f'<rect x="{item.x + 1:g}" y="{top + BOX - 7}" width="{item.width - 2:g}" height="6" fill="{TRAINED}"/>'
        )
    return drawn


def _frames(survey: Survey, block: str, items: list[Item], span: tuple[float, float], low: float) -> list[str]:
    """A dashed frame around the block, and a plain one around each of its parts of several layers."""
    number, top, (start, end) = len(blocks(survey)), 22, span
    drawn = [
        f'<rect x="{start - 8:g}" y="{top}" width="{end - start + 16:g}" height="{low - top}" rx="8" fill="#fafafa" '
        'stroke="#999" stroke-dasharray="4 3"/>',
        _text((start + end) / 2, 15, f"{block}, one of {number} blocks", 'fill="#444"'),
        f'<path d="M {start - 8:g} {LINE} H {end + 8:g}" {_STROKE}/>',
    ]
    parts = Counter(i.path.removeprefix(f"{block}.").split(".")[0] for i in items if i.path.startswith(f"{block}."))
    for part, count in parts.items():
        mine = [i for i in items if i.path.startswith(f"{block}.{part}.")]
        if count > 1 and mine:
            x, width = mine[0].x - 5, mine[-1].end - mine[0].x + 10
            box = f'x="{x:g}" y="{LINE - 24}" width="{width:g}" height="48" rx="6" fill="#f1f1f4" stroke="#bbb"'
            drawn[2:2] = [f"<rect {box}/>", _text(x + 14, LINE - 28, part, 'font-size="9" fill="#666"')]
    return drawn


def _skip(items: list[Item], branch: Branch) -> list[str]:
    """The stream's way past a branch, over it."""
    plus = next((i for i in items if i.kind == "plus" and i.path == branch.exit), None)
    entry = next((n for n, i in enumerate(items) if i.path and i.path in branch.inside), None)
    if plus is None or entry is None:
        return []
    x = _fork(items, entry)
    return [f'<path d="M {x:g} {LINE} V 48 H {plus.x + 9:g} V {LINE - 9}" {_STROKE}/>']


def _fork(items: list[Item], entry: int) -> float:
    """Where the stream and the branch part: before the adapters on the branch's first layer."""
    while items[entry - 1].kind == "input":
        entry -= 1
    return items[entry].x - GAP / 2


def _beside(
    survey: Survey, plan: Plan, block: str, items: list[Item], span: tuple[float, float], low: float, name: str
) -> tuple[list[str], float]:
    """The adapters below the line, each with the arrows of what it reads and where it adds; and where they end."""
    drawn: list[str] = []
    rows: list[float] = []  # right ends
    branches = {b.exit: b for b in _branches(survey, block)}
    for site in plan.sites:
        colour = SLOTS[site.slot][0]
        host = [i for i in items if i.kind == "layer" and (i.path == site.path or i.path.startswith(f"{site.path}."))]
        if site.slot == "weight" and host:
            drawn += _box(host[0].x, LINE + 17, STEP, colour, name)
            continue
        if site.slot == "parallel" and host and site.path in (block, *(i.path for i in host)):
            left, right = span if site.path == block else (host[0].x, host[0].end)
            left, right = left - GAP / 2, right + GAP / 2
        elif site.slot in ("stream", "normed") and site.path in branches:
            branch = branches[site.path]
            entry = next(n for n, i in enumerate(items) if i.path and i.path in branch.inside)
            plus = next(i for i in items if i.kind == "plus" and i.path == branch.exit)
            left = _fork(items, entry) if site.slot == "stream" else items[entry].end + GAP / 2
            right = plus.x + 9
        else:
            continue
        row = next((n for n, end in enumerate(rows) if end < left), len(rows))
        rows[row : row + 1] = [right]
        y = low + 18 + ROW * row
        middle = (left + right - STEP) / 2
        arrow = f'fill="none" stroke="{colour}" stroke-width="1.4"'
        drawn.append(f'<path d="M {left:g} {LINE} V {y + BOX / 2} H {middle:g}" {arrow}/>')
        end = LINE + (9 if site.slot != "parallel" else 0)
        drawn.append(f'<path d="M {middle + STEP:g} {y + BOX / 2} H {right:g} V {end}" {arrow}/>')
        drawn.append(
            f'<path d="M {right - 4:g} {end + 8} L {right:g} {end + 1} L {right + 4:g} {end + 8} Z" fill="{colour}"/>'
        )
        drawn += _box(middle, y, STEP, colour, name)
    return drawn, low + 12 + ROW * len(rows)


def _legend(used: Iterable[str], y: float) -> tuple[list[str], float]:
    drawn, notes = [], [*(SLOTS[slot] for slot in used), (TRAINED, "trained in place (a strip: a part of it)")]
    for number, (colour, text) in enumerate(notes):
        top = y + 6 + 16 * number
        drawn.append(f'<rect x="12" y="{top:g}" width="11" height="11" fill="{colour}" stroke="#444"/>')
        drawn.append(f'<text x="30" y="{top + 10:g}" fill="#444">{escape(text)}</text>')
    return drawn, y + 14 + 16 * len(notes)
