"""Accuracy of every method on real images, honestly: one fixed split, test scored once; and what each costs.

    python benchmarks/accuracy.py [runs] [cost] [report] [list]

* runs: every method of ``refold.METHODS`` on ELPV; the best six by validation also on textile, few-shot cut-outs and
  Fashion-MNIST (``accuracy_entries.py``, ``accuracy_data.py``). Hours on two cores; finished runs are kept in
  ``results/accuracy`` and not repeated: stop and start at will. Several processes share the work (``--threads 1``, one
  a core).
* cost: step time, stored bytes and inference of each, half a minute a method, on a quiet machine (``results/cost``).
* report: the table and the plots in ``docs/methods/results.md``, and the means over the data sets in
  ``docs/results/suite.md``, of what is finished.
* list: the pieces and their state.

Runs, cost and report if none is named. ``python benchmarks/readme.py`` then brings the table to README.md.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

import accuracy_cost
import accuracy_data
import accuracy_report
import accuracy_runs
import common
import refold
from accuracy_data import Folders
from accuracy_entries import VIT, Entry, entries, probe_of, unknown_names

PARTS = ("runs", "cost", "report", "list")


def pieces(chosen: list[Entry], folders: Folders, *, wait: bool = False) -> Iterator[tuple[str, Entry]]:
    """What to run, in order; who goes on to the further data sets is known when the first is done by all processes."""
    yield from ((accuracy_report.FIRST, entry) for entry in chosen)
    for entry in chosen if wait else ():
        with claim(accuracy_report.FIRST, entry, wait=True):  # another process may still be at it
            pass
    going_on = accuracy_report.best(accuracy_report.finished())
    for dataset in accuracy_report.FURTHER:
        if reason := folders.missing(dataset):
            print(f"{dataset} skipped: {reason}")
            continue
        probe = probe_of(next(e for e in entries() if e.backbone == VIT))
        yield from ((dataset, e) for e in (probe, *(e for e in going_on if e != probe)) if e in chosen)


def claim(dataset: str, entry: Entry, *, wait: bool = False) -> AbstractContextManager[bool]:
    return common.claim(accuracy_runs.ADAPTERS, f"{dataset}-{entry.slug}", wait=wait)


def is_finished(dataset: str, entry: Entry) -> bool:
    try:
        accuracy_runs.suite(dataset, entry)
    except (accuracy_runs.Unfinished, refold.SiteError):
        return False
    except refold.RefoldError:  # every run is there, and none can be used
        return True
    return True


def runs(chosen: list[Entry], folders: Folders, most: int | None) -> bool:
    """Run unfinished pieces, at most so many; a method that fails does not stop the others. Whether none failed."""
    failed = done = 0
    for dataset, entry in pieces(chosen, folders, wait=True):
        if done == most:
            break
        try:
            with claim(dataset, entry) as ours:
                if not ours or is_finished(dataset, entry):
                    continue
                accuracy_runs.suite(dataset, entry, accuracy_data.load(dataset, folders))
                done += 1
        except refold.SiteError as error:
            print(f"{entry.label}: not run: {error}")
        except Exception:  # a bug in one method must not cost the results of the others
            traceback.print_exc()
            print(f"failed: {entry.label}")
            failed += 1
    print(f"{done} pieces made, {failed} failed", flush=True)
    return not failed


def cost(chosen: list[Entry]) -> None:
    for entry in chosen:
        try:
            accuracy_cost.cost(entry)
        except refold.SiteError as error:
            print(f"{entry.label}: not measured: {error}")


def show(chosen: list[Entry], folders: Folders) -> None:
    for dataset, entry in pieces(chosen, folders):
        state = "finished" if is_finished(dataset, entry) else "to run"
        print(f"{dataset:9} {entry.slug:40} {state:9} {entry.backbone}  {'; '.join(map(str, entry.grid))}")
    print("names in the tables that no method has:", ", ".join(unknown_names()) or "none")


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[], help="what to do; all but list if none")
    parser.add_argument("--only", help="these methods, by their labels, with semicolons between")
    parser.add_argument("--skip", help="all but these")
    parser.add_argument("--pieces", type=int, help="stop after so many pieces (a method on a data set)")
    parser.add_argument("--stamps", type=Path, default=Folders.stamps, help="folder of Tux Paint's stamps")
    parser.add_argument("--fashion", type=Path, default=Folders.fashion, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--threads", type=int, help="torch threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    only, skip = ([name.strip() for name in (text or "").split(";")] for text in (arguments.only, arguments.skip))
    chosen = [e for e in entries() if (not arguments.only or e.label in only) and e.label not in skip]
    parts, folders = arguments.parts or PARTS[:3], Folders(arguments.stamps, arguments.fashion)
    sound = True
    if "list" in parts:
        show(chosen, folders)
    if "runs" in parts:
        sound = runs(chosen, folders, arguments.pieces)
    if "cost" in parts:
        cost(chosen)
    if "report" in parts:
        accuracy_report.write()
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
