"""The original sets of VTAB-1k as they are downloaded: where they lie, what they must hold, and how they are read.

Torchvision's classes read those sets that they know, from where they put them; they never download. VTAB's splits are
kept where they are the sets' own (or, for KITTI, follow from published files). Where VTAB splits by the order of its
own copies, which nobody else has, test images are drawn by seed, as many as VTAB has: Caltech101 (after 30 images of
each class to train), SUN397, EuroSAT, Resisc45, dSprites and small NORB.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refold.data.randomness import generator
from refold.protocols.vtab_formats import (
    Part,
    class_folders,
    clevr,
    dmlab,
    dsprites,
    kitti,
    listed,
    retinopathy,
    smallnorb,
)

__all__ = ["ORIGINALS", "Original"]

# Its pixels depend on the decoder: TFDS leaves it out of SUN397, and so has VTAB 108,753 images.
_SUN_LEFT_OUT = "sun_bhenjvsvrtumjuri.jpg"
_CALTECH_TRAINED = 30  # of each class


@dataclass(frozen=True)
class Original:
    """A set as it is downloaded.

    Attributes:
        name: of the folder for the images that have to be written.
        tasks: made of it, in the order of the labels.
        place: what must be there, below the folder of the downloads; ``*`` allowed.
        counts: images of its own splits, ``"train"``, ``"val"`` and ``"test"``, or ``"all"``.
        read: from that folder and a seed.
        note: what else differs from VTAB's copy.
    """

    name: str
    tasks: tuple[str, ...]
    place: str
    counts: dict[str, int]
    read: Callable[[Path, int], dict[str, Part]]
    note: str = ""


def _shown(data: Any) -> Part:
    """A torchvision set that holds pixels."""
    return Part(len(data), lambda k: (int(data[k][1]),), lambda k: data[k][0], ".png")


def _files(data: Any) -> Part:
    """A torchvision set made with ``loader=Path``, so that its images are files."""
    return listed([(path, (label,)) for path, label in sorted(data[k] for k in range(len(data)))])


def _cifar(root: Path, seed: int) -> dict[str, Part]:
    from torchvision.datasets import CIFAR100

    return {split: _shown(CIFAR100(root, train=split == "train")) for split in ("train", "test")}


def _caltech(root: Path, seed: int) -> dict[str, Part]:
    """With the background as a class, which torchvision leaves out; 30 images of each class train, the others test."""
    train, test = [], []
    for label, (name, paths) in enumerate(class_folders(root / "caltech101" / "101_ObjectCategories").items()):
        order = torch.randperm(len(paths), generator=generator(seed, 0, f"vtab caltech101 {name}")).tolist()
        train += [(paths[k], (label,)) for k in order[:_CALTECH_TRAINED]]
        test += [(paths[k], (label,)) for k in sorted(order[_CALTECH_TRAINED:])]
    return {"train": listed(train), "test": listed(test)}


def _dtd(root: Path, seed: int) -> dict[str, Part]:
    from torchvision.datasets import DTD

    return {split: _files(DTD(root, split, loader=Path)) for split in ("train", "val", "test")}


def _flowers(root: Path, seed: int) -> dict[str, Part]:
    from torchvision.datasets import Flowers102

    return {split: _files(Flowers102(root, split, loader=Path)) for split in ("train", "val", "test")}


def _pets(root: Path, seed: int) -> dict[str, Part]:
    """From the lists of the set itself: torchvision's class says of no image which file it is."""
    base = root / "oxford-iiit-pet"

    def part(name: str) -> Part:
        lines = (base / "annotations" / name).read_text(encoding="utf-8").splitlines()
        fields = [line.split() for line in lines if line.strip()]
        return listed([(base / "images" / f"{image}.jpg", (int(label) - 1,)) for image, label, *_ in fields])

    return {"train": part("trainval.txt"), "test": part("test.txt")}


def _svhn(root: Path, seed: int) -> dict[str, Part]:
    from torchvision.datasets import SVHN

    return {split: _shown(SVHN(root, split)) for split in ("train", "test")}


def _sun(root: Path, seed: int) -> dict[str, Part]:
    from torchvision.datasets import SUN397

    data = SUN397(root, loader=Path)
    rows = sorted(data[k] for k in range(len(data)))
    return {"all": listed([(path, (label,)) for path, label in rows if path.name != _SUN_LEFT_OUT])}


def _camelyon(root: Path, seed: int) -> dict[str, Part]:
    importlib.import_module("h5py")  # torchvision would say so with a RuntimeError
    from torchvision.datasets import PCAM

    return {split: _shown(PCAM(root, split)) for split in ("train", "val", "test")}


def _eurosat(root: Path, seed: int) -> dict[str, Part]:
    from torchvision.datasets import EuroSAT

    return {"all": _files(EuroSAT(root, loader=Path))}


def _resisc(root: Path, seed: int) -> dict[str, Part]:
    classes = class_folders(root / "NWPU-RESISC45").values()
    return {"all": listed([(path, (label,)) for label, paths in enumerate(classes) for path in paths])}


_SETS = (
    Original("cifar", ("cifar",), "cifar-100-python", {"train": 50_000, "test": 10_000}, _cifar),
    Original(
        "caltech101",
        ("caltech101",),
        "caltech101/101_ObjectCategories",
        {"train": 3060, "test": 6084},
        _caltech,
        "30 images of each class, drawn with that seed, to train on and the others to test",
    ),
    Original("dtd", ("dtd",), "dtd/dtd", {"train": 1880, "val": 1880, "test": 1880}, _dtd),
    Original(
        "oxford_flowers102",
        ("oxford_flowers102",),
        "flowers-102/jpg",
        {"train": 1020, "val": 1020, "test": 6149},
        _flowers,
    ),
    Original("oxford_iiit_pet", ("oxford_iiit_pet",), "oxford-iiit-pet", {"train": 3680, "test": 3669}, _pets),
    Original("svhn", ("svhn",), "train_32x32.mat", {"train": 73_257, "test": 26_032}, _svhn),
    Original(
        "sun397",
        ("sun397",),
        "SUN397",
        {"all": 108_753},
        _sun,
        "images of full size, which VTAB has with at most 120,000 pixels",
    ),
    Original(
        "patch_camelyon", ("patch_camelyon",), "pcam", {"train": 262_144, "val": 32_768, "test": 32_768}, _camelyon
    ),
    Original("eurosat", ("eurosat",), "eurosat/2750", {"all": 27_000}, _eurosat),
    Original("resisc45", ("resisc45",), "NWPU-RESISC45", {"all": 31_500}, _resisc),
    Original(
        "diabetic_retinopathy",
        ("diabetic_retinopathy",),
        "diabetic-retinopathy-detection/trainLabels.csv",
        {"train": 35_126, "val": 10_906, "test": 42_670},
        retinopathy,
    ),
    Original("clevr", ("clevr_count", "clevr_dist"), "clevr/CLEVR_v1.0", {"train": 70_000, "test": 15_000}, clevr),
    Original(
        "dmlab", ("dmlab",), "dmlab/dmlab-train.tfrecord*", {"train": 65_550, "val": 22_628, "test": 22_735}, dmlab
    ),
    Original("kitti", ("kitti",), "Kitti/raw", {"train": 6347, "val": 423, "test": 711}, kitti),
    Original(
        "dsprites",
        ("dsprites_loc", "dsprites_ori"),
        "dsprites/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        {"all": 737_280},
        dsprites,
    ),
    Original(
        "smallnorb",
        ("smallnorb_azi", "smallnorb_ele"),
        "smallnorb/smallnorb-*-training-dat.mat*",
        {"train": 24_300, "test": 24_300},
        smallnorb,
    ),
)
#: By task.
ORIGINALS = {task: original for original in _SETS for task in original.tasks}
