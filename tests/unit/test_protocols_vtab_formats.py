"""``refold vtab --prepare`` on tiny sets in published formats that torchvision does not read as VTAB does."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from originals import Expected, linked, prepared, say_their_labels
from refold.errors import DataError
from refold.protocols import prepare, vtab_formats


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> Expected:
    return Expected(monkeypatch)


def test_clevr_counts_objects_and_bins_the_nearest(tmp_path: Path, expected: Expected) -> None:
    base = tmp_path / "clevr" / "CLEVR_v1.0"
    (base / "scenes").mkdir(parents=True)
    # At a limit the lower class: VTAB asks for the last limit below the depth.
    bins = {7.2: 0, 8.0: 0, 8.25: 1, 8.5: 1, 8.75: 2, 9.1: 3, 9.5: 3, 9.75: 4, 10.0: 4, 10.2: 5}
    depths = list(bins)
    for split, count in (("train", 1000), ("val", 80)):
        scenes, labels = [], []
        for k in range(count):
            objects = [{"pixel_coords": [1, 2, depths[k % 10] + extra]} for extra in range(3 + k % 8)]
            scenes.append({"image_filename": f"CLEVR_{split}_{k:06}.png", "objects": objects[::-1]})
            labels.append(k % 40)
        (base / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
        linked(base / "images" / split, labels, [scene["image_filename"] for scene in scenes])
    for name in ("clevr_count", "clevr_dist"):
        expected(name, 80, train=1000, test=80)
    for part in prepared(tmp_path, "clevr_count"):
        assert all(int(Path(p).stem[-6:]) % 8 == t for p, t in zip(part.paths, part.targets.tolist(), strict=True))
    for part in prepared(tmp_path, "clevr_dist"):
        for path, target in zip(part.paths, part.targets.tolist(), strict=True):
            assert bins[depths[int(Path(path).stem[-6:]) % 10]] == target
    lines = [(tmp_path / name / "test.txt").read_text().splitlines() for name in ("clevr_count", "clevr_dist")]
    assert [line.split()[0] for line in lines[0]] == [line.split()[0] for line in lines[1]]


def test_dsprites_has_sixteen_bins(tmp_path: Path, expected: Expected) -> None:
    (tmp_path / "dsprites").mkdir()
    turn, x = np.meshgrid(np.arange(40), np.arange(32), indexing="ij")
    steps = np.zeros((1280, 6), np.int64)
    steps[:, 3], steps[:, 4] = turn.ravel(), x.ravel()
    images = np.zeros((1280, 8, 8), np.uint8)
    images[:, 0, 0] = 1
    np.savez(
        tmp_path / "dsprites" / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz", imgs=images, latents_classes=steps
    )
    for name in ("dsprites_loc", "dsprites_ori"):
        expected(name, 128, all=1280)
    # 40 orientations in 16 bins of 2.5: three, two, three, two ...
    widths = [3, 2] * 8
    orientation = [label for label, width in enumerate(widths) for _ in range(width)]
    for name, known in (("dsprites_loc", lambda k: k % 32 // 2), ("dsprites_ori", lambda k: orientation[k // 32])):
        for part in prepared(tmp_path, name):
            numbers = [int(Path(path).stem[-6:]) for path in part.paths]
            assert [known(k) for k in numbers] == part.targets.tolist()
    with Image.open(next((tmp_path / "dsprites" / "images").glob("*.png"))) as image:
        assert np.asarray(image).ravel().tolist() == [255] + 63 * [0]


def norb(path: Path, values: np.ndarray) -> bytes:
    """The format of the set's page: magic, dimensions, at least three sizes, values; all little-endian."""
    magic = b"\x55\x4c\x3d\x1e" if values.dtype == np.uint8 else b"\x54\x4c\x3d\x1e"
    sizes = [*values.shape, *[1] * (3 - values.ndim)]
    return magic + np.array([values.ndim, *sizes], "<i4").tobytes() + values.tobytes()


def test_small_norb_from_its_binary_matrices(tmp_path: Path, expected: Expected) -> None:
    folder = tmp_path / "smallnorb"
    folder.mkdir()
    for name, count in (("5x46789x9x18x6x2x96x96-training", 900), ("5x01235x9x18x6x2x96x96-testing", 600)):
        azimuth, elevation = np.arange(count) % 18, np.arange(count) // 18 % 9
        both = np.stack([azimuth + 20 * elevation, np.full(count, 255)], axis=1).astype(np.uint8)  # two cameras
        images = np.broadcast_to(both[:, :, None, None], (count, 2, 4, 4))
        info = np.stack([np.zeros(count), elevation, 2 * azimuth, np.zeros(count)], axis=1).astype("<i4")
        for kind, values in (("dat", images), ("info", info)):
            path = folder / f"smallnorb-{name}-{kind}.mat"
            if name.endswith("training"):
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(norb(path, values)))
            else:
                path.write_bytes(norb(path, values))
    for name in ("smallnorb_azi", "smallnorb_ele"):
        expected(name, 300, train=900, test=600)
    for name, known in (("smallnorb_azi", lambda level: level % 20), ("smallnorb_ele", lambda level: level // 20)):
        train, val, test = prepared(tmp_path, name)
        for part in (train, val, test):
            for path, target in zip(part.paths, part.targets.tolist(), strict=True):
                with Image.open(path) as image:
                    assert known(image.getpixel((1, 1))) == target
        # Half of the official test images validate.
        assert {Path(path).name.split("-")[0] for path in val.paths + test.paths} == {"test"}


def test_kitti_by_drive_and_nearest_vehicle(tmp_path: Path, expected: Expected) -> None:
    raw = tmp_path / "Kitti" / "raw"
    known = {"none": 3, "near": 0, "at 8": 0, "far": 1, "at 20": 1, "further": 2}
    lines = {
        "none": ["Pedestrian 0 0 0 1 2 3 4 1 1 1 0 0 2.5 0", "DontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -9 -9 -1000 -10"],
        "near": ["Car 0 0 0 1 2 3 4 1 1 1 0 0 30.0 0", "Truck 0 0 0 1 2 3 4 1 1 1 0 0 3.0 0"],
        "at 8": ["Van 0 0 0 1 2 3 4 1 1 1 0 0 8.0 0"],
        "far": ["Van 0 0 0 1 2 3 4 1 1 1 0 0 12.0 0", "Tram 0 0 0 1 2 3 4 1 1 1 0 0 1.0 0"],
        "at 20": ["Car 0 0 0 1 2 3 4 1 1 1 0 0 20.0 0"],
        "further": ["Car 0 0 0 1 2 3 4 1 1 1 0 0 20.5 0"],
    }  # fmt: skip
    names = [f"2011_09_26_drive_{k:04}_sync" for k in range(10)]
    legacy = np.random.RandomState(123)
    tested = names[legacy.permutation(10)[0]]  # what its choice without replacement takes
    rest = [name for name in names if name != tested]
    validated = rest[legacy.permutation(9)[0]]
    sizes = {name: {tested: 126, validated: 226}.get(name, 113) for name in names}
    drives = [name for name in names for _ in range(sizes[name])]
    kinds, count = list(lines), len(drives)
    linked(raw / "training", [known[kinds[k % 6]] for k in range(count)], [f"image_2/{k:06}.png" for k in range(count)])
    (raw / "training" / "label_2").mkdir()
    for k in range(count):
        (raw / "training" / "label_2" / f"{k:06}.txt").write_text("".join(f"{line}\n" for line in lines[kinds[k % 6]]))
    with pytest.raises(DataError, match=r"mapping: is not there.*devkit_object\.zip"):
        prepare(tmp_path, ["kitti"])
    # Frame k is line order[k] of the mapping, counted from one.
    order = np.random.default_rng(1).permutation(count)
    (raw / "mapping").mkdir()
    (raw / "mapping" / "train_mapping.txt").write_text("".join(f"2011_09_26 {one} 0000000001\n" for one in drives))
    (raw / "mapping" / "train_rand.txt").write_text(",".join(str(number + 1) for number in order) + "\n")
    expected("kitti", 126, train=904, val=226, test=126)
    train, val, test = prepared(tmp_path, "kitti")
    say_their_labels(train, val, test)
    for part, wanted in ((test, {tested}), (val, {validated}), (train, set(rest) - {validated})):
        assert {drives[order[int(Path(path).stem)]] for path in part.paths} == wanted


def test_retinas_are_scaled_and_levelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: Expected) -> None:
    # One at full size, against SciPy's Gaussian.
    from scipy import ndimage

    field = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 60, (600, 700)), 5) * 6 + 120
    y, x = np.mgrid[:600, :700]
    disc = (x - 349.5) ** 2 + (y - 299.5) ** 2 < 300**2  # 600 pixels in the middle row: it is not resized
    eye = np.where(disc, field.clip(30, 255), 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    Image.fromarray(eye).save(tmp_path / "eye.png")
    with Image.open(io.BytesIO(vtab_formats._eye(tmp_path / "eye.png"))) as found:
        assert found.size == (540, 540)
        pixels = np.asarray(found).astype(float)
    blurred = ndimage.gaussian_filter(eye.astype(float), (10, 10, 0), mode="mirror", truncate=3)
    truth = (4 * (eye - blurred) + 128).clip(0, 255)[30:570, 80:620]
    inside = (x - 350)[30:570, 80:620] ** 2 + (y - 300)[30:570, 80:620] ** 2
    assert np.abs(pixels - truth)[inside < 265**2].mean() < 4  # JPEG
    assert np.abs(truth - 128)[inside < 265**2].mean() > 30
    assert np.abs(pixels - 128)[inside > 280**2].max() < 4

    for name, value in (("_EYE_RADIUS", 3), ("_EYE_KEPT", 3), ("_EYE_SIGMA", 0.4)):
        monkeypatch.setattr(vtab_formats, name, value)
    base = tmp_path / "diabetic-retinopathy-detection"
    levels_of = {f"{k}_left": k % 5 for k in range(1130)}
    linked(base, list(levels_of.values()), [f"{'train' if k < 800 else 'test'}/{k}_left.jpeg" for k in range(1130)])
    rows = list(levels_of.items())
    (base / "trainLabels.csv").write_text("image,level\n" + "".join(f"{n},{level}\n" for n, level in rows[:800]))
    usage = "".join(f"{n},{level},{'Private' if k % 3 == 0 else 'Public'}\n" for k, (n, level) in enumerate(rows[800:]))
    (base / "retinopathy_solution.csv").write_text("image,level,Usage\n" + usage)
    expected("diabetic_retinopathy", 110, train=800, val=220, test=110)
    train, val, test = prepared(tmp_path, "diabetic_retinopathy")
    tested = [name for k, (name, _) in enumerate(rows[800:]) if k % 3 == 0]
    assert test.targets.tolist() == [levels_of[name] for name in tested]
    assert {Path(path).suffix for part in (train, val, test) for path in part.paths} == {".jpg"}


def example_type() -> type:
    """``tf.train.Example``, made with protobuf's own library; a map is a repeated message of key and value."""
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {"string": field.TYPE_STRING, "bytes": field.TYPE_BYTES, "int64": field.TYPE_INT64}
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    for name, fields in {
        "BytesList": [("value", 1, "bytes", True)],
        "Int64List": [("value", 1, "int64", True)],
        "Feature": [("bytes_list", 1, "BytesList", False), ("int64_list", 3, "Int64List", False)],
        "Entry": [("key", 1, "string", False), ("value", 2, "Feature", False)],
        "Features": [("feature", 1, "Entry", True)],
        "Example": [("features", 1, "Features", False)],
    }.items():
        message = file.message_type.add(name=name)
        for called, number, kind, repeated in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in kinds:
                message.field.add(name=called, number=number, type=kinds[kind], label=label)
            else:
                message.field.add(
                    name=called, number=number, type=field.TYPE_MESSAGE, type_name=f".t.{kind}", label=label
                )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def test_dmlab_from_its_records(tmp_path: Path, expected: Expected) -> None:
    folder, kind = tmp_path / "dmlab", example_type()
    folder.mkdir()
    sizes = {"train": 800, "validation": 200, "test": 30}
    for split, count in sizes.items():
        for shard in range(2):
            content = b""
            for k in range(shard, count, 2):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (40 * (k % 6), 0, 0)).save(picture, "JPEG")
                example = kind()
                for name in ("image", "filename", "label"):
                    entry = example.features.feature.add(key=name)
                    if name == "label":
                        entry.value.int64_list.value.append(k % 6)
                    else:
                        entry.value.bytes_list.value.append(picture.getvalue() if name == "image" else b"x.jpg")
                data = example.SerializeToString()
                content += len(data).to_bytes(8, "little") + b"crc_" + data + b"crc_"
            (folder / f"dmlab-{split}.tfrecord-{shard:05}-of-00002").write_bytes(content)
    expected("dmlab", 30, train=800, val=200, test=30)
    for part in prepared(tmp_path, "dmlab"):
        for path, target in zip(part.paths, part.targets.tolist(), strict=True):
            with Image.open(path) as image:
                assert abs(image.getpixel((3, 3))[0] - 40 * target) < 4  # type: ignore[index]
    cut = folder / "dmlab-test.tfrecord-00001-of-00002"
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(DataError, match="ends in the middle of a record"):
        prepare(tmp_path / "other", ["dmlab"], originals=tmp_path)
