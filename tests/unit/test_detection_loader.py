"""Batches for detectors: joint augmentation, and the same batches for the same seed and epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from refold.detection import BoxLoader, BoxSet, Object
from refold.detection.augmentation import AUGMENTATIONS, BoxAugmentation
from refold.detection.masks import encode_mask, parse_segmentation
from refold.errors import DataError

BOX = (12, 20, 44, 52)


def painted(
    rows: int = 80, columns: int = 96, box: tuple[int, int, int, int] = BOX
) -> tuple[Tensor, dict[str, Tensor]]:
    """A white rectangle on black, with its box and mask."""
    mask = torch.zeros(rows, columns, dtype=torch.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    target = {
        "boxes": torch.tensor([box], dtype=torch.float32),
        "labels": torch.tensor([2]),
        "image_id": torch.tensor(0),
        "masks": mask[None],
    }
    return (mask * 255).expand(3, -1, -1).clone(), target


def extent(mask: Tensor) -> list[int]:
    ys, xs = mask.nonzero(as_tuple=True)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_image_box_and_mask_stay_together(name: str) -> None:
    augment, seen = BoxAugmentation(name), set()
    for seed in range(40):
        image, target = augment(*painted(), seed)
        assert image.shape == (3, 80, 96)
        assert image.dtype == torch.uint8
        assert target["masks"].shape == (len(target["boxes"]), 80, 96)
        assert len(target["labels"]) == len(target["boxes"])
        if not len(target["boxes"]):  # lsj: cut away
            continue
        box, mask = target["boxes"][0].tolist(), target["masks"][0]
        seen.add(tuple(round(v) for v in box))
        assert box == pytest.approx(extent(mask), abs=1.01)  # resized masks have whole pixels
        if name in ("hflip", "flip"):
            assert torch.equal(image[0], mask * 255)
        elif name == "lsj":
            inside, outside = image[0][mask.bool()].float(), image[0][~mask.bool()].float()
            assert inside.mean() > 150 > outside.mean()
    assert len(seen) == {"hflip": 2, "flip": 4}.get(name, len(seen))
    if name in ("light", "lsj"):
        assert len(seen) > 20
        sides = [b[2] - b[0] for b in seen if b[0] > 0 and b[2] < 96 and b[1] > 0 and b[3] < 80]
        low, high = {"light": (0.8, 1.25), "lsj": (0.1, 2.0)}[name]
        assert 32 * low - 1 <= min(sides) < 32 < max(sides) <= 32 * high + 1


def test_flips_are_mirror_images() -> None:
    image, target = painted()
    mirrored = 0
    for seed in range(12):
        out, changed = BoxAugmentation("hflip")(image, target, seed)
        if not torch.equal(out, image):
            mirrored += 1
            assert torch.equal(out, image.flip(-1))
            assert changed["boxes"].tolist() == [[96 - 44, 20, 96 - 12, 52]]
    assert 0 < mirrored < 12
    assert target["boxes"].tolist() == [list(BOX)]  # the caller's is untouched


def test_without_objects_and_without_masks() -> None:
    image, target = painted()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": torch.tensor(0)}
    for name in AUGMENTATIONS:
        _, changed = BoxAugmentation(name)(image, empty, 3)
        assert changed["boxes"].shape == (0, 4)
        del target["masks"]
        _, changed = BoxAugmentation(name)(image, target, 3)
        assert "masks" not in changed
        image, target = painted()


def test_an_object_that_is_cut_away_is_left_out() -> None:
    lost = 0
    for seed in range(60):
        _, target = BoxAugmentation("lsj")(*painted(box=(0, 0, 6, 6)), seed)
        lost += not len(target["boxes"])
        assert (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all()
        assert target["masks"].bool().flatten(1).any(dim=1).all()
    assert 0 < lost < 60


def test_augmentation_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    BoxAugmentation("light")(*painted(), 1)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(DataError, match="unknown augmentation 'mosaic'"):
        BoxAugmentation("mosaic")


@pytest.fixture
def box_set(tmp_path: Path) -> BoxSet:
    """Seven images of different sizes; the last has nothing on it."""
    paths, sizes, objects = [], [], []
    for k in range(7):
        image, target = painted(60 + 4 * k, 90)
        path = tmp_path / f"{k}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        rle = parse_segmentation(encode_mask(target["masks"][0]), 60 + 4 * k, 90)
        paths.append(str(path))
        sizes.append((60 + 4 * k, 90))
        objects.append([Object(BOX, 1, False, 1024.0, rle)] if k < 6 else [])
    return BoxSet(paths, sizes, objects, classes=["square"])


def batches(box_set: BoxSet, **options) -> list:
    epoch = options.pop("epoch", 0)
    loader = BoxLoader(box_set, **{"batch_size": 3, "augment": "light", "shuffle": True, **options})
    loader.set_epoch(epoch)
    return [(image, target) for images, targets in loader for image, target in zip(images, targets, strict=True)]


def test_batches_in_order(box_set: BoxSet) -> None:
    loader = BoxLoader(box_set, batch_size=3)
    found = list(loader)
    assert [len(images) for images, _ in found] == [3, 3, 1]
    assert len(loader) == 3
    (image, *_), (target, *_) = found[0]
    assert image.dtype == torch.float32
    assert (float(image.min()), float(image.max())) == (0.0, 1.0)
    assert torch.equal(image[0], target["masks"][0].float())
    assert target["boxes"].tolist() == [list(BOX)]
    assert [int(t["image_id"]) for _, targets in found for t in targets] == list(range(7))
    assert found[2][1][0]["masks"].shape == (0, 84, 90)


def test_an_image_is_augmented_alike_whatever_the_batch_or_the_workers(box_set: BoxSet) -> None:
    reference = {int(t["image_id"]): (image, t) for image, t in batches(box_set)}
    for options in ({"batch_size": 2}, {"workers": 1}, {"shuffle": False}):
        for image, target in batches(box_set, **options):
            expected = reference[int(target["image_id"])]
            assert torch.equal(image, expected[0])
            assert torch.equal(target["boxes"], expected[1]["boxes"])
    other = [(int(t["image_id"]), image) for image, t in batches(box_set, epoch=1)]
    assert any(not torch.equal(image, reference[k][0]) for k, image in other)
    assert [k for k, _ in other] != list(reference)
    shares = [batches(box_set, batch_size=4, world=2, rank=rank) for rank in (0, 1)]
    assert [len(share) for share in shares] == [4, 4]  # filled up from the front
    assert {int(t["image_id"]) for share in shares for _, t in share} == set(range(7))


def test_refusals(box_set: BoxSet) -> None:
    for options, text in (
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 3, "world": 2}, "batch_size"),
        ({"batch_size": 8, "drop_last": True}, "no full batch"),
        ({"batch_size": 1, "workers": -1}, "workers"),
        ({"batch_size": 1, "rank": 1}, "rank"),
    ):
        with pytest.raises(DataError, match=text):
            BoxLoader(box_set, **options)
    with pytest.raises(DataError, match="empty"):
        BoxLoader(box_set.subset([]), batch_size=1)
    Path(box_set.paths[2]).write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"2\.png"):
            list(BoxLoader(box_set, batch_size=3, workers=workers))


def test_images_to_predict(box_set: BoxSet) -> None:
    plain = BoxSet.unlabelled(box_set.paths, ["square"])
    assert plain.sizes == box_set.sizes
    for (images, _), (expected, _) in zip(
        BoxLoader(plain, batch_size=3), BoxLoader(box_set, batch_size=3), strict=True
    ):
        assert all(torch.equal(image, other) for image, other in zip(images, expected, strict=True))
    with pytest.raises(DataError, match="gone"):
        BoxSet.unlabelled(["gone.png"], ["square"])


def test_contradicting_sets_are_refused() -> None:
    with pytest.raises(DataError, match="differ in number"):
        BoxSet(["a"], [(1, 1)], [], classes=["x"])
    with pytest.raises(DataError, match="a label is not between 1 and 1"):
        BoxSet(["a"], [(9, 9)], [[Object((0, 0, 1, 1), 2, False, 1.0)]], classes=["x"])
