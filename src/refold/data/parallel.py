"""Work on many images in threads (Pillow releases the interpreter lock), with a bar once it takes long."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["available_cpus", "counted", "for_each", "one_torch_thread"]

_CHUNK = 16  # images of one task
_SILENCE = 2.0  # seconds before the bar appears


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch's small operations in this thread alone.

    A batch of images is a few milliseconds of work. Waking a team of threads for each step of it gains little, and
    where several processes share the cores every step waits for the scheduler: 36 ms instead of 0.7 ms for 16 images
    of 112 pixels on two busy cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def for_each(function: Callable[[int], None], count: int, title: str) -> None:
    """Call ``function(i)`` for ``i`` in ``range(count)``, in any order, in threads.

    A bar with the time left appears on a terminal after two seconds, in the first process of a node only.

    Raises:
        Exception: what ``function`` raised for the smallest failing ``i``; work that has not begun is dropped.
    """

    def run(start: int) -> int:
        stop = min(start + _CHUNK, count)
        for i in range(start, stop):
            function(i)
        return stop

    bar, begun = None, time.monotonic()
    pool = ThreadPoolExecutor(max(2, available_cpus()))
    try:
        for done in pool.map(run, range(0, count, _CHUNK)):
            if bar is None and time.monotonic() - begun > _SILENCE and _wants_bar():
                bar = _Bar(title, count)
            if bar is not None:
                bar.show(done)
    finally:
        pool.shutdown(cancel_futures=True)
        if bar is not None:
            bar.close()


def counted(items: Iterable[Any], title: str) -> Iterator[Any]:
    """The items, of which nobody knows how many there are, with a bar as of :func:`for_each` that counts them."""
    bar, begun = None, time.monotonic()
    try:
        for number, item in enumerate(items):
            if number % _CHUNK == 0 and bar is None and time.monotonic() - begun > _SILENCE and _wants_bar():
                bar = _Bar(title, None)
            if number % _CHUNK == 0 and bar is not None:
                bar.show(number)
            yield item
    finally:
        if bar is not None:
            bar.close()


def _wants_bar() -> bool:
    return sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"


class _Bar:
    def __init__(self, title: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(title, total=total)
        self._progress.start()

    def show(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        self._progress.stop()
