"""Predictions for more images than one process sees in a day, on Ray Data.

Files are listed here and read by tasks on all cores; a pool of processes holds the model, merged where it merges, on
GPUs if there are any. What they say comes back to this process, the only one that writes: a batch that a dying process
had to do twice is written once. Finished batches are in ``part-*.parquet`` at once, so a call that starts again
predicts the other images alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import refold
from refold.data.dataset import find_sources
from refold.data.decoding import Rendering, decode, render
from refold.data.folders import IMAGES
from refold.data.normalize import Normalize
from refold.errors import DataError, RefoldError
from refold.protocols.trial import write_json
from refold.state import require_state
from refold.sweeps.cluster import ray_started, require_ray
from refold.training.build import Ready, resolve
from refold.training.checkpoint import check_same, write_atomically
from refold.training.evaluation import prediction_rows
from refold.training.progress import show_count

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BatchPredictions", "predict_batches"]

#: Readers of Parquet folders leave out what begins with an underscore.
_MODEL, _SKIPPED = "_model.json", "_skipped.csv"
_REMEDY = "Repair or remove it, or leave such files out with skip_bad_images=True (--skip-bad-images)"


@dataclass(frozen=True)
class BatchPredictions:
    """What :func:`predict_batches` returns.

    Attributes:
        output: the folder with ``part-*.parquet``.
        rows: images in it.
        before: those of them that were there already.
        skipped: (path, reason) of the files that cannot be decoded.
    """

    output: Path
    rows: int
    before: int
    skipped: list[tuple[str, str]]


def predict_batches(
    source: str | Path,
    images: str | Path | Iterable[str | Path],
    output: str | Path,
    *,
    weights: str | Path | None = None,
    force: bool = False,
    skip_bad_images: bool = False,
    batch_size: int | None = None,
    workers: int | None = None,
    address: str | None = None,
    progress: bool | None = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> BatchPredictions:
    """Predict whole images in many processes, and write Parquet files with the columns of :func:`refold.predict`.

    The model is merged if its method merges, so that predictions equal those of :func:`refold.predict` up to rounding.
    Rows are in no order. A call with the same model and output goes on where a former one stopped.

    Args:
        source: a run folder, an adapter file, or ``"hf-hub:user/repo"``.
        weights, force: as for :func:`refold.predict`.
        images: a file, a folder with all below it, or several of either, that all machines of a cluster see there.
        output: folder to write, here; ``pandas.read_parquet`` and others read it as one table.
        skip_bad_images: leave out files that cannot be decoded, and list them in ``_skipped.csv``, instead of stopping.
        batch_size: images of a forward pass and of a file's rows; None is 64.
        workers: processes with the model; None is one for each GPU, or else one for two cores.
        address: of a Ray cluster; None is this machine.
        progress: a bar on standard error; None shows it on a terminal.
        on_batch: called after each batch with the images that are done, and all there are.

    Raises:
        DataError: no image, one that cannot be decoded, an output folder that holds something else, or a dense model.
        MissingExtraError: ray is not installed.
        StoreError, BackboneError: the model cannot be loaded.
        RefoldError: Ray is not reached or gave up.
    """
    size = 64 if batch_size is None else batch_size
    for name, value in (("batch_size", size), ("workers", 1 if workers is None else workers)):
        if value < 1:
            raise DataError(f"must be 1 or more, not {value}", where=name)
    require_ray()
    ready = resolve(source, weights=weights, force=force)
    if ready.dense or ready.kind == "video":
        raise DataError(f"is of task {ready.kind!r}", where=str(source), remedy="Predict it without an engine")
    paths, _ = find_sources(images, IMAGES, None)
    ready = replace(ready, model=_merged(ready.model), config=None)
    parts = _Parts(Path(output), ready)
    left = [path for path in paths if path not in parts.done]
    before = done = len(paths) - len(left)
    skipped: list[tuple[str, str]] = []
    if left:
        with ray_started(address) as resources, show_count(progress, "images", total=len(paths)) as show:
            for rows, bad in _stream(ready, left, size, workers, resources):
                if bad and not skip_bad_images:
                    path, reason = bad[0]
                    raise DataError(reason, where=path, remedy=_REMEDY)
                skipped += bad
                parts.write(rows)
                done += len(rows) + len(bad)
                show(done)
                if on_batch is not None:
                    on_batch(done, len(paths))
    parts.write_skipped(skipped)
    missing = len(paths) - len(skipped) - len(parts.done.intersection(paths))
    if missing:
        raise RefoldError(f"{missing} images have no row", where=str(parts.folder), remedy="Start it again")
    return BatchPredictions(parts.folder, len(paths) - len(skipped), before, skipped)


def _merged(model: torch.nn.Module) -> torch.nn.Module:
    """On the CPU, in eval mode, with the adapter folded in if it can be, and then a text tower too."""
    from refold.backbones import fold_text

    model = model.cpu().eval()
    if require_state(model, "predict").record().method.mergeable:
        refold.merge(model, keep_base=False)
        model = fold_text(model)
    return model


def _stream(
    ready: Ready, paths: list[str], size: int, workers: int | None, resources: dict[str, float]
) -> Iterator[tuple[list[dict[str, Any]], list[tuple[str, str]]]]:
    """Rows and bad files of each batch, as they come."""
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    context = DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    gpus = int(resources.get("GPU", 0))
    pool = workers or gpus or max(1, int(resources.get("CPU", 1)) // 2)
    threads = max(1, int(resources.get("CPU", 1)) // pool)
    # A block is a batch: what a forward pass sees does not depend on which processes are alive.
    blocks = [pa.table({"path": paths[first : first + size]}) for first in range(0, len(paths), size)]
    rendering = Rendering.of(ready.preprocessing, ready.preprocessing.channels)
    listed: Any = ray.data.from_arrow(blocks)
    arrays: dict[str, Any] = {"batch_size": None, "batch_format": "numpy"}
    read = listed.map_batches(_read, **arrays, fn_kwargs={"rendering": rendering, "folder": str(Path.cwd())})
    data = read.map_batches(
        _Predictor,
        **arrays,
        fn_constructor_kwargs={"ready": ray.put(ready), "threads": threads},
        compute=ActorPoolStrategy(size=pool),
        # Without a claim on cores, which tasks that read may all have taken.
        num_cpus=0,
        num_gpus=min(1.0, gpus / pool),
    )
    try:
        for block in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            found = block.to_pylist()
            rows = [json.loads(row["row"]) for row in found if not row["reason"]]
            yield rows, [(row["path"], row["reason"]) for row in found if row["reason"]]
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RefoldError(f"Ray gave up ({reason})", remedy="The same call goes on with what is left") from error


def _read(batch: dict[str, np.ndarray], rendering: Rendering, folder: str) -> dict[str, Any]:
    """In a task: decode and resize; of a file that cannot be, nothing but the reason."""
    import numpy as np

    images = np.zeros((len(batch["path"]), rendering.channels, *rendering.size), dtype=np.uint8)
    reasons = []
    for image, path in zip(images, batch["path"], strict=True):
        try:
            image[:] = render(decode(str(Path(folder, path)), rendering.channels), rendering)
            reasons.append("")
        except DataError as error:
            reasons.append(error.reason)
    return {"path": batch["path"], "image": images, "reason": np.array(reasons, dtype=object)}


class _Predictor:
    """In a process of the pool: the model, and what it says."""

    def __init__(self, ready: Ready, threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        ready = ray.get(ready) if isinstance(ready, ray.ObjectRef) else ready
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.task = ready.model.to(self.device), ready.task
        self.normalize = Normalize(ready.preprocessing)

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        import numpy as np

        images = self.normalize(torch.from_numpy(batch["image"].copy()))
        logits = self.model(images.to(self.device)).float().cpu()
        rows = prediction_rows([str(path) for path in batch["path"]], self.task.scores(logits), self.task)
        told = np.array([json.dumps(row) for row in rows], dtype=object)
        return {"path": batch["path"], "reason": batch["reason"], "row": told}


class _Parts:
    """The output folder.

    Attributes:
        done: paths that have a row.
    """

    def __init__(self, folder: Path, ready: Ready) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        self.folder = folder
        predictions = {"classify": pa.string(), "multilabel": pa.list_(pa.string()), "regress": pa.float64()}
        self.schema = pa.schema(
            [
                ("path", pa.string()),
                ("prediction", predictions[ready.kind]),
                *((f"score {name}", pa.float32()) for name in ready.classes or ()),
            ]
        )
        model = {"model": _fingerprint(ready.model), "classes": ready.classes, "task": ready.kind}
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            try:
                check_same(json.loads((folder / _MODEL).read_text(encoding="utf-8")), model)
            except (OSError, ValueError) as error:
                raise DataError("the output folder is not empty", where=str(folder), remedy="Choose another") from error
            except DataError as error:
                raise DataError(
                    "holds predictions of another model", where=str(folder), remedy="Choose another output folder"
                ) from error
        else:
            write_json(folder / _MODEL, model)
        self.done: set[str] = set()
        for part in sorted(folder.glob("part-*.parquet")):
            self.done.update(pyarrow.parquet.read_table(part, columns=["path"])["path"].to_pylist())

    def write(self, rows: list[dict[str, Any]]) -> None:
        """One more file, named after its images: whole, or not at all."""
        import pyarrow as pa
        import pyarrow.parquet

        if not rows:
            return
        paths = [row["path"] for row in rows]
        name = hashlib.blake2b("\n".join(paths).encode(), digest_size=8).hexdigest()
        write_atomically(
            self.folder / f"part-{name}.parquet",
            lambda file: pyarrow.parquet.write_table(pa.Table.from_pylist(rows, self.schema), file),
        )
        self.done.update(paths)

    def write_skipped(self, skipped: list[tuple[str, str]]) -> None:
        if skipped:
            text = io.StringIO(newline="")
            csv.writer(text).writerows([("path", "reason"), *skipped])
            write_atomically(self.folder / _SKIPPED, lambda file: file.write(text.getvalue().encode()))


def _fingerprint(model: torch.nn.Module) -> str:
    """Of all weights, bit for bit."""
    found = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
