"""The convolutions of a backbone in numbers: what adapters that have one of their own take over from it."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from refold.errors import SiteError
from refold.sites import Geometry, Site
from refold.survey import Survey

__all__ = ["across", "behind", "of_layer", "within"]

Pair = tuple[int, int]

#: Where nothing convolves: the window of Swin, as in Conv-Adapter's released code.
_WINDOW = (7, 7)


def of_layer(survey: Survey, path: str) -> Geometry:
    """That of a layer.

    Raises:
        SiteError: it is no convolution over rows and columns, or its forward does more than that.
    """
    layer = survey.modules[path]
    given, shape = survey.trace.inputs.get(path), survey.trace.shapes.get(path)
    if not isinstance(layer, nn.Conv2d) or given is None or shape is None or len(given) != 4:
        raise SiteError("it is no convolution over rows and columns that is called once", where=path)
    kernel, stride, dilation = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.dilation)
    padding = {"valid": (0, 0), "same": None}[layer.padding] if isinstance(layer.padding, str) else _pair(layer.padding)
    if padding is not None and shape[2:] != tuple(
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(given[2:], kernel, stride, padding, dilation, strict=True)
    ):
        padding = None  # some convolutions put around their input what it needs, in a forward of their own
    if padding is None and shape[2:] != _strided(given[2:], stride):
        raise SiteError("it changes the size of maps in a way of its own", where=path, remedy="Choose other sites")
    return Geometry(layer.in_channels, layer.out_channels, kernel, stride, padding, dilation, layer.padding_mode)


def within(survey: Survey, path: str) -> list[nn.Conv2d]:
    """The convolutions over rows and columns of a module."""
    return [m for p, m in survey.modules.items() if isinstance(m, nn.Conv2d) and p.startswith(f"{path}.")]


def behind(width: int, layers: Iterable[nn.Conv2d]) -> Geometry:
    """That of one convolution that keeps its input's size, with the widest kernel of ``layers``."""
    kernel = max((_pair(layer.kernel_size) for layer in layers), key=math.prod, default=(1, 1))
    kernel = _WINDOW if kernel == (1, 1) else kernel
    centred = kernel[0] % 2 == 1 and kernel[1] % 2 == 1
    return Geometry(width, width, kernel, padding=(kernel[0] // 2, kernel[1] // 2) if centred else None)


def across(survey: Survey, site: Site) -> Geometry:
    """That of one convolution from what the site's host is given to what it returns.

    Raises:
        SiteError: no stride leads from the one to the other.
    """
    layers = within(survey, site.path)
    given, shape = survey.trace.inputs[site.path], survey.trace.shapes[site.path]
    if given == shape:
        return behind(site.width, layers)
    strides = [_pair(layer.stride) for layer in layers]
    stride = tuple(
        # Of maps of one row a strided block makes one row, too.
        -(-before // after) if before > 1 else max((s[axis] for s in strides), default=1)
        for axis, (before, after) in enumerate(zip(given[2:], shape[2:], strict=False))
    )
    maps = site.channel_dim == -3 and len(given) == len(shape) == 4
    if not maps or shape[2:] != _strided(given[2:], stride):
        raise SiteError("no convolution leads from the maps it is given to those it returns", where=site.path)
    kept = behind(site.width, layers)
    return Geometry(given[1], shape[1], kept.kernel, _pair(stride), kept.padding)


def _strided(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-before // by) for before, by in zip(size, stride, strict=False))


def _pair(value: Iterable[int]) -> Pair:
    rows, columns = value
    return int(rows), int(columns)
