"""Sliding windows, scales and flips, against loops written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.errors import DataError
from refold.segmentation import Inference, evaluate


class Ramp(nn.Module):
    """Logits that depend on the place inside what the model sees, so that wrong windows show."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 4, 3, padding=1)
        self.seen: list[tuple[int, int]] = []

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        self.seen.append((height, width))
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return self.mix(images) * (1 + 0.1 * rows + 0.03 * columns)


@pytest.fixture
def model() -> Ramp:
    return Ramp().eval()


def test_the_whole_image_is_a_softmax(model: Ramp) -> None:
    images = torch.randn(2, 3, 9, 11)
    with torch.no_grad():
        torch.testing.assert_close(Inference()(model, images), model(images).softmax(1))


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((20, 26), (8, 8), (5, 6)), ((16, 16), (8, 8), (8, 8)), ((7, 30), (8, 10), (3, 7)), ((20, 9), (8, 9), (1, 1))],
)
def test_windows_equal_a_loop_by_hand(
    model: Ramp, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size)
    found = Inference(window=window, stride=stride)(model, images)

    # The number of steps, then windows pushed back from the edge, as in the sliding mode of MMSegmentation.
    sums, counts = torch.zeros(2, 4, *size), torch.zeros(size)
    grid = [max(s - w + t - 1, 0) // t + 1 for s, w, t in zip(size, window, stride, strict=True)]
    for i in range(grid[0]):
        for j in range(grid[1]):
            bottom, right = min(i * stride[0] + window[0], size[0]), min(j * stride[1] + window[1], size[1])
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            with torch.no_grad():
                sums[:, :, top:bottom, left:right] += model(images[:, :, top:bottom, left:right])
            counts[top:bottom, left:right] += 1
    assert int(counts.min()) >= 1
    torch.testing.assert_close(found, (sums / counts).softmax(1))


def test_a_small_image_is_seen_whole_and_the_default_stride_is_two_thirds(model: Ramp) -> None:
    images = torch.randn(1, 3, 6, 7)
    found = Inference(window=(9, 9))(model, images)
    assert model.seen == [(6, 7)]
    with torch.no_grad():
        torch.testing.assert_close(found, model(images).softmax(1))
    model.seen.clear()
    Inference(window=(9, 9))(model, torch.randn(1, 3, 9, 21))
    assert len(model.seen) == 3  # windows begin at 0, 6 and 12


def test_scales_and_flips_by_hand(model: Ramp) -> None:
    images = torch.randn(2, 3, 12, 16)
    found = Inference(scales=(0.5, 1.0, 1.75), flip=True)(model, images)
    views = []
    with torch.no_grad():
        for height, width in ((6, 8), (12, 16), (21, 28)):
            view = F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
            mirrored = model(view.flip(-1)).flip(-1)
            for logits in (model(view), mirrored):
                views.append(F.interpolate(logits, size=(12, 16), mode="bilinear", align_corners=False).softmax(1))
    torch.testing.assert_close(found, torch.stack(views).mean(0))
    torch.testing.assert_close(found.sum(1), torch.ones(2, 12, 16))


def test_mirrored_images_give_mirrored_answers(model: Ramp) -> None:
    images = torch.randn(1, 3, 10, 14)
    inference = Inference(scales=(1.0, 2.0), flip=True)
    torch.testing.assert_close(inference(model, images.flip(-1)), inference(model, images).flip(-1))


def test_evaluation_is_at_the_masks_own_size() -> None:
    """A model that says what is painted: a colour per class on a map half as large as the mask."""

    class Painted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 50 * images

    masks = torch.zeros(1, 8, 8, dtype=torch.long)
    masks[:, :4, 4:], masks[:, 4:] = 1, 2
    images = F.one_hot(masks[:, ::2, ::2], 3).permute(0, 3, 1, 2).float()
    masks[0, 0, 0] = 255
    confusion = evaluate(Painted().eval(), [(images, masks)], ["a", "b", "c"])
    assert confusion.metrics() == {"miou": 1.0, "pixel_accuracy": 1.0, "mean_accuracy": 1.0}
    assert int(confusion.counts.sum()) == 63
    masks[:, 4:] = 1
    wrong = evaluate(Painted().eval(), [(images, masks)], ["a", "b", "c"]).metrics()
    assert wrong["pixel_accuracy"] == pytest.approx(31 / 63)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"window": (0, 4)}, "window: must be positive"),
        ({"window": (4, 4), "stride": (5, 4)}, "stride: must be 1 to the window's"),
        ({"stride": (2, 2)}, "stride: means nothing without a window"),
        ({"scales": ()}, "scales: must be positive"),
        ({"scales": (1.0, -1.0)}, "scales: must be positive"),
    ],
)
def test_bad_settings_are_refused(options: dict, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        Inference(**options)


def test_a_model_in_training_mode_is_refused(model: Ramp) -> None:
    with pytest.raises(DataError, match="the model is in training mode"):
        Inference()(model.train(), torch.zeros(1, 3, 4, 4))
