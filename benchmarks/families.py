"""Every backbone family, every method: exact, refused, wrong or error; PEFT in the same run.

    python benchmarks/families.py [--only PATTERN] [--methods NAMES] [--jobs N] [--again] [--failed]

One JSON line a family and method goes to ``results/families.jsonl``; what stands there for the same versions of
everything, refold's own sources included, is not run again. Each family runs in a process of its own with a time
limit a method, so that a hang or a crash is one row. ``docs/families.md`` is written from the file at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import time
import warnings
from collections import defaultdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

import families_check
import families_page
import families_timm
from common import RESULTS
from families_check import METHODS, PEFT, Family, Row

FILE = RESULTS / "families.jsonl"
#: Seconds one method may take on one family, building the model included.
LIMIT = 90


def catalogue() -> dict[str, Family]:
    """Every family by key; a library that is not installed is left out and said so."""
    import importlib

    found = list(families_timm.families())
    for name in ("families_transformers", "families_torchvision", "families_open_clip", "families_research"):
        try:
            found += importlib.import_module(name).families()
        except ImportError as error:
            if multiprocessing.parent_process() is None:
                print(f"left out: {name} ({error})")
    return {family.key: family for family in found}


def versions(method: str, library: str) -> dict[str, str]:
    """What the verdict depends on."""
    names = {"torch": "torch", "open_clip": "open_clip_torch", "research": ""}
    wanted = ["torch", *filter(None, [names.get(library, library)]), *(["peft"] if method in PEFT else [])]
    found = {name: importlib.metadata.version(name) for name in wanted}
    return found if method in PEFT else {**found, "refold": _sources()}


@functools.cache
def _sources() -> str:
    """A hash of the part of refold that decides the verdicts."""
    root = Path(families_check.refold.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.glob("**/*.py")):
        if path.parent.name in ("refold", "fold", "adapters", "methods"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def read() -> dict[tuple[str, str], dict[str, Any]]:
    """(family, method) -> the latest row."""
    rows = {}
    for line in FILE.read_text().splitlines() if FILE.exists() else ():
        row = json.loads(line)
        rows[row["family"], row["method"]] = row
    return rows


def write(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """One line a family and method, sorted: the file's history does not grow with reruns."""
    RESULTS.mkdir(exist_ok=True)
    part = FILE.with_suffix(".part")
    part.write_text("".join(json.dumps(rows[key]) + "\n" for key in sorted(rows)))
    part.replace(FILE)


# -- one family in a process --------------------------------------------------------------------------------------


def work(key: str, methods: list[str], pipe: Connection) -> None:
    """Send a :class:`Row` a method, as soon as it is known."""
    import copy

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    family = catalogue()[key]
    torch.manual_seed(0)
    try:
        model = families_check.fill(family.build().double()).eval()
        limit = families_check.limit_of(model, family)
    except Exception as error:
        for _ in methods:
            pipe.send(Row(reason=f"build: {type(error).__name__}: {str(error)[:300]}"))
        return
    parameters = sum(p.numel() for p in model.parameters())
    for i, method in enumerate(methods):
        twin = model if i + 1 == len(methods) else copy.deepcopy(model)
        row = families_check.check(twin, family, method, limit)
        pipe.send({**dataclasses.asdict(row), "parameters": parameters})


class Worker:
    def __init__(self, context: Any, family: Family, methods: list[str]) -> None:
        self.family, self.methods, self.since = family, methods, time.monotonic()
        self.pipe, end = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(family.key, methods, end))
        self.process.start()
        end.close()

    def stop(self) -> None:
        if self.methods:  # it hung, or died: a dead process takes a kill well
            self.process.kill()
        self.process.join()
        self.pipe.close()


def run(pending: dict[str, list[str]], known: dict[str, Family], jobs: int, limit: float) -> Any:
    """Yield (family, method, row) as they come."""
    # The fork server does not see this script's folder otherwise, and ignores what it cannot import.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["families_preload"])
    queue, running = list(pending.items()), []
    while queue or running:
        while queue and len(running) < jobs:
            key, methods = queue.pop(0)
            running.append(Worker(context, known[key], list(methods)))
        ready = wait([w.pipe for w in running], timeout=1.0)
        for worker in list(running):
            row = None
            if worker.pipe in ready:
                try:
                    row = worker.pipe.recv()
                except EOFError:
                    row = Row(reason=f"the process died (exit code {worker.process.exitcode})")
            elif time.monotonic() - worker.since > limit:
                row = Row(reason=f"no answer in {limit:.0f} s")
            if row is None:
                continue
            method, worker.since = worker.methods.pop(0), time.monotonic()
            yield worker.family, method, row
            if not worker.methods or isinstance(row, Row):
                worker.stop()
                running.remove(worker)
                if worker.methods:  # go on behind the method that hung or crashed
                    queue.insert(0, (worker.family.key, worker.methods))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="families, for example 'timm/*' or '*swin*'")
    parser.add_argument("--methods", default="*", help="methods, for example 'LoRA*'")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a method")
    parser.add_argument("--again", action="store_true", help="also what is known already")
    parser.add_argument("--failed", action="store_true", help="only what is not exact so far")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in families_timm.missing():
        print(f"timm model file without an entry: {name}")
    known, rows = catalogue(), read()
    pending: dict[str, list[str]] = defaultdict(list)
    for key, family in known.items():
        for method in (*METHODS, *PEFT):
            if not (fnmatch.fnmatch(key, options.only) and fnmatch.fnmatch(method, options.methods)):
                continue
            row = rows.get((key, method))
            fresh = row is not None and row["versions"] == versions(method, family.library)
            if options.failed and (row is None or row["verdict"] == "exact"):
                continue
            if options.again or not fresh:
                pending[key].append(method)
    start = time.monotonic()
    for family, method, found in run(pending, known, options.jobs, options.limit):
        facts = dataclasses.asdict(found) if isinstance(found, Row) else found
        row = {
            "family": family.key,
            "library": family.library,
            "model": family.model,
            "method": method,
            **{k: None if v != v else v for k, v in facts.items()},  # JSON has no NaN
            "versions": versions(method, family.library),
            "date": datetime.date.today().isoformat(),
        }
        rows = {**read(), (family.key, method): row}  # read again: another run may have added rows meanwhile
        write(rows)
        print(f"{row['verdict']:8}{family.key}  {method}  {row['seconds']} s  {row['reason'][:160]}", flush=True)
    families_page.write({k: r for k, r in rows.items() if k[0] in known}, seconds=time.monotonic() - start)


if __name__ == "__main__":
    main()
