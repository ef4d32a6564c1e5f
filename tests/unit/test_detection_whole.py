"""From a COCO file on disk to its AP: reading, augmentation, training, results, evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from refold.dense import load_encoder
from refold.detection import BoxLoader, average_precision, build_detector, load_boxes, to_results, write_results

COLOURS = {17: (250, 40, 40), 4: (40, 40, 250)}  # category id: a colour


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, each with a red and a blue rectangle, as COCO has them."""
    images, annotations = [], []
    for k in range(4):
        picture = Image.new("RGB", (72, 64), (110, 120, 110))
        for n, (id_, colour) in enumerate(COLOURS.items()):
            x, y, width, height = 4 + 34 * ((n + k) % 2), 8 + 6 * k, 24 + 2 * k, 30
            picture.paste(colour, (x, y, x + width, y + height))
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(
                {"image_id": 50 + k, "category_id": id_, "bbox": [x, y, width, height], "segmentation": [corners]}
            )
        picture.save(tmp_path / f"{k}.png")
        images.append({"id": 50 + k, "file_name": f"{k}.png", "height": 64, "width": 72})
    names = [{"id": 17, "name": "red"}, {"id": 4, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": names}
    (tmp_path / "instances_train.json").write_text(json.dumps(content))
    return tmp_path


def test_a_detector_learns_what_the_files_say(folder: Path) -> None:
    torch.manual_seed(0)
    boxes = load_boxes(folder, masks=True, fractions=(1.0, 0.0, 0.0)).train
    loaded = load_encoder("timm/test_convnext", pretrained=False)
    model = build_detector(
        "mask_rcnn",
        loaded.encoder,
        len(boxes.classes),
        preprocessing=loaded.preprocessing,
        min_size=64,
        max_size=96,
        channels=32,
        hidden=64,
        rois=32,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = BoxLoader(boxes, batch_size=2, augment="hflip", shuffle=True)
    for epoch in range(30):
        loader.set_epoch(epoch)
        for images, targets in loader:
            optimizer.zero_grad()
            sum(model(images, targets).values()).backward()
            optimizer.step()
    model.eval()
    rows, plain = [], BoxLoader(boxes, batch_size=4)
    with torch.no_grad():
        for images, targets in plain:
            rows += to_results(model(images), [int(target["image_id"]) for target in targets], boxes)
    write_results(rows, folder / "results.json")
    rows = json.loads((folder / "results.json").read_text())
    assert {row["category_id"] for row in rows} == {4, 17}
    for measured in ("bbox", "segm"):
        found = average_precision(boxes, rows, measured)
        assert found.metrics["ap50"] > 0.9
        assert {row["class"]: row["support"] for row in found.per_class} == {"blue": 4, "red": 4}
