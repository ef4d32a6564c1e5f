"""One training of a protocol: from settings and data to a record that is kept, and never made twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refold.data import Splits
from refold.errors import DataError
from refold.training.build import build_attached
from refold.training.checkpoint import check_same, write_atomically
from refold.training.config import FREE_SETTINGS, TrainConfig
from refold.training.evaluation import score
from refold.training.inference import start_accelerator
from refold.training.loop import fit

__all__ = ["trial", "write_json"]


def trial(config: TrainConfig, splits: Splits, path: Path, *, progress: bool | None = False) -> dict[str, Any]:
    """Train on ``splits.train`` to the last epoch, and score what else is there.

    Args:
        config: of the model and the training; its ``data`` and ``output`` are not used.
        splits: with a validation set, metrics are taken on it every ``validate_every`` epochs; with a test set, the
            model of the last epoch is scored on it, in float32, once.
        path: of the record, a JSON file; read instead of training again where it is there.
        progress: bars on standard error; None shows them on a terminal.

    Returns:
        ``settings``; ``val``, a row for each validation; ``test``, metrics; ``best_epoch`` and ``seconds``.

    Raises:
        DataError: a record of other settings.
        RefoldError: whatever training raises.
    """
    settings, accelerator = config.to_json(), start_accelerator()
    finished = path.is_file()
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if finished:
        record = _read(path)
        check_same(record["settings"], settings, ignore=(*FREE_SETTINGS, "data"))
        return record
    model, preprocessing = build_attached(config, splits.task, splits.classes)
    fitted = fit(
        model, splits.train, splits.val, preprocessing, config, task=splits.task, classes=splits.classes,
        progress=progress,
    )  # fmt: skip
    record: dict[str, Any] = {
        "settings": settings,
        "images": {
            name: len(part)
            for name, part in (("train", splits.train), ("val", splits.val), ("test", splits.test))
            if part is not None
        },
        "seconds": fitted.seconds,
        "precision": fitted.precision,
    }
    if splits.val is not None:
        record["val"] = [row for row in fitted.history if row["split"] == "val"]
    if splits.test is not None:
        assert splits.val is None, "the test set is for the last epoch"
        result = score(
            model, splits.test, splits.test.targets, preprocessing, fitted.task,
            accelerator=accelerator, batch_size=config.batch_size, workers=config.workers,
        )  # fmt: skip
        record["test"] = result.metrics
    if accelerator.is_main_process:
        write_json(path, record)
    return record


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["settings"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(path), remedy="Remove it to train again") from error
    return record
