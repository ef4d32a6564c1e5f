"""VTAB-1k: its 19 tasks, their lists on disk, and how lists are made of the original sets.

On disk every task is a folder with the lists of NOAH's release, of lines ``relative/path class_index``:

    train800.txt  val200.txt  test.txt  train800val200.txt (the first two together, made of them where it is missing)

:func:`prepare` draws 800 and 200 images at random, as VTAB does, from a folder per class under ``train/``, and lists
all of ``test/``: what TFDS and torchvision export. The drawn images are its own: scores are comparable with those on
NOAH's lists, not equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from refold.data import ImageSet, Splits
from refold.data.folders import find_images, read_list
from refold.data.listing import WHOLE, Listing, encode
from refold.data.randomness import generator
from refold.errors import DataError

__all__ = ["GROUPS", "TASKS", "VtabTask", "find_tasks", "load_task", "prepare"]

_TRAIN, _VAL, _BOTH, _TEST = "train800.txt", "val200.txt", "train800val200.txt", "test.txt"
_COUNTS = {_TRAIN: 800, _VAL: 200, _BOTH: 1000}


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
        ("dmlab", 6, 22735, "DMLab", "DMLab, TFDS dmlab"),
        ("kitti", 4, 711, "KITTI distance", "KITTI object detection, cvlibs.net/datasets/kitti"),
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
    base, wanted = Path(root), list(TASKS) if names is None else list(names)
    for name in wanted:
        if name not in TASKS:
            raise DataError("no such task of VTAB-1k", where=name, remedy=f"Known: {', '.join(TASKS)}")
    if not base.is_dir():
        raise DataError("there is no such folder", where=str(base))
    missing = [name for name in TASKS if name in wanted and not _has_lists(base / name)]
    if missing:
        sources = dict.fromkeys(TASKS[name].source for name in missing)
        raise DataError(
            f"no lists of {', '.join(missing)}",
            where=str(base),
            remedy=f"Put NOAH's release there, or name the tasks you have; to prepare them yourself, export "
            f"{'; '.join(sources)} to TASK/train and TASK/test with a folder per class",
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


def prepare(root: str | Path, names: Iterable[str] | None = None, *, seed: int = 0) -> dict[str, list[str]]:
    """Write the lists of tasks whose images are in folders per class; those that have lists are left as they are.

    Returns:
        task -> what differs from VTAB's own set, of those that were written.

    Raises:
        DataError: an unknown task; one whose folder is missing, with what to download; too few images, or another
            number of classes.
    """
    base, written = Path(root), {}
    for name in TASKS if names is None else names:
        if name not in TASKS:
            raise DataError("no such task of VTAB-1k", where=name, remedy=f"Known: {', '.join(TASKS)}")
        task, folder = TASKS[name], base / name
        if _has_lists(folder):
            continue
        train, test = folder / "train", folder / "test"
        if not train.is_dir() or not test.is_dir():
            raise DataError(
                "is not there", where=str(train if not train.is_dir() else test),
                remedy=f"Export {task.source} to {folder}/train and {folder}/test, a folder per class in each",
            )  # fmt: skip
        written[name] = _write_lists(task, folder, seed)
    return written


def _write_lists(task: VtabTask, folder: Path, seed: int) -> list[str]:
    found = {part: _by_class(folder, part) for part in ("train", "test")}
    classes = sorted(found["train"])
    if len(classes) != task.classes:
        raise DataError(f"has {len(classes)} classes; {task.title} has {task.classes}", where=str(folder / "train"))
    unknown = sorted(set(found["test"]) - set(classes))
    if unknown:
        raise DataError(f"the class {unknown[0]!r} is missing from train", where=str(folder / "test"))
    pool = [(path, k) for k, name in enumerate(classes) for path in found["train"][name]]
    if len(pool) < _COUNTS[_BOTH]:
        raise DataError(f"holds {len(pool)} images; VTAB-1k draws 1000 of them", where=str(folder / "train"))
    order = torch.randperm(len(pool), generator=generator(seed, 0, f"vtab {task.name}")).tolist()
    test = [(path, classes.index(name)) for name in sorted(found["test"]) for path in found["test"][name]]
    parts = {
        _TRAIN: [pool[k] for k in order[:800]],
        _VAL: [pool[k] for k in order[800:1000]],
        _BOTH: [pool[k] for k in order[:1000]],
        _TEST: test,
    }
    for name, rows in parts.items():
        lines = (f"{Path(path).relative_to(folder).as_posix()} {label}\n" for path, label in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    notes = [f"800 and 200 images drawn with seed {seed}, not those of NOAH's lists"]
    if len(test) != task.test:
        notes.append(f"{len(test):,} test images, not {task.test:,}")
    return notes


def _by_class(folder: Path, part: str) -> dict[str, list[str]]:
    folders = sorted(entry for entry in (folder / part).iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {entry.name: find_images(entry) for entry in folders}
    for name, images in found.items():
        if not images:
            raise DataError("the class folder holds no image", where=str(folder / part / name))
    return found


def _has_lists(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (_TRAIN, _VAL, _TEST))


def _together(a: Listing, b: Listing) -> Listing:
    return Listing(a.task, a.paths + b.paths, a.labels + b.labels, a.places + b.places, a.classes)
