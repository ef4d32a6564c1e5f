"""Overlays: pixels with known answers, what is left out, and that names do not cover each other."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from refold import DataError
from refold.report import figures
from refold.report.overlays import contact_sheet, paint, palette

CLASSES = ["background", "bird", "cat"]
BIRD, CAT = palette(2)


def flat(value: int = 100, side: int = 480) -> torch.Tensor:
    return torch.full((3, side, side), value, dtype=torch.uint8)


def at(picture: torch.Tensor, y: int, x: int) -> tuple[int, ...]:
    return tuple(picture[:, y, x].tolist())


def halfway(colour: tuple[int, ...], ground: int = 100) -> tuple[int, ...]:
    return tuple((part + ground) // 2 for part in colour)


def objects(*boxes: tuple[float, ...], labels: list[int], scores: list[float] | None = None) -> dict:
    found = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels)}
    return found if scores is None else {**found, "scores": torch.tensor(scores)}


def test_colours_are_distinct_and_do_not_depend_on_their_number():
    many = palette(300)
    assert len(set(many)) == 300
    assert all(palette(count) == many[:count] for count in (0, 1, 19, 20, 150))
    assert all(0 <= part <= 255 for colour in many for part in colour)
    near = min(np.abs(np.subtract(a, b)).sum() for a, b in combinations(palette(8), 2))
    assert near > 100


def test_semantic_mask_is_blended_and_outlined():
    mask = torch.zeros(480, 480, dtype=torch.long)
    mask[100:200, 100:300] = 1
    mask[300:400, 100:300] = 2
    mask[420:, 420:] = 255
    picture = paint(flat(), mask, CLASSES, names=False)
    assert picture.shape == (3, 480, 480)
    assert picture.dtype == torch.uint8
    assert at(picture, 50, 50) == (100, 100, 100)
    for y, colour in ((150, BIRD), (350, CAT)):
        assert np.abs(np.subtract(at(picture, y, 200), halfway(colour))).max() <= 1
        assert at(picture, y, 100) == colour  # its outline
        assert at(picture, y, 99) == (100, 100, 100)
    assert at(picture, 450, 450) == (50, 50, 50)  # ignored
    whole = paint(flat(), mask, CLASSES, names=False, background=None)
    assert at(whole, 50, 50) != (100, 100, 100)
    assert (paint(flat(), mask * 0, CLASSES) == 100).all()


def test_small_images_are_enlarged_with_their_labels():
    mask = torch.zeros(60, 80, dtype=torch.uint8)
    mask[10:30, 20:60] = 2
    picture = paint(torch.full((1, 60, 80), 100 / 255), mask, CLASSES, names=False)  # grey, floats
    assert picture.shape == (3, 480, 640)
    inside = (picture != 100).any(0).nonzero()
    assert inside.min(0).values.tolist() == [80, 160]
    assert inside.max(0).values.tolist() == [239, 479]


def test_boxes_have_the_colour_of_their_class():
    found = objects((100, 100, 200, 180), (250, 300, 400, 460), labels=[1, 2])
    picture = paint(flat(), found, CLASSES, names=False)
    for (x, y), colour in (((100, 140), BIRD), ((150, 100), BIRD), ((250, 380), CAT), ((300, 460), CAT)):
        assert at(picture, y, x) == colour
    assert at(picture, 140, 150) == (100, 100, 100)
    named = paint(flat(), found, CLASSES)
    assert (named[:, 70:99, 100:140] != 100).any()  # the name stands above the box


def test_instances_have_masks_and_outlines():
    masks = torch.zeros(2, 1, 480, 480)
    masks[0, 0, 100:200, 100:200] = 0.9
    masks[1, 0, 100:200, 200:300] = 0.9  # of the same class, side by side
    masks[1, 0, 300:400, 300:400] = 0.2  # a probability too low
    found = {**objects((100, 100, 199, 199), (200, 100, 299, 199), labels=[1, 1]), "masks": masks}
    picture = paint(flat(), found, CLASSES, names=False)
    assert np.abs(np.subtract(at(picture, 150, 150), halfway(BIRD))).max() <= 1
    assert at(picture, 150, 199) == at(picture, 150, 200) == BIRD  # a line between them
    assert at(picture, 350, 350) == (100, 100, 100)


def test_low_scores_and_boxes_without_area_are_left_out():
    found = objects((100, 100, 200, 180), (250, 300, 400, 460), labels=[1, 2], scores=[0.4, 0.9])
    picture = paint(flat(), found, CLASSES)
    assert at(picture, 140, 100) == (100, 100, 100)
    assert at(picture, 380, 250) == CAT
    assert at(paint(flat(), found, CLASSES, threshold=0.3), 140, 100) == BIRD
    none = objects((50, 50, 50, 90), (90, 90, 80, 80), labels=[1, 1])
    assert (paint(flat(), none, CLASSES) == 100).all()
    assert (paint(flat(), objects(labels=[]), CLASSES) == 100).all()


@pytest.fixture
def tags(monkeypatch):
    """The boxes of the names that are written, and the words."""
    boxes, words = [], []
    rectangle, text = ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.text

    def record_box(self, xy, fill=None, **options):
        if fill is not None:
            boxes.append(tuple(xy))
        rectangle(self, xy, fill=fill, **options)

    def record_words(self, xy, content, **options):
        words.append(content)
        text(self, xy, content, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", record_box)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_words)
    return boxes, words


def test_names_never_cover_each_other_nor_leave_the_picture(tags):
    boxes, words = tags
    corners = torch.rand(120, 2) * 400
    crowd = {
        "boxes": torch.cat([corners, corners + 10 + 60 * torch.rand(120, 2)], dim=1),
        "labels": torch.randint(1, 3, (120,)),
        "scores": 0.5 + 0.5 * torch.rand(120),
    }
    paint(flat(), crowd, CLASSES)
    assert 20 < len(boxes) == len(words) < 120
    for a, b in combinations(boxes, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    assert all(0 <= x0 < x1 <= 480 and 0 <= y0 < y1 <= 480 for x0, y0, x1, y1 in boxes)
    best = int(crowd["scores"].argmax())
    assert words[0] == f"{CLASSES[crowd['labels'][best]]} {crowd['scores'][best]:.2f}"  # the surest is always named


def test_what_is_written(tags):
    _, words = tags
    box = (100.0, 100.0, 200.0, 200.0)
    paint(flat(), objects(box, labels=[1]), CLASSES)
    paint(flat(), objects(box, labels=[1], scores=[0.875]), ["background", "tree"])  # one class: the score will do
    paint(flat(), objects(box, labels=[1]), ["background", "tree"])
    mask = torch.zeros(480, 480, dtype=torch.long)
    mask[200:300] = 2
    paint(flat(), mask, CLASSES)
    assert words == ["bird", "0.88", "cat"]


def test_contact_sheet(tmp_path):
    images = [flat(side=96), flat(50, side=96), torch.rand(3, 60, 96)]
    truths = [torch.zeros(image.shape[1:], dtype=torch.long) for image in images]
    truths[0][:40] = 2
    predictions = [objects((5, 5, 30, 30), labels=[1], scores=[score]) for score in (0.9, 0.2, 0.1)]
    figure = contact_sheet(images, CLASSES, truths=truths, predictions=predictions)
    assert [axes.get_title(loc="left") for axes in figure.axes[:6]] == [
        "image",
        "truth",
        "prediction, score ≥ 0.50",
    ] * 2
    assert sum(len(axes.images) for axes in figure.axes) == 9
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["bird", "cat"]
    colours = [
        tuple(round(255 * part) for part in patch.get_facecolor()[:3]) for patch in figure.legends[0].get_patches()
    ]
    assert colours == [BIRD, CAT]
    assert np.array_equal(
        figure.axes[1].images[0].get_array(), paint(images[0], truths[0], CLASSES, names=False).permute(1, 2, 0)
    )
    with Image.open(figures.save(figure, tmp_path / "sheet.png")) as file:
        assert np.asarray(file.convert("RGB")).std() > 10
    assert figures.to_svg(figure, label="sheet").startswith("<svg")
    alone = contact_sheet(images, CLASSES)
    assert len(alone.axes) == 3
    assert not alone.legends


def test_refuses_what_does_not_fit():
    mask = torch.zeros(480, 480, dtype=torch.long)
    box = (1.0, 1.0, 9.0, 9.0)

    def complaint(image, labels) -> str:
        with pytest.raises(DataError) as caught:
            paint(image, labels, CLASSES)
        return str(caught.value)

    assert "(2, 8, 8) torch.uint8 is no image" in complaint(flat()[:2, :8, :8], mask)
    assert "is no image" in complaint(flat().long(), mask)
    assert "is no mask of class indices for an image of (480, 480)" in complaint(flat(), mask[:100])
    assert "is no mask" in complaint(flat(), mask.float())
    assert "label 3 is beyond the 3 classes" in complaint(flat(), mask + 3)
    assert "label -1 is beyond" in complaint(flat(), objects(box, labels=[-1]))
    assert "no boxes" in complaint(flat(), {"labels": torch.tensor([1])})
    assert "2 scores for 1 labels" in complaint(flat(), objects(box, labels=[1], scores=[0.5, 0.6]))
    wrong = {**objects(box, labels=[1]), "masks": torch.zeros(1, 9, 9)}
    assert "(9, 9) for an image of (480, 480)" in complaint(flat(), wrong)
    with pytest.raises(DataError, match="truths: 1 for 2 images"):
        contact_sheet([flat(), flat()], CLASSES, truths=[mask])
    with pytest.raises(DataError, match="no image"):
        contact_sheet([], CLASSES)
