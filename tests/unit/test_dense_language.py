"""SPM, LV-Adapter and DenseCLIP learn on composites: cut-outs pasted on pictures, other ones in each split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import nn

import refold
from dense_runs import settings
from image_text import registered
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
from refold.segmentation.pixel_text import PixelText, text_of
from refold.training import train
from refold.training.loop import solve
from refold.training.recipe import Recipe

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


@pytest.fixture
def image_text() -> Iterator[None]:
    yield from registered()


DENSECLIP = "pixel_text(text='open_clip/tiny/none', decoder='fpn', width=64, context=1)"


def test_denseclip_is_a_decoder_by_name_and_its_file_brings_the_words(
    composite: Path, tmp_path: Path, image_text: None
) -> None:
    """The words are the text tower's, and a file's model has them without the tower's weights."""
    backbone = tmp_path / "backbone.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_convnext", pretrained=False).state_dict(), backbone)
    config = settings(
        composite, tmp_path / "run", decoder=DENSECLIP, method=refold.RepAdapter(rank=4), epochs=1, batch_size=4
    )
    result = train(config)
    words = result.model.decoder.scores.text
    torch.manual_seed(config.seed)  # that of the model's random weights: the text tower's come after the encoder's
    load_encoder(config.model, pretrained=False, image_size=SIDE)
    expected = text_of("open_clip/tiny/none", ["background", "disc", "square"], pretrained=False)
    torch.testing.assert_close(words, expected)
    assert result.summary["decoder"] == DENSECLIP

    again = train(config.replace(output=str(tmp_path / "again"), weights=str(backbone), decoder=DENSECLIP))
    loaded = refold.from_pretrained(again.adapter, weights=backbone)
    torch.testing.assert_close(loaded.decoder.scores.text, again.model.decoder.scores.text)
    images = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), again.model(images))


@pytest.mark.parametrize(
    ("decoder", "error", "told"),
    [
        ("pixel_text", refold.DataError, "needs text, the model whose text tower"),
        ("pixel_text(text=3)", refold.DataError, "pixel_text's text: must be a text, not 3"),
        ("pixel_text(text='open_clip/tiny/none', decoder='upnet')", refold.BackboneError, "upnet"),
        ("pixel_text(text='timm/test_vit')", refold.BackboneError, "no text tower"),
        ("pixel_text(text='open_clip/other/none')", refold.BackboneError, "open_clip knows no such model"),
        ("fpn(text='open_clip/tiny/none')", refold.DataError, "fpn has no setting 'text'"),
    ],
)
def test_a_denseclip_that_cannot_be_built_is_refused(
    composite: Path, tmp_path: Path, image_text: None, decoder: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        train(settings(composite, tmp_path / "run", decoder=decoder))
