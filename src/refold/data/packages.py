"""Labelled images that come inside Python packages: real data without a download.

``elpv``: 2624 electroluminescence photographs of solar cells, 300 x 300 grey (Buerhop-Lutz et al. 2018, Deitsch et
al. 2019, 2021; package ``elpv-dataset``). Experts gave each a probability of being defective, 0, 1/3, 2/3 or 1; the
task here is binary, defective above 0.5.

``textile``: 2000 simulated photographs of woven textile, 250 x 250 RGB (Megahed et al. 2025, arXiv 2501.12596;
package ``conformal-clip-data``): nominal, with a local defect, with a global one.

The decoded pixels are kept as one ``.npy`` file in :func:`refold.backbones.files.cache_dir`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from refold.backbones.files import atomic_path, cache_dir
from refold.data.decoding import decode
from refold.data.images import ImageSet
from refold.data.parallel import for_each
from refold.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PACKAGED", "packaged"]


@dataclass(frozen=True)
class _Packaged:
    distribution: str
    module: str
    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]
    licence: str
    labelled: Callable[[Path], list[tuple[str, int]]]
    """From the package's folder to (relative path, class index) of each image."""


def packaged(name: str, *, channels: int | None = None, cache: str = "auto") -> ImageSet:
    """All images of ``"elpv"`` or ``"textile"``, in the order of their package.

    The first call decodes them and keeps the pixels on disk (0.2 and 0.4 GB); later ones map that file. Where the
    cache cannot be written, nothing is kept.

    Args:
        name: key of :data:`PACKAGED`.
        channels: 1 or 3; None is the images' own, 1 for elpv and 3 for textile. A :class:`Loader` repeats one channel
            for a model that takes three.
        cache: see :class:`ImageSet`.

    Returns:
        the images; ``licence`` has the terms of use.

    Raises:
        DataError: an unknown name, or a package with other content than expected.
        MissingExtraError: the package is not installed.
    """
    if name not in PACKAGED:
        raise DataError("no such packaged data set", where=f"packaged/{name}", remedy=f"Known: {', '.join(PACKAGED)}")
    entry = PACKAGED[name]
    try:
        root = Path(str(importlib.resources.files(entry.module)))
        version = importlib.metadata.version(entry.distribution)
    except ModuleNotFoundError as error:  # PackageNotFoundError is one too
        raise MissingExtraError.of(entry.distribution, "demo") from error
    try:
        labelled = entry.labelled(root)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{entry.distribution} {version} has unexpected content ({error})", where=str(root)) from error
    paths = [str(root / path) for path, _ in labelled]
    return ImageSet(
        paths,
        torch.tensor([label for _, label in labelled]),
        classes=list(entry.classes),
        channels=channels or entry.channels,
        cache=cache,
        licence=entry.licence,
        decoded=_decoded(cache_dir() / "data" / f"{name}-{version}.npy", paths, entry),
    )


def _decoded(file: Path, paths: list[str], entry: _Packaged) -> np.ndarray:
    """The pixels of ``paths``, (N, H, W) or (N, H, W, 3) uint8: from ``file``, which is made if it is not sound."""
    import numpy as np

    shape = (len(paths), *entry.size, *((entry.channels,) if entry.channels > 1 else ()))
    try:
        array = np.lib.format.open_memmap(file, mode="r")  # nothing but plain arrays
        if array.shape == shape and array.dtype == np.uint8:
            return array
    except (OSError, ValueError):  # absent, cut short, or something else
        pass
    array = np.empty(shape, np.uint8)

    def fill(i: int) -> None:
        image = decode(paths[i], entry.channels)
        if (image.height, image.width) != entry.size:
            raise DataError(f"is {image.height} x {image.width} pixels, not {entry.size}", where=paths[i])
        array[i] = np.asarray(image)

    for_each(fill, len(paths), f"decoding {entry.distribution}")
    try:
        with atomic_path(file) as temporary:
            np.save(temporary, array)
    except OSError:  # a read-only or full disk: slower next time, no worse
        pass
    return array


def _elpv(root: Path) -> list[tuple[str, int]]:
    rows = (line.split() for line in (root / "data" / "labels.csv").read_text(encoding="utf-8").splitlines())
    return [(f"data/{row[0]}", int(float(row[1]) > 0.5)) for row in rows if row]


def _textile(root: Path) -> list[tuple[str, int]]:
    folder = Path("data", "textile_images", "simulated")
    return [
        (str(folder / name / file.name), label)
        for label, name in enumerate(PACKAGED["textile"].classes)
        for file in sorted((root / folder / name).iterdir())
        if file.suffix == ".jpg"
    ]


PACKAGED = {
    "elpv": _Packaged(
        distribution="elpv-dataset",
        module="elpv_dataset",
        classes=("functional", "defective"),
        channels=1,
        size=(300, 300),
        licence="CC-BY-NC-SA-4.0: attribution, no commercial use, share alike (elpv-dataset, zae-bayern)",
        labelled=_elpv,
    ),
    "textile": _Packaged(
        distribution="conformal-clip-data",
        module="conformal_clip_data",
        classes=("nominal", "local", "global"),
        channels=3,
        size=(250, 250),
        licence="MIT (conformal-clip-data, Megahed and Chen)",
        labelled=_textile,
    ),
}
"""The data sets by name."""
