"""Where bottlenecks go: behind the last projection of a residual branch, behind any layer, or beside one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from refold.adapters import LinearBottleneck
from refold.adapters.nonlinear import start
from refold.errors import SiteError
from refold.fold import KINDS, kind_of
from refold.methods.weight import noted
from refold.places import block_site, branches, projection, tried
from refold.roles import ROLES
from refold.sites import Layer, Site, Skipped
from refold.survey import Survey

__all__ = ["behind", "behind_last", "beside", "last_layers", "linear"]


def last_layers(
    survey: Survey, sites: str | Iterable[str] | None, default: tuple[str, ...]
) -> tuple[list[Layer], list[Skipped]]:
    """The layers that ``sites`` names, in the order of the forward, and the branches left out with reasons.

    Args:
        sites: roles, each the last channel-mixing layer of that residual branch, or paths of any such layers (``*``
            allowed); None for the roles ``default``, as :func:`refold.places.branches` takes them.

    Raises:
        SiteError: a name matches nothing, or the backbone has no residual branches.
    """
    names = None if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    roles = names if names is None else [name for name in names if name in ROLES]
    paths = [name for name in names or () if name not in ROLES]
    layers, skipped = survey.resolve(paths, (), moved=False) if paths else ([], [])
    if roles is None or roles:
        found, more = branches(survey, roles, default)
        skipped += more
        for branch in found:
            layer = projection(survey, branch)
            if layer is None:
                skipped.append(Skipped(branch.exit, "no layer of this residual branch mixes channels"))
            else:
                layers.append(replace(layer, role=branch.role))
    if not layers:
        raise SiteError(skipped[0].reason, where=skipped[0].path, remedy="Choose other sites")
    order = survey.trace.order
    unique = {layer.path: layer for layer in layers}
    return sorted(unique.values(), key=lambda la: order.get(la.path, order.get(la.owner or "", -1))), skipped


def behind_last(
    survey: Survey,
    sites: str | Iterable[str] | None,
    default: tuple[str, ...],
    *,
    folds: bool,
    dropout: float = 0.0,
) -> tuple[list[Site], list[Skipped]]:
    """:func:`behind` each of :func:`last_layers`; with ``sites`` None those without such a site are left out."""
    layers, skipped = last_layers(survey, sites, default)
    made, more = tried(lambda la: behind(survey, la, folds=folds, dropout=dropout), layers, named=sites is not None)
    return made, skipped + more


def behind(survey: Survey, layer: Layer, *, folds: bool, dropout: float = 0.0) -> Site:
    """The site of a bottleneck behind ``layer``.

    Args:
        folds: the bottleneck is linear, a channel map that folds into the layer; else it stays beside the backbone.
        dropout: the bottleneck's, which is noted where it has no effect.

    Raises:
        SiteError: the layer cannot take the fold, or what it gives cannot be reached.
    """
    if folds:
        if layer.operator.groups != 1:
            raise SiteError(
                f"a map of all channels behind a convolution of {layer.operator.groups} groups would make it dense",
                where=layer.path,
                remedy="Use an activation, or choose an ungrouped layer",
            )
        site = survey.output_site(layer)
        return noted(site, "no dropout: the weight itself is replaced") if dropout and site.owner is not None else site
    host = layer.path if layer.owner is None else layer.owner
    # torch's attention returns what its output projection gives. Of any other module that cannot be told.
    attention = kind_of(survey.modules[host]) is KINDS["attention"] and host != layer.path
    if not (_is_reached(layer) or attention):
        raise SiteError(
            f"{host or 'the model itself'} multiplies with its weight inside, so what that gives cannot be reached",
            where=layer.path,
            remedy='Use activation="identity", or choose other sites',
        )
    return replace(block_site(survey, host, "output"), role=layer.role)


def beside(survey: Survey, layer: Layer, *, folds: bool, dropout: float = 0.0, wants_shift: bool = False) -> Site:
    """The site of a bottleneck from what ``layer`` reads to what it gives.

    Args:
        folds: the bottleneck is linear, an addition to the layer's weight; else it stays beside the backbone.
        dropout: the bottleneck's, which is noted where it has no effect.
        wants_shift: whether a bottleneck that folds has a constant part.

    Raises:
        SiteError: what the layer reads or gives cannot be reached, or lies on other positions.
    """
    if folds:
        site = survey.weight_site(layer, wants_shift=wants_shift)
        return noted(site, "no dropout: the weight itself is replaced") if dropout and site.owner is not None else site
    if not _is_reached(layer):
        raise SiteError(
            "its input and output cannot be reached, only its weight",
            where=layer.path,
            remedy='Use activation="identity", added, or other sites',
        )
    site, op = block_site(survey, layer.path, "parallel"), layer.operator
    given, made = survey.trace.inputs[layer.path], survey.trace.shapes[layer.path]
    if given[op.channel_dim + 1 or len(given) :] != made[op.channel_dim + 1 or len(made) :]:
        raise SiteError(
            "its output has other positions than its input, which a bottleneck cannot follow",
            where=layer.path,
            remedy='Use activation="identity", added, or other sites',
        )
    return replace(site, width=op.in_width, out_width=op.out_width, role=layer.role)


def _is_reached(layer: Layer) -> bool:
    """Whether the hooks of ``layer`` see what its weight multiplies and what that gives."""
    return layer.owner is None and KINDS[layer.kind].returns_product


def linear(
    site: Site,
    hidden: int,
    scale: float,
    dropout: float,
    init: str | float,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> LinearBottleneck:
    """A bottleneck without an activation for a site of :func:`behind` that folds; ``init`` as ``start`` takes it."""
    options = {"channel_dim": site.channel_dim, "shift": site.has_shift, "device": device, "dtype": dtype}
    adapter = LinearBottleneck(site.out_width, hidden, 1, scale, dropout, **options)
    start(adapter.down, adapter.up, [b for b in (adapter.down_bias, adapter.up_bias) if b is not None], init)
    return adapter
