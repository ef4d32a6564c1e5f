"""Bad input for dense tasks: one clear error each, before training begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dense_runs import settings
from refold.dense.shapes import shapes
from refold.errors import RefoldError
from refold.training import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data"), counts=(4, 2, 2), side=64).root


def smaller_mask(folder: Path) -> None:
    file = folder / "masks" / "train" / "train_001.png"
    Image.open(file).resize((32, 64)).save(file)


def label_beyond_the_classes(folder: Path) -> None:
    file = folder / "masks" / "val" / "val_000.png"
    mask = np.array(Image.open(file))
    mask[0, 0] = 9
    Image.fromarray(mask).save(file)


def missing_image(folder: Path) -> None:
    (folder / "images" / "train" / "train_002.png").unlink()


def no_annotations(folder: Path) -> None:
    file = folder / "annotations" / "instances_train.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))


def nothing(folder: Path) -> None:
    pass


BAD = {
    "size": ("segment", smaller_mask, {}, r"train_001\.png: the mask is 64x32 pixels, its image 64x64"),
    "label": ("segment", label_beyond_the_classes, {}, r"val_000\.png: 1 pixels have the label 9, beyond the 4"),
    "missing image": ("instance", missing_image, {}, r"there is no image '.*train_002\.png"),
    "no annotations": ("detect", no_annotations, {}, r"instances_train\.json: has no annotations"),
    "stages": ("segment", nothing, {"model": "timm/levit_128s", "decoder": "fpn"}, "levit_128s: has maps of strides"),
    "one stride": ("segment", nothing, {"decoder": "setr_pup"}, "setr_pup: needs maps of one stride"),
    "decoder": ("detect", nothing, {"decoder": "upernet"}, "decoder: 'upernet' is not for detect"),
    "mixup": ("segment", nothing, {"mixup": 0.2}, "mixup: is not for task 'segment'"),
    "crop": ("detect", nothing, {"crop": "center"}, "crop: is not for task 'detect'"),
    "drop path": ("detect", nothing, {"drop_path": 0.3}, "drop_path: is not for task"),
    "augment": ("segment", nothing, {"augment": "lsj"}, "augment: unknown augmentation 'lsj'. Known: none, flip"),
    "select": ("detect", nothing, {"select": "accuracy"}, "select: 'accuracy' is no metric here. Known: ap"),
    "package": (
        "segment",
        nothing,
        {"data": "packaged/moon"},
        "packaged/moon: no such packaged data set. Known: shapes, ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_before_training(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, spoil, changes, says = BAD[case]
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    spoil(copy)
    monkeypatch.setattr("refold.training.trainer.Trainer.run", lambda *_: pytest.fail("training began"))
    decoder = {"decoder": "linear" if task == "segment" else None}
    with pytest.raises(RefoldError, match=says) as caught:
        train(settings(copy, tmp_path / "run", task=task, **decoder).replace(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
