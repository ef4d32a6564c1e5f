"""SPM, LV-Adapter and DenseCLIP learn on composites: cut-outs pasted on pictures, other ones in each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

import refold
from dense_runs import settings
from refold.attachment import attached_part
from refold.data.composite import compose
from refold.dense import load_encoder
from refold.dense.building import attach_to
from refold.dense.job import make_problem
from refold.dense.multitask import MultiTask, fit_tasks
from refold.detection import build_detector, load_boxes
from refold.methods.lv_adapter import set_text
from refold.preprocessing import Preprocessing
from refold.segmentation import Segmenter, load_masks
from refold.segmentation.pixel_text import PixelText
from refold.training import train
from refold.training.config import Recipe
from refold.training.loop import solve

SIDE, CLASSES = 64, 3  # the background among them
PREPROCESSING = Preprocessing(size=(SIDE, SIDE))
RECIPE = Recipe(epochs=8, batch_size=4, lr=1e-2, warmup_epochs=0, precision="fp32", attention="default")


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reddish discs and bluish squares on noise of grey and green, 32 images to learn from."""
    root, numbers = tmp_path_factory.mktemp("composite"), np.random.default_rng(0)
    cutouts: dict[str, list[Path]] = {"disc": [], "square": []}
    for name, paths in cutouts.items():
        for k in range(5):
            image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
            draw = ImageDraw.Draw(image)
            colour = (200 + 10 * k, 20 + 8 * k, 30) if name == "disc" else (30, 20 + 8 * k, 200 + 10 * k)
            (draw.ellipse if name == "disc" else draw.rectangle)((2, 2, 37, 37), fill=(*colour, 255))
            paths.append(root / f"{name}{k}.png")
            image.save(paths[-1])
    photographs = []
    for k in range(6):
        grey = numbers.integers(60, 160, (90, 90, 1)).repeat(3, axis=2) + np.array([0, 10 * k, 0])
        photographs.append(root / f"photo{k}.png")
        Image.fromarray(grey.astype(np.uint8)).save(photographs[-1])
    return compose(cutouts, photographs, root / "made", images=(32, 8, 8), size=SIDE, scale=(0.3, 0.6)).root


def encoder() -> Any:
    torch.manual_seed(0)
    return load_encoder("timm/test_convnext", pretrained=False, image_size=SIDE)


def learned(history: list[dict[str, Any]], metric: str) -> tuple[float, float]:
    """The validation metric after the first and the last epoch."""
    found = [row[metric] for row in history if row["split"] == "val"]
    return found[0], found[-1]


def moved(model: nn.Module) -> bool:
    """Whether what writes to the stream has left zero, where it starts, in every adapter."""
    ups = [p for n, p in refold.trainable_parameters(model).items() if n.endswith("up.weight") and ".refold." in n]
    return bool(ups) and all(bool(p.any()) for p in ups)


def test_spm_learns_to_segment_a_composite(composite: Path, tmp_path: Path) -> None:
    method = refold.SPM(hidden=8, classes=4)
    config = settings(composite, tmp_path / "run", decoder="fpn(width=64)", method=method, epochs=8, batch_size=4)
    result = train(config)
    assert moved(result.model.get_submodule(attached_part(result.model)))
    assert result.metrics["test"]["miou"] > 0.6  # all background is 0.33 at most


def test_lv_adapters_learn_two_tasks_on_a_composite(composite: Path) -> None:
    """Segmentation and boxes, each with an adapter that starts from text embeddings of its classes."""
    loaded = encoder()
    boxes = build_detector(
        "fcos", loaded.encoder, CLASSES - 1, preprocessing=PREPROCESSING, min_size=SIDE, max_size=SIDE, channels=64
    )
    model = MultiTask({"stuff": Segmenter(loaded.encoder, "fpn", CLASSES, width=64), "things": boxes})
    words = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(1))
    model.attach({task: refold.LVAdapter(hidden=8, prompts=CLASSES, text_width=12) for task in model.tasks})
    for task in model.tasks:
        model.activate(task)
        set_text(model.body, words)
    parts: dict[str, Any] = {"stuff": load_masks(composite), "things": load_boxes(composite)}
    solved = fit_tasks(model, parts, PREPROCESSING, RECIPE)
    for task in model.tasks:
        model.activate(task)
        assert moved(model.body)
    assert learned(solved.history, "stuff_miou")[1] > 0.6
    first, last = learned(solved.history, "things_ap50")
    assert last > max(first, 0.1)


def test_denseclip_learns_to_segment_a_composite(composite: Path) -> None:
    loaded, data = encoder(), load_masks(composite)
    model = PixelText(loaded.encoder, "fpn", torch.eye(CLASSES, 12), width=64, context=1)
    attach_to(
        model, refold.RepAdapter(rank=4), task="segment", decoder="fpn", backbone=loaded.spec,
        preprocessing=PREPROCESSING, classes=data.classes,
    )  # fmt: skip
    solved = solve(model, make_problem(model, data, PREPROCESSING, RECIPE), RECIPE)
    assert learned(solved.history, "miou")[1] > 0.6
