"""The video files below a folder, looked up by the names that annotations have for them."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from pathlib import Path

from refold.data.folders import FileKind, find_files
from refold.data.listing import Listing
from refold.errors import DataError

__all__ = ["Found", "Wanted"]

#: A video of an annotation: its file's name (without the suffix where ``stem`` is meant), class, and where it is said.
Wanted = tuple[str, str, str]


class Found:
    """Files by name.

    Args:
        root: the folder.
        kind: of the files.
        skip: list those that are missing, instead of refusing.

    Attributes:
        root: as above.
        skipped: (name, reason) of those that were left out.
    """

    def __init__(self, root: Path, kind: FileKind, *, skip: bool) -> None:
        self.root, self._kind, self._skip = root, kind, skip
        self.skipped: list[tuple[str, str]] = []

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        files: dict[str, list[str]] = defaultdict(list)
        for path in find_files(self.root, self._kind):
            files[Path(path).stem].append(path)
        return files

    def listing(self, wanted: list[Wanted], source: Path, classes: list[str] | None = None) -> Listing:
        """The videos that a source names.

        Args:
            wanted: (name without suffix, class, place) of each.
            source: for messages.
            classes: names that the source fixes, in order.

        Raises:
            DataError: one is missing and not to be skipped, or there are several files of a name; nothing is there.
        """
        missing = [(name, place) for name, _, place in wanted if name not in self._files]
        if missing and not self._skip:
            raise DataError(
                f"{len(missing)} of its {len(wanted)} videos are not below {self.root}, for example {missing[0][0]!r}",
                where=missing[0][1],
                remedy="Add them, or leave them out with skip_bad_images=True (--skip-bad-images)",
            )
        self.skipped += [(name, f"is missing ({place})") for name, place in missing]
        there = [entry for entry in wanted if entry[0] in self._files]
        if not there:
            raise DataError(f"none of its {len(wanted)} videos is below {self.root}", where=str(source))
        paths = []
        for name, _, place in there:
            files = self._files[name]
            if len(files) > 1:
                raise DataError(f"{name!r} is there twice: {files[0]} and {files[1]}", where=place)
            paths.append(files[0])
        return Listing("classify", paths, [label for _, label, _ in there], [place for _, _, place in there], classes)
