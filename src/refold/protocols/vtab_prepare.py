"""The lists of VTAB-1k, made of the original sets as they are downloaded or of exports with a folder per class.

800 images to train and 200 to validate are drawn at random, as VTAB does; where the set has validation images of its
own, the 200 are among these. The drawn images are ours: scores are comparable with those on NOAH's lists, not equal.
Tasks that have lists are left as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import torch

from refold.data.parallel import for_each
from refold.data.randomness import generator
from refold.errors import DataError, MissingExtraError
from refold.protocols.vtab import LISTS, TASKS, VtabTask, has_lists, require_task
from refold.protocols.vtab_formats import Part, class_folders
from refold.protocols.vtab_originals import ORIGINALS, Original

__all__ = ["prepare"]

_TRAIN, _VAL = 800, 200


class _Row(NamedTuple):
    """One image of an original set."""

    split: str
    number: int


def prepare(
    root: str | Path,
    names: Iterable[str] | None = None,
    *,
    originals: str | Path | None = None,
    seed: int = 0,
    on_task: Callable[[str, list[str]], None] | None = None,
) -> dict[str, list[str]]:
    """Write the lists of tasks that have none.

    A task's images are taken from its folders ``train`` and ``test`` with a folder per class, if there are such, else
    from the original set. Images that are files stay where they are; others are written below ``root``.

    Args:
        root: folder to write, with a folder for each task.
        names: of tasks; None is all 19.
        originals: folder of the downloaded sets, as torchvision puts them, see
            :data:`refold.protocols.vtab_originals.ORIGINALS`; None is ``root``.
        seed: of all that is drawn.
        on_task: called with each task that was written, and what differs from VTAB's own set.

    Returns:
        task -> what differs, of those that were written.

    Raises:
        DataError: an unknown task; a set that has not VTAB's number of images or classes, or is damaged; and, when all
            others are written, those that are missing, with what to download.
        MissingExtraError: a package that reads a set is not installed.
    """
    base, source = Path(root), Path(root if originals is None else originals)
    wanted = [require_task(name) for name in (TASKS if names is None else names)]
    written, missing = {}, []
    read: tuple[Original, dict[str, Part]] | None = None  # two tasks are made of one set
    for task in wanted:
        folder, original = base / task.name, ORIGINALS[task.name]
        if has_lists(folder):
            continue
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            notes = _from_folders(task, folder, seed)
        elif any(source.glob(original.place)):
            if read is None or read[0] is not original:
                read = original, _read(original, task, source, seed)
            notes = _from_original(task, original, read[1], base, seed)
        else:
            missing.append(task)
            continue
        written[task.name] = notes
        if on_task is not None:
            on_task(task.name, notes)
    if missing:
        places = dict.fromkeys(f"{task.source} (to {source / ORIGINALS[task.name].place})" for task in missing)
        raise DataError(
            f"there are no images of {', '.join(task.name for task in missing)}",
            where=str(source),
            remedy=f"Download {'; '.join(places)}; or export them to {base}/TASK/train and {base}/TASK/test, "
            "with a folder per class",
        )
    return written


def _read(original: Original, task: VtabTask, source: Path, seed: int) -> dict[str, Part]:
    """The set's splits, each with as many images as it must have."""
    where = str(source / original.place)
    try:
        parts = original.read(source, seed)
    except ImportError as error:
        raise MissingExtraError(
            f"the package {error.name!r} is not installed, which reads this set",
            where=where,
            remedy="Run: pip install 'refold[vtab]'",
        ) from error
    except RuntimeError as error:  # torchvision's, which proposes to download
        raise DataError("files are missing or damaged", where=where, remedy=f"Download {task.source}") from error
    except (OSError, ValueError, LookupError, BadZipFile) as error:
        raise DataError(
            f"files are missing or damaged ({error!r})", where=where, remedy=f"Download {task.source}"
        ) from error
    for split, count in original.counts.items():
        if parts[split].count != count:
            images = "images" if split == "all" else f"{split} images"
            raise DataError(
                f"holds {parts[split].count:,} {images}, not {count:,}", where=where, remedy=f"Download {task.source}"
            )
    return parts


def _from_original(task: VtabTask, original: Original, parts: dict[str, Part], base: Path, seed: int) -> list[str]:
    rows, drawn = _draw(parts, task, generator(seed, 0, f"vtab {original.name}"))
    folder, images = base / task.name, base / original.name / "images"
    everything = sorted({row for name in LISTS for row in rows[name]})
    column = original.tasks.index(task.name)
    found: dict[_Row, tuple[Path, int]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    if any(part.suffix for part in parts.values()):
        images.mkdir(parents=True, exist_ok=True)

    def take(k: int) -> None:
        row = everything[k]
        part = parts[row.split]
        try:
            found[row] = _file(part, row, images), part.labels(row.number)[column]
        except (OSError, ValueError, LookupError, StopIteration) as error:
            where = f"image {row.number + 1} of {row.split} of {task.title}"
            raise DataError(f"cannot be read or written ({error!r})", where=where) from error

    for_each(take, len(everything), task.title)
    _require_classes({label for _, label in found.values()}, task, str(folder))
    _write({name: [found[row] for row in rows[name]] for name in LISTS}, folder)
    notes = [f"800 and 200 images drawn with seed {seed}, not those of NOAH's lists"]
    if drawn:
        notes.append(f"{task.test:,} test images drawn with that seed")
    return [*notes, *([original.note] if original.note else [])]


def _draw(parts: dict[str, Part], task: VtabTask, random: torch.Generator) -> tuple[dict[str, list[_Row]], bool]:
    """Images of each list; and whether those of the test list are drawn, not the set's own test split."""

    def shuffled(split: str) -> list[_Row]:
        return [_Row(split, k) for k in torch.randperm(parts[split].count, generator=random).tolist()]

    tested = shuffled("test" if "test" in parts else "all")
    test, left = tested[: task.test], tested[task.test :]
    pool = shuffled("train") if "train" in parts else left
    if "val" in parts:
        val = shuffled("val")
    elif "train" in parts and left:
        val = left
    else:
        val = pool[_TRAIN:]
    train, val = pool[:_TRAIN], val[:_VAL]
    for name, found, count in (("test", test, task.test), ("train", train, _TRAIN), ("val", val, _VAL)):
        if len(found) < count:
            raise DataError(f"leaves {len(found):,} {name} images; VTAB-1k has {count:,}", where=task.title)
    return dict(zip(LISTS, (train, val, train + val, sorted(test)), strict=True)), bool(left)


def _require_classes(found: set[int], task: VtabTask, where: str) -> None:
    if not found <= set(range(task.classes)):
        raise DataError(f"has class {max(found)}; {task.title} has {task.classes}, from 0", where=where)
    if len(found) < task.classes:
        raise DataError(f"has {len(found)} classes; {task.title} has {task.classes}", where=where)


def _file(part: Part, row: _Row, folder: Path) -> Path:
    """The file of an image, written if it has none."""
    if not part.suffix:
        path = part.picture(row.number)
        assert isinstance(path, Path)
        if not path.is_file():
            raise DataError("is not there", where=str(path), remedy="Unpack the set again")
        return path
    path = folder / f"{row.split}-{row.number:06d}{part.suffix}"
    if not path.is_file():
        picture, temporary = part.picture(row.number), folder / f".{path.name}.part"
        assert not isinstance(picture, Path)
        if isinstance(picture, bytes):
            temporary.write_bytes(picture)
        else:
            picture.save(temporary, "PNG")
        temporary.replace(path)
    return path


def _from_folders(task: VtabTask, folder: Path, seed: int) -> list[str]:
    for part in (folder / "train", folder / "test"):
        if not part.is_dir():
            raise DataError(
                "is not there", where=str(part), remedy=f"Export {task.source}, a folder per class in train and test"
            )
    found = {part: class_folders(folder / part) for part in ("train", "test")}
    classes = sorted(found["train"])
    if len(classes) != task.classes:
        raise DataError(f"has {len(classes)} classes; {task.title} has {task.classes}", where=str(folder / "train"))
    unknown = sorted(set(found["test"]) - set(classes))
    if unknown:
        raise DataError(f"the class {unknown[0]!r} is missing from train", where=str(folder / "test"))
    pool = [(path, k) for k, name in enumerate(classes) for path in found["train"][name]]
    if len(pool) < _TRAIN + _VAL:
        raise DataError(f"holds {len(pool)} images; VTAB-1k draws 1000 of them", where=str(folder / "train"))
    order = torch.randperm(len(pool), generator=generator(seed, 0, f"vtab {task.name}")).tolist()
    chosen = [pool[k] for k in order[: _TRAIN + _VAL]]
    test = [(path, classes.index(name)) for name in sorted(found["test"]) for path in found["test"][name]]
    _write(dict(zip(LISTS, (chosen[:_TRAIN], chosen[_TRAIN:], chosen, test), strict=True)), folder)
    notes = [f"800 and 200 images drawn with seed {seed}, not those of NOAH's lists"]
    if len(test) != task.test:
        notes.append(f"{len(test):,} test images, not {task.test:,}")
    return notes


def _write(lists: dict[str, list[tuple[Path, int]]], folder: Path) -> None:
    """Lists in NOAH's format; the last is in place when all are whole."""
    for name, rows in lists.items():
        temporary = folder / f".{name}.part"
        temporary.write_text("".join(f"{_named(path, folder)} {label}\n" for path, label in rows), encoding="utf-8")
        temporary.replace(folder / name)


def _named(path: Path, folder: Path) -> str:
    """A path as a task's list has it; those outside of the root are absolute, for the root may be a link."""
    inside = path.is_relative_to(folder.parent)
    return Path(os.path.relpath(path, folder)).as_posix() if inside else path.absolute().as_posix()
