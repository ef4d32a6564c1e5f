"""What a trained dense model sees in images without labels, and its pictures and files.

==========================  ==========================================================================================
file                        content
==========================  ==========================================================================================
``masks/NAME.png``          of segmentation: the class index of every pixel, from 0, as a palette image whose colours
                            are those of the overlays
``predictions.json``        of detection: rows of a COCO results file. ``image_id`` counts the images from 1, sorted by
                            path, ``category_id`` the model's classes from 1; beside them ``file_name``, the path below
                            the folder that was searched, and ``category``, the class's name
``classes.txt``             one class a line; the first is 0 in the masks, 1 in the JSON
``overlays/NAME.png``       the image with its mask or objects drawn on it
==========================  ==========================================================================================
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refold.data.coco_files import BACKGROUND
from refold.data.decoding import decode
from refold.dense.job import background_of
from refold.detection import BoxSet, to_results, write_results
from refold.errors import DataError
from refold.segmentation import Inference
from refold.segmentation.loader import as_input
from refold.training.build import Ready
from refold.training.evaluation import refuse_others
from refold.training.inference import start_accelerator
from refold.training.progress import More, counting

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["predict_dense"]

_SURE = 0.5


def predict_dense(
    ready: Ready,
    paths: Sequence[str],
    output: str | Path | None,
    *,
    threshold: float | None = None,
    inference: Inference | None = None,
    short_side: int | None = None,
) -> list[dict[str, Any]]:
    """:func:`refold.predict` of a dense model; the arguments are described there.

    Raises:
        DataError: an argument that is not for the model's task, an image that cannot be read, or an output folder that
            holds something.
    """
    if ready.kind == "segment":
        refuse_others(ready.kind, {"threshold": threshold})
    else:
        refuse_others(ready.kind, {"inference": inference, "short_side": short_side})
    accelerator = start_accelerator()
    files = None if output is None or not accelerator.is_main_process else _Files(Path(output), paths, ready)
    model = ready.model.to(accelerator.device)
    bar = counting("images", total=len(paths), main=accelerator.is_main_process)
    with torch.no_grad(), bar as more:
        if ready.kind == "segment":
            rows = _segment(ready, model, paths, files, accelerator.device, inference or Inference(), short_side, more)
        else:
            sure = _SURE if threshold is None else threshold
            rows = _detect(ready, model, paths, files, accelerator.device, sure, more)
    accelerator.wait_for_everyone()
    return rows


def _segment(
    ready: Ready,
    model: Any,
    paths: Sequence[str],
    files: _Files | None,
    device: torch.device,
    inference: Inference,
    short_side: int | None,
    more: More,
) -> list[dict[str, Any]]:
    from torchvision.transforms.functional import pil_to_tensor

    rows = []
    for k, path in enumerate(paths):
        image = pil_to_tensor(decode(path, ready.preprocessing.channels))
        batch = as_input(image, ready.preprocessing, short_side)
        size = (image.shape[-2], image.shape[-1])
        mask = inference(model, batch.to(device), size).argmax(1)[0].to("cpu", torch.uint8)
        prediction: Tensor | str = mask
        if files is not None:
            prediction = files.write_mask(k, mask)
            files.write_overlay(k, image, mask)
        rows.append({"path": path, "prediction": prediction})
        more()
    return rows


def _detect(
    ready: Ready,
    model: Any,
    paths: Sequence[str],
    files: _Files | None,
    device: torch.device,
    threshold: float,
    more: More,
) -> list[dict[str, Any]]:
    classes = list(ready.classes or ())
    images = BoxSet.unlabelled(paths, classes)
    rows = []
    for k, path in enumerate(paths):
        image = images.read(k)
        found = {name: value.cpu() for name, value in model([image.to(device).float() / 255])[0].items()}
        results = to_results([found], [k], images)
        name = Path(path).name if files is None else files.names[k]
        for one in results:
            one |= {"file_name": name, "category": classes[one["category_id"] - 1]}
        if files is not None:
            files.write_overlay(k, image, found, threshold)
        rows.append({"path": path, "prediction": results})
        more()
    if files is not None:
        write_results((one for row in rows for one in row["prediction"]), files.root / "predictions.json")
    return rows


class _Files:
    """Where predictions go, and how they look.

    Attributes:
        names: of the images, below the folder that they have in common.
    """

    def __init__(self, root: Path, paths: Sequence[str], ready: Ready) -> None:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise DataError("the output folder is not empty", where=str(root), remedy="Choose another")
        self.root, self.classes = root, list(ready.classes or ())
        above = os.path.commonpath([Path(path).absolute().parent for path in paths])
        self.names = [Path(path).absolute().relative_to(above).as_posix() for path in paths]
        stems = [Path(name).with_suffix("") for name in self.names]
        times = Counter(stems)
        # "a.jpg" and "a.png" become "a.jpg.png" and "a.png.png".
        self.pictures = [f"{n if times[stem] > 1 else stem}.png" for n, stem in zip(self.names, stems, strict=True)]
        if ready.kind == "segment":
            self.shown, self.background = self.classes, background_of(self.classes)
        else:
            self.shown, self.background = [BACKGROUND, *self.classes], 0
        self._new(root / "classes.txt").write_text("\n".join(self.classes) + "\n", encoding="utf-8")

    def write_mask(self, index: int, mask: Tensor) -> str:
        """Write class indices (H, W) as a palette PNG, and return its path."""
        from PIL import Image

        from refold.report.overlays import class_colours

        picture = Image.fromarray(mask.numpy())
        colours = class_colours(len(self.classes), self.background)
        picture.putpalette([value for colour in colours for value in colour or (0, 0, 0)])
        return self._save(picture, f"masks/{self.pictures[index]}")

    def write_overlay(self, index: int, image: Tensor, labels: Any, threshold: float = _SURE) -> None:
        from torchvision.transforms.functional import to_pil_image

        from refold.report.overlays import paint

        drawn = paint(image, labels, self.shown, threshold=threshold, background=self.background)
        self._save(to_pil_image(drawn), f"overlays/{self.pictures[index]}")

    def _save(self, picture: Image.Image, name: str) -> str:
        target = self._new(self.root / name)
        picture.save(target)
        return str(target)

    @staticmethod
    def _new(file: Path) -> Path:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot be created ({error.strerror})", where=str(file.parent)) from error
        return file
