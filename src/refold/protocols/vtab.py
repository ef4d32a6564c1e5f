"""VTAB-1k: its 19 tasks and their lists on disk.

On disk every task is a folder with the lists of NOAH's release, of lines ``relative/path class_index``:

    train800.txt  val200.txt  test.txt  train800val200.txt (the first two together, made of them where it is missing)

:mod:`refold.protocols.vtab_prepare` makes such lists of the original sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refold.data import ImageSet, Splits
from refold.data.folders import read_list
from refold.data.listing import WHOLE, Listing, encode
from refold.errors import DataError

__all__ = ["GROUPS", "LISTS", "TASKS", "VtabTask", "find_tasks", "has_lists", "load_task", "require_task"]

_TRAIN, _VAL, _BOTH, _TEST = "train800.txt", "val200.txt", "train800val200.txt", "test.txt"
_COUNTS = {_TRAIN: 800, _VAL: 200, _BOTH: 1000}
#: Files of a task: what is trained and validated on, both together, and what is tested on.
LISTS = (_TRAIN, _VAL, _BOTH, _TEST)


@dataclass(frozen=True)
class VtabTask:
    """One of the 19.

    Attributes:
        name: its folder in NOAH's release.
        group: one of :data:`GROUPS`.
        classes: how many.
        test: images of the whole test set.
        title: for people.
        source: what to download.
    """

    name: str
    group: str
    classes: int
    test: int
    title: str
    source: str


#: Name, classes, test images, title and source.
_ROWS = {
    "Natural": (
        ("cifar", 100, 10000, "CIFAR-100", "CIFAR-100, cs.toronto.edu/~kriz/cifar.html"),
        ("caltech101", 102, 6084, "Caltech101", "Caltech101, data.caltech.edu/records/mzrjq-6wc02"),
        ("dtd", 47, 1880, "DTD", "DTD, robots.ox.ac.uk/~vgg/data/dtd"),
        ("oxford_flowers102", 102, 6149, "Flowers102", "Flowers102, robots.ox.ac.uk/~vgg/data/flowers"),
        ("oxford_iiit_pet", 37, 3669, "Pets", "Oxford-IIIT Pet, robots.ox.ac.uk/~vgg/data/pets"),
        ("svhn", 10, 26032, "SVHN", "SVHN cropped digits, ufldl.stanford.edu/housenumbers"),
        ("sun397", 397, 21750, "SUN397", "SUN397, vision.princeton.edu/projects/2010/SUN"),
    ),
    "Specialized": (
        ("patch_camelyon", 2, 32768, "Camelyon", "PatchCamelyon, github.com/basveeling/pcam"),
        ("eurosat", 10, 5400, "EuroSAT", "EuroSAT (RGB), github.com/phelber/EuroSAT"),
        ("resisc45", 45, 6300, "Resisc45", "NWPU-RESISC45, TFDS resisc45"),
        ("diabetic_retinopathy", 5, 42670, "Retinopathy", "Kaggle diabetic-retinopathy-detection"),
    ),
    "Structured": (
        ("clevr_count", 8, 15000, "Clevr count", "CLEVR v1.0, cs.stanford.edu/people/jcjohns/clevr"),
        ("clevr_dist", 6, 15000, "Clevr distance", "CLEVR v1.0, cs.stanford.edu/people/jcjohns/clevr"),
        ("dmlab", 6, 22735, "DMLab", "DMLab, storage.googleapis.com/dmlab-vtab/dmlab.tar.gz"),
        ("kitti", 4, 711, "KITTI distance", "KITTI objects (images, labels, devkit), cvlibs.net/datasets/kitti"),
        ("dsprites_loc", 16, 73728, "dSprites location", "dSprites, github.com/deepmind/dsprites-dataset"),
        ("dsprites_ori", 16, 73728, "dSprites orientation", "dSprites, github.com/deepmind/dsprites-dataset"),
        ("smallnorb_azi", 18, 12150, "sNORB azimuth", "small NORB, cs.nyu.edu/~ylclab/data/norb-v1.0"),
        ("smallnorb_ele", 9, 12150, "sNORB elevation", "small NORB, cs.nyu.edu/~ylclab/data/norb-v1.0"),
    ),
}
GROUPS = tuple(_ROWS)
#: In the order of the published tables.
TASKS = {name: VtabTask(name, group, *rest) for group, rows in _ROWS.items() for name, *rest in rows}


def find_tasks(root: str | Path, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Folder of each task, in the order of the tables.

    Args:
        root: with a folder for each task.
        names: which; None is all 19.

    Raises:
        DataError: an unknown name; or folders or lists that are missing, with what to download.
    """
    base, wanted = Path(root), [require_task(name).name for name in (TASKS if names is None else names)]
    if not base.is_dir():
        raise DataError("there is no such folder", where=str(base))
    missing = [name for name in TASKS if name in wanted and not has_lists(base / name)]
    if missing:
        sources = dict.fromkeys(TASKS[name].source for name in missing)
        raise DataError(
            f"no lists of {', '.join(missing)}",
            where=str(base),
            remedy="Put NOAH's release there, or name the tasks you have; or download "
            f"{'; '.join(sources)}, and prepare the lists (--prepare)",
        )
    return {name: base / name for name in TASKS if name in wanted}


def load_task(task: VtabTask, folder: Path, *, cache: str = "auto") -> tuple[Splits, Splits]:
    """What hyper-parameters are chosen on (800 to train, 200 to validate), and what is reported (1000, test).

    Raises:
        DataError: a list that cannot be read, or that has not VTAB's number of images or classes.
    """
    lists = {name: read_list(folder / name)[WHOLE] for name in (_TRAIN, _VAL, _TEST)}
    if (folder / _BOTH).is_file():
        lists[_BOTH] = read_list(folder / _BOTH)[WHOLE]
    else:
        lists[_BOTH] = _together(lists[_TRAIN], lists[_VAL])
    for name, count in _COUNTS.items():
        if len(lists[name]) != count:
            raise DataError(f"lists {len(lists[name])} images, not {count}", where=str(folder / name))
    classes = [str(k) for k in range(task.classes)]
    for name, listing in lists.items():
        largest = max(int(label) for label in listing.labels)  # type: ignore[arg-type]
        if largest >= task.classes:
            raise DataError(f"has class {largest}; {task.title} has {task.classes}, from 0", where=str(folder / name))

    def images(name: str) -> ImageSet:
        listing = lists[name]
        return ImageSet(listing.paths, encode(listing, classes), classes=classes, cache=cache)

    search = Splits(images(_TRAIN), images(_VAL), None, classes, "classify")
    return search, Splits(images(_BOTH), None, images(_TEST), classes, "classify")


def require_task(name: str) -> VtabTask:
    """The task of that name.

    Raises:
        DataError: there is none.
    """
    if name not in TASKS:
        raise DataError("no such task of VTAB-1k", where=name, remedy=f"Known: {', '.join(TASKS)}")
    return TASKS[name]


def has_lists(folder: Path) -> bool:
    """Whether a task can be loaded from there."""
    return all((folder / name).is_file() for name in (_TRAIN, _VAL, _TEST))


def _together(a: Listing, b: Listing) -> Listing:
    return Listing(a.task, a.paths + b.paths, a.labels + b.labels, a.places + b.places, a.classes)
