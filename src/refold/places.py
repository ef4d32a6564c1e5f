"""Places for adapters that do not fold: residual branches, blocks and stages of a backbone.

All of them come from what one forward showed, see :mod:`refold.residuals`; names only tell the attention's branch from
the MLP's, with the same tables as for layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from refold.channels import channel_dim
from refold.errors import SiteError
from refold.fold import KINDS, kind_of
from refold.residuals import Branch
from refold.roles import ROLES
from refold.sites import Layer, Route, Site, Skipped
from refold.survey import Survey

__all__ = [
    "block_site",
    "block_sites",
    "blocks",
    "branch_site",
    "branch_sites",
    "branches",
    "covers",
    "norm_site",
    "on_grid",
    "projection",
    "spatial",
    "stages",
    "tried",
]

T = TypeVar("T")

#: Containers whose forward calls every child: an adapter among the children would be called as well.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


# -- choosing ---------------------------------------------------------------------------------------------------


def branches(
    survey: Survey, sites: str | Iterable[str] | None, default: tuple[str, ...]
) -> tuple[list[Branch], list[Skipped]]:
    """The residual branches that ``sites`` names, in the order of the forward, and those left out with reasons.

    Args:
        sites: roles, or paths (``*`` allowed) of a branch's layers or of a module around them; None for ``default``.
        default: the roles the method's paper names. If one of them has no branch in this backbone, every branch
            with a layer that mixes channels is taken instead.

    Raises:
        SiteError: a name matches no branch, or the backbone has none.
    """
    if sites is None:
        picked = [_with_role(survey, role) for role in default]
        roles = [b for group in picked for b in group]
        found = roles if all(picked) else [b for b in _all(survey) if projection(survey, b) is not None]
    else:
        names = (sites,) if isinstance(sites, str) else tuple(sites)
        found = [branch for name in names for branch in _named(survey, name)]
    usable = [branch for branch in found if branch.exit]
    skipped = [Skipped(b.inside[-1], "no module gives the result of this residual branch") for b in found if not b.exit]
    if not usable:
        raise SiteError(
            skipped[0].reason if skipped else "the forward has no residual branches",
            where=type(survey.model).__name__,
            remedy="Choose a method that adapts layers, such as RepAdapter",
        )
    order = {id(branch.inside): number for number, branch in enumerate(_all(survey))}
    unique = {branch.inside: branch for branch in reversed(usable)}  # the first role of a branch with two
    return sorted(unique.values(), key=lambda b: order[id(b.inside)]), skipped


def _all(survey: Survey) -> list[Branch]:
    heads = survey.head
    return [
        b
        for b in survey.trace.branches
        if not any(p == h or p.startswith(f"{h}.") for p in (b.exit, b.inside[-1]) for h in heads)
    ]


def _with_role(survey: Survey, role: str) -> list[Branch]:
    """The innermost branch around each layer of the role."""
    try:
        layers, _ = survey.resolve(role, (), moved=True)
    except SiteError:
        return []
    found: dict[tuple[str, ...], Branch] = {}
    for layer in layers:
        around = [b for b in _all(survey) if layer.path in b.inside or (layer.owner or layer.path) in b.inside]
        if around:
            inner = min(around, key=lambda b: len(b.inside))
            found.setdefault(inner.inside, replace(inner, role=role))
    return list(found.values())


def _named(survey: Survey, name: str) -> list[Branch]:
    if name in ROLES:
        found = _with_role(survey, name)
        remedy = "Name paths in sites=, or leave it out"
    else:
        found = [b for b in _all(survey) if any(covers(name, path) for path in b.inside)]
        remedy = f"Branches end at {', '.join(b.exit for b in _all(survey)[:3])} ..."
    if not found:
        raise SiteError("no residual branch has this role or path", where=name, remedy=remedy)
    return found


def covers(name: str, path: str) -> bool:
    """Whether a pattern names ``path`` or a module around it."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), name) for end in range(len(parts), 0, -1))


def projection(survey: Survey, branch: Branch) -> Layer | None:
    """The last layer of a branch that mixes channels: the one that writes to the stream. None if it has none."""
    layers = [
        layer
        for layer in survey.layers.values()
        if layer.operator.folds_input and layer.operator.groups == 1 and _used_in(layer, branch)
    ]
    order = survey.trace.order
    # Of layers whose weight one module reads, such as those of nn.MultiheadAttention, the last is meant.
    return max(reversed(layers), key=lambda la: order.get(la.path, order.get(la.owner or "", -1)), default=None)


def _used_in(layer: Layer, branch: Branch) -> bool:
    return layer.path in branch.inside or (layer.owner is not None and layer.owner in branch.inside)


def blocks(survey: Survey) -> list[str]:
    """Paths of the backbone's blocks in the order of the forward: the smallest modules around whole residual branches.

    Modules of the same classes without one (their shortcut is a projection, or left out) are blocks too.

    Raises:
        SiteError: the backbone has none.
    """
    around = dict.fromkeys(_common(b.source if b.entry else b.exit, b.exit) for b in _all(survey) if b.exit)
    modules, called = survey.modules, survey.trace.order
    found = [path for path in around if path and path in called and not isinstance(modules[path], _CONTAINERS)]
    inner = [p for p in found if not any(o.startswith(f"{p}.") for o in found)]
    if not inner:
        raise SiteError("the forward has no residual blocks", where=type(survey.model).__name__)
    kinds = {type(modules[path]) for path in inner}
    alike = [path for path in called if path and type(modules[path]) in kinds]
    apart = [p for p in alike if not any(p.startswith(f"{o}.") or o.startswith(f"{p}.") for o in inner)]
    return sorted({*inner, *apart}, key=called.__getitem__)


def _common(a: str, b: str) -> str:
    """The module around both paths; for one path twice, the module around it."""
    left, right = a.split(".")[:-1], b.split(".")[:-1]
    shared = [x for x, y in zip(left, right, strict=False) if x == y]
    return ".".join(shared)


def spatial(survey: Survey, paths: Iterable[str]) -> list[str]:
    """Those of the blocks that return positions, not one vector an image as a block that pools in front of a head."""
    shapes = {path: survey.trace.shapes.get(path, (1, 2, 1)) for path in paths}
    return [path for path, shape in shapes.items() if len(shape) > 3 or (len(shape) == 3 and shape[1] > 1)]


def stages(survey: Survey, count: int = 4) -> list[str]:
    """Paths of the blocks that end a stage: the last before the features' shape changes.

    A backbone of one shape throughout (a plain ViT) is cut into ``count`` equal parts. A block that pools tokens in
    front of a head belongs to no stage.
    """
    seen = survey.trace.shapes
    paths = spatial(survey, blocks(survey))
    shapes = [seen.get(path) for path in paths]
    ends = [p for p, here, following in zip(paths, shapes, [*shapes[1:], None], strict=True) if here != following]
    if len(ends) > 1 or len(paths) <= count:
        return ends if len(ends) > 1 else paths
    return [paths[round((i + 1) * len(paths) / count) - 1] for i in range(count)]


# -- making sites -----------------------------------------------------------------------------------------------


def branch_site(survey: Survey, branch: Branch, slot: str) -> Site:
    """A site at the end of a residual branch; ``slot`` says what the adapter reads, see :class:`Site`.

    Raises:
        SiteError: no module reads the stream, or its layout is not known.
    """
    reads = slot in ("stream", "sum", "before", "normed")
    if (reads and not branch.source) or (slot == "before" and not branch.entry):
        raise SiteError("no module reads the residual stream here", where=branch.exit, remedy="Choose other sites")
    if slot == "normed" and not _keeps_shape(survey, branch.entry):
        slot = "stream"  # a branch without a norm in front reads the stream itself
    turns = reads and branch.exit in survey.trace.repeated
    shape = _shape(survey, branch.exit) if reads else survey.trace.shapes.get(branch.exit)
    if shape is None:
        raise SiteError("it is called more than once in a forward", where=branch.exit, remedy="Choose other sites")
    site = _site(survey, branch.exit, slot, shape, _width(survey, branch), branch)
    if reads:
        assert site.route is not None
        site = replace(site, route=replace(site.route, source=branch.source))
    if not turns:
        return site
    assert site.route is not None
    return replace(site, tag=branch.source.replace(".", "-"), route=replace(site.route, turns=True))


def norm_site(survey: Survey, branch: Branch) -> Site:
    """A site behind the norm with which a residual branch starts, the adapter reading what the norm gives.

    Raises:
        SiteError: the branch starts with no norm or shares it with another branch, or its layout is not known.
    """
    if not _keeps_shape(survey, branch.entry):
        raise SiteError(
            "the residual branch does not start with a norm", where=branch.exit, remedy="Choose other sites"
        )
    if any(other.entry == branch.entry and other.inside != branch.inside for other in _all(survey)):
        raise SiteError(
            "another residual branch starts with this norm too, and would be changed as well",
            where=branch.entry,
            remedy="Use a method that acts on the branch, such as RepAdapter without an activation",
        )
    return replace(block_site(survey, branch.entry, "output"), role=branch.role)


def _width(survey: Survey, branch: Branch) -> int:
    """Channels of the stream: of the layer that reads it, or of the one that writes to it; 0 if there is neither."""
    first, last = survey.layers.get(branch.entry), projection(survey, branch)
    if first is not None:
        return first.operator.in_width
    if last is None:
        return 0
    return last.operator.in_width if KINDS[last.kind].name == "attention" else last.operator.out_width


def _shape(survey: Survey, path: str) -> tuple[int, ...] | None:
    """Of what the module returns, if that is one shape."""
    return survey.trace.shapes.get(path, survey.trace.repeated.get(path))


def branch_sites(
    survey: Survey, sites: str | Iterable[str] | None, default: tuple[str, ...], slot: str
) -> tuple[list[Site], list[Skipped]]:
    """:func:`branch_site` of each of :func:`branches`; with ``sites`` None those that have none are left out.

    Raises:
        SiteError: none has one, or one that ``sites`` names has not.
    """
    found, skipped = branches(survey, sites, default)
    made, more = tried(lambda branch: branch_site(survey, branch, slot), found, named=sites is not None)
    return made, skipped + more


def tried(make: Callable[[T], Site], items: Iterable[T], *, named: bool) -> tuple[list[Site], list[Skipped]]:
    """The sites that ``make`` gives, and what it refuses, with reasons; ``named`` refuses for good.

    Raises:
        SiteError: the first refusal, if all are refused or one is that was named.
    """
    made: list[Site] = []
    errors: list[SiteError] = []
    for item in items:
        try:
            made.append(make(item))
        except SiteError as error:
            errors.append(error)
    if errors and (named or not made):
        raise errors[0]
    return made, [Skipped(error.where or "", error.reason) for error in errors]


def _keeps_shape(survey: Survey, path: str) -> bool:
    """Whether the branch starts with a norm: a layer that changes no shape and multiplies no channels."""
    trace, layer = survey.trace, survey.layers.get(path)
    linear = layer is not None and layer.operator.folds_input
    return bool(path) and not linear and path in trace.shapes and trace.shapes[path] == trace.inputs.get(path)


def block_site(survey: Survey, path: str, slot: str) -> Site:
    """A site on a whole module: what it returns (``"output"``), what it is given as well (``"parallel"``), or tokens.

    Raises:
        SiteError: the module is a container of others, is called more than once, or its layout is not known.
    """
    module, shape = survey.modules[path], survey.trace.shapes.get(path)
    if isinstance(module, _CONTAINERS):
        raise SiteError("a container would call an adapter among its children", where=path, remedy="Name one of them")
    if shape is None:
        raise SiteError("it is not called exactly once in a forward", where=path, remedy="Choose other sites")
    inside = [la for p, la in survey.layers.items() if p == path or p.startswith(f"{path}.")]
    possible = {shape[-1]} if len(shape) == 3 else {shape[-1], shape[1 - len(shape)]}
    # The last layer that fits: earlier ones, of a squeeze, say, may have as many channels as the maps have columns.
    fitting = [la for la in inside if la.operator.out_width in possible]
    last = max(fitting, key=lambda la: survey.trace.order.get(la.path, -1), default=None)
    ends = [b for b in _all(survey) if b.exit.startswith(f"{path}.") and survey.trace.shapes.get(b.exit) == shape]
    return _site(survey, path, slot, shape, 0 if last is None else last.operator.out_width, ends[-1] if ends else None)


def block_sites(
    survey: Survey, slot: str, sites: str | Iterable[str] | None = None
) -> tuple[list[Site], list[Skipped]]:
    """:func:`block_site` of every block, or of those that ``sites`` names, and the blocks that have none.

    Args:
        sites: paths (``*`` allowed) of blocks or of modules around them.

    Raises:
        SiteError: the backbone has no blocks, or a name matches none.
    """
    paths, names = blocks(survey), (sites,) if isinstance(sites, str) else tuple(sites or ())
    for name in names:
        if not any(covers(name, path) for path in paths):
            raise SiteError("no block has this path", where=name, remedy=f"Blocks are {', '.join(paths[:3])} ...")
    found, skipped = [], []
    for path in paths:
        if names and not any(covers(name, path) for name in names):
            continue
        try:
            found.append(block_site(survey, path, slot))
        except SiteError as error:
            skipped.append(Skipped(path, error.reason))
    return found, skipped


def on_grid(survey: Survey, sites: Iterable[Site]) -> tuple[list[Site], list[Skipped]]:
    """The sites whose features lie on a known grid of rows and columns, and those left out because theirs do not.

    Raises:
        SiteError: none does.
    """
    found, skipped = [], []
    for site in sites:
        shape = _shape(survey, site.path) or ()
        if len(shape) > 4:
            skipped.append(Skipped(site.path, "its features lie on a grid of more than rows and columns"))
        elif len(shape) == 3 and not (site.route and site.route.grid):
            skipped.append(Skipped(site.path, "nothing shows how its tokens lie on a grid"))
        else:
            found.append(site)
    if not found and skipped:
        raise SiteError(skipped[0].reason, where=skipped[0].path, remedy="Choose a method that needs no grid")
    return found, skipped


def _site(survey: Survey, path: str, slot: str, shape: tuple[int, ...], width: int, branch: Branch | None) -> Site:
    """A site on a module that returns features of this shape; ``branch`` is, or ends, what it computes."""
    dim = channel_dim(survey, path, shape, width, branch)
    kind, role = kind_of(survey.modules[path]), "" if branch is None or branch.exit != path else branch.role
    route = Route("", *_grid(survey, path, shape, dim))
    return Site(path, slot, "" if kind is None else kind.name, shape[dim], shape[dim], dim, (), role=role, route=route)


def _grid(survey: Survey, path: str, shape: tuple[int, ...], dim: int) -> tuple[int, str, bool]:
    """Prefix tokens, and the module in whose output the grid of tokens (B, N, C) is seen, channels first or last.

    It is the one with the same channels and batch whose grid comes closest to N, called before the host. Tokens that
    come from a clip's frames as well (a Conv3d cut them) lie on no such grid, nor do those of many frames together
    where the grid is that of one.
    """
    if len(shape) != 3 or dim != -1 or any(isinstance(m, nn.Conv3d) for m in survey.modules.values()):
        return 0, "", True
    best: tuple[int, int, str, bool] = (0, 0, "", True)
    order = survey.trace.order
    for other, found in survey.trace.shapes.items():
        if len(found) != 4 or found[0] != shape[0] or order[other] > order[path] or path.startswith(f"{other}."):
            continue  # of other images, or it has not returned when the host runs
        fitting = []
        for first in (True, False):
            channels, rows, columns = (found[1], found[2], found[3]) if first else (found[3], found[1], found[2])
            if channels == shape[-1] and rows * columns <= shape[1]:
                fitting.append((rows * columns, order[other], other, first))
        if len(fitting) > 1:
            fitting = [one for one in fitting if one[-1] == _is_first(survey, other, found)]
        best = max([best, *fitting])
    return (shape[1] - best[0] if best[2] else 0), best[2], best[3]


def _is_first(survey: Survey, path: str, shape: tuple[int, ...]) -> bool | None:
    """Whether a module returns its channels before the grid; None where this cannot be told."""
    try:
        return channel_dim(survey, path, shape, 0, None) != -1
    except SiteError:
        return None
