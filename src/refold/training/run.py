"""The run folder: settings, metrics, events, checkpoint, results. Only the main process writes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refold.errors import DataError, RefoldError
from refold.training.checkpoint import Checkpoint, check_same, write_atomically
from refold.training.config import FREE_SETTINGS, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard.writer import SummaryWriter

    from refold.data import ImageSet
    from refold.video import VideoSet

__all__ = ["RunFolder"]


class RunFolder:
    """One run's files.

    Args:
        path: the folder.
        main: whether this process writes; the others only read.
    """

    def __init__(self, path: str | Path, *, main: bool = True) -> None:
        self.path, self.main = Path(path), main
        self._events: SummaryWriter | None = None

    @property
    def checkpoint_path(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def adapter_path(self) -> Path:
        return self.path / "adapter.safetensors"

    def check(self, config: TrainConfig, *, resume: bool) -> None:
        """Before any work: is the folder free, or of the same run?

        Raises:
            DataError: a file is in the way, the folder holds something and ``resume`` is off, or the run in it
                began with other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise DataError("is a file", where=str(self.path), remedy="Choose another output folder")
        if not self.path.exists() or {file.name for file in self.path.iterdir()} <= {"config.json"}:
            return  # a start that failed before training leaves config.json
        if not resume:
            raise DataError(
                "the output folder is not empty",
                where=str(self.path),
                remedy="Choose another, or resume the run in it (--resume)",
            )
        check_same(TrainConfig.load(self.path).to_json(), config.to_json(), ignore=FREE_SETTINGS)

    def open(self, config: TrainConfig) -> None:
        """Create the folder and write ``config.json``: the settings, ``environment`` and ``command``.

        The environment of a resumed run is the one it was resumed in.

        Raises:
            RefoldError: the folder cannot be created or written.
        """
        if not self.main:
            return
        from refold.bench.environment import environment

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RefoldError(f"cannot be created ({error})", where=str(self.path)) from error
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.write_json("config.json", {**config.to_json(), "environment": environment(), "command": command})

    def require_space(self, needed: int) -> None:
        """Refuse to start a run whose checkpoints do not fit.

        Raises:
            RefoldError: less than ``needed`` bytes are free.
        """
        if self.main and (free := shutil.disk_usage(self.path).free) < needed:
            raise RefoldError(
                f"{free / 1e6:.0f} MB are free, and the checkpoints need {needed / 1e6:.0f} MB",
                where=str(self.path),
                remedy="Free some space, or choose another output folder",
            )

    def read_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint, None if the run was stopped before it wrote one.

        Raises:
            RefoldError: the file is damaged.
        """
        return Checkpoint.read(self.checkpoint_path) if self.checkpoint_path.exists() else None

    def start_log(self, history: list[dict[str, Any]]) -> None:
        """Begin ``metrics.jsonl`` and the TensorBoard events with the lines of an earlier start of the run.

        Whatever a killed process logged after its last checkpoint is dropped.
        """
        if not self.main:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        text = "".join(json.dumps(row) + "\n" for row in history)
        write_atomically(self.path / "metrics.jsonl", lambda file: file.write(text.encode()))
        purge = history[-1]["step"] + 1 if history else None
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=purge)

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``, and its numbers to the events.

        Raises:
            RefoldError: the disk is full.
        """
        if not self.main:
            return
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RefoldError(f"cannot be written ({error})", where=str(self.path / "metrics.jsonl")) from error
        if self._events is not None:
            for name, value in row.items():
                if name not in ("epoch", "step", "split"):
                    self._events.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def close(self) -> None:
        """Flush the events."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def write_json(self, name: str, data: Any) -> None:
        """Write ``data`` as one file, atomically."""
        if self.main:
            text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
            write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def write_predictions(self, rows: list[dict[str, Any]]) -> None:
        """``predictions.csv``; lists of labels are joined by commas."""
        if not self.main or not rows:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: ", ".join(v) if isinstance(v, list) else v for k, v in row.items()})
        content = text.getvalue().encode()
        write_atomically(self.path / "predictions.csv", lambda file: file.write(content))

    def write_thumbnails(
        self, image_set: ImageSet | VideoSet, rows: list[dict[str, Any]], *, most: int = 12, size: int = 112
    ) -> None:
        """``thumbnails/``: the most confident mistakes and the most confident hits, ``most`` of each at most.

        Args:
            image_set: what was predicted.
            rows: one for each image: path, target, prediction, score and correct (None for regressions, of which
                those with the largest and the smallest error are shown; ``score`` is then the negative error).
            most: images of each kind.
            size: side of the stored images in pixels.
        """
        if not self.main:
            return
        import numpy as np

        order = sorted(range(len(rows)), key=lambda i: -rows[i]["score"])
        if rows and rows[0]["correct"] is None:
            chosen = list(dict.fromkeys([*order[::-1][:most], *order[:most]]))
        else:
            wrong = [i for i in order if not rows[i]["correct"]]
            right = [i for i in order if rows[i]["correct"]]
            chosen = wrong[:most] + right[:most]
        folder = self.path / "thumbnails"
        folder.mkdir(exist_ok=True)
        images = _as_rgb(image_set.read(chosen, (size, size)))
        write_atomically(folder / "thumbnails.npz", lambda file: np.savez_compressed(file, images=images))
        table = [{"index": k, **rows[i]} for k, i in enumerate(chosen)]
        self.write_json("thumbnails/thumbnails.json", table)


def _as_rgb(images: Tensor) -> Any:
    """(B, C, H, W) uint8 of any number of channels -> numpy (B, H, W, 3): grey for any but three channels."""
    if images.shape[1] != 3:
        images = images.float().mean(dim=1, keepdim=True).round().to(images.dtype).expand(-1, 3, -1, -1)
    return images.permute(0, 2, 3, 1).contiguous().numpy()
