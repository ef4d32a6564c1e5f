"""Features of a frozen backbone, computed once and kept: later epochs train what is around it alone.

A record holds what :class:`refold.dense.replay.Replay` keeps of one view of one image, one tensor after the other, in
bfloat16 or float32; see :mod:`refold.dense.records`. Records are made when they are first asked for. In a folder they
are taken up again by another run with the same backbone, to the last bit, the same images and views: also one with
another rank of E3VA, another decoder or learning rate. What differs is refused.

An image is known by its content, so that a copied or touched file stays the same and an edited one does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.data.images import content_of
from refold.dense.fed import Fed
from refold.dense.records import Estimate, Records
from refold.dense.replay import Replay, precision_of
from refold.errors import DataError
from refold.fingerprint import body_tensors, compare, fingerprint
from refold.hosting import adapter_parameters, hosted

__all__ = ["CachedEncoder", "Estimate", "Key", "digest", "estimate", "identify"]

Key = tuple[int, int]  # image and view, from 0
#: Numbers of each tensor of a forward that are compared, and how far they may be from each other on another machine.
_SAMPLES, _TOLERANCE = 64, 0.05


def estimate(
    encoder: Fed, sizes: Iterable[tuple[int, int]], *, views: int | Sequence[int] = 1, dtype: str = "bfloat16"
) -> Estimate:
    """What a cache of images of these ``sizes`` (height, width) would take; nothing is written.

    Args:
        encoder, sizes, views, dtype: as for :class:`CachedEncoder`.

    Raises:
        SiteError: the encoder's features cannot be cached, see :class:`refold.dense.replay.Replay`.
        DataError: ``views`` or ``dtype`` out of range, or no image.
    """
    known = list(sizes)
    return Records.needed(_lengths(Replay(encoder), known, _views(views, len(known))), dtype)


def identify(paths: Iterable[str | Path]) -> list[str]:
    """What tells image files apart: a hash of the content of each.

    Raises:
        DataError: a file cannot be read.
    """
    names = [str(path) for path in paths]
    return [digest(content_of(names, k)) for k in range(len(names))]


def digest(content: bytes) -> str:
    """What tells images of this content from others."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class CachedEncoder:
    """An encoder whose backbone sees every view of every image once.

    Used around each forward of the model that the encoder is in, a segmenter, a detector or
    :class:`refold.dense.halves.Halves` of a classifier, in training mode or not::

        with cached.serving([(image, view), ...]):
            outputs = model(images)

    Views are counted from 0; that view v of an image looks the same each time is the caller's part. What draws in the
    backbone in training mode (DropPath, dropout) is off, as in evaluation.

    Args:
        encoder: its body is frozen but for what is behind the maps, and carries E3VA, LST or nothing. On the device of
            the training, and under its autocast.
        images: what tells each image apart, see :func:`identify`.
        sizes: (height, width) of each as the encoder sees it: resized, augmented and padded. All views have it.
        views: how many an image has; a number for all, or one for each.
        pixels: whatever else the views are a function of (preprocessing, augmentation, seed), as plain data.
        folder: where records are kept; taken up again if it is there. None keeps them in memory.
        dtype: ``"bfloat16"`` or ``"float32"``, of the records.

    Attributes:
        encoder, folder: as above.
        estimate: what the records take.

    Raises:
        SiteError: the encoder's features cannot be cached, see :class:`refold.dense.replay.Replay`.
        DataError: an argument out of range, or not enough memory.
        StoreError: the folder's records are of something else, which is named, or the disk has not enough space.
    """

    def __init__(
        self,
        encoder: Fed,
        images: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        *,
        views: int | Sequence[int] = 1,
        pixels: Mapping[str, Any] | None = None,
        folder: str | Path | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        if len(images) != len(sizes):
            raise DataError(f"{len(images)} images have {len(sizes)} sizes", where="sizes")
        self.encoder, self._views = encoder, _views(views, len(images))
        self._first = [0, *accumulate(self._views)]  # record of each image
        self._sizes = [(int(height), int(width)) for height, width in sizes]
        self._replay, self._precision = Replay(encoder), precision_of(encoder.body)
        lengths = _lengths(self._replay, self._sizes, self._views)
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            self._records = Records(lengths, dtype)
        else:
            header = {
                "backbone": _backbone(encoder),
                "forward": _samples(self._replay, self._sizes[0]),
                "precision": self._precision,
                "reads": self._replay.reads,
                "pixels": dict(pixels or {}),
                "dtype": dtype,
                "views": self._views,
                "sizes": self._sizes,
                "images": list(images),
            }
            self._records = Records(lengths, dtype, self.folder, header, partial(_difference, _tensors(encoder)))
        self.estimate = self._records.estimate
        self._frozen = list(_tensors(encoder).values())
        self._marks: list[tuple[int, int]] | None = None  # of those, at the first forward

    @contextmanager
    def serving(self, keys: Sequence[Key], *, blank: bool = False) -> Iterator[None]:
        """Inside, the encoder gives the maps of ``keys`` from their records, and makes those that are missing.

        Args:
            keys: (image, view) of each image of the batch, in order.
            blank: the images that will be given have the right size alone, so that no record may be missing: for
                epochs that need not read them.

        Raises:
            DataError: a key that is not there; in the forward, images of another number or size.
        """
        slots = [self._slot(key) for key in keys]
        if blank and (lost := self.missing(keys)):
            raise DataError("has no record", where=_name(lost[0]), remedy="Give its pixels")

        def maps(images: Tensor) -> list[Tensor]:
            size = self._check(images, keys)
            todo = [k for k, slot in enumerate(slots) if not self._records.has(slot)]
            if todo:
                self._write([slots[k] for k in todo], self._replay.record(images[todo]))
            return self._replay.maps(self._read(slots, size), size)

        with self.encoder.fed(maps):
            yield

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Those of ``keys`` of which there is no record yet.

        Raises:
            DataError: a key that is not there.
        """
        return [key for key in keys if not self._records.has(self._slot(key))]

    def _slot(self, key: Key) -> int:
        image, view = key
        if not (0 <= image < len(self._sizes) and 0 <= view < self._views[image]):
            views = " or ".join(str(number) for number in sorted(set(self._views)))
            raise DataError(f"is not among {len(self._sizes)} images of {views} views", where=_name(key))
        return self._first[image] + view

    def _check(self, images: Tensor, keys: Sequence[Key]) -> tuple[int, int]:
        """The size of a batch."""
        size = (images.shape[-2], images.shape[-1])
        if len(images) != len(keys):
            raise DataError(f"{len(images)} images have {len(keys)} keys", where="keys")
        for key in keys:
            if self._sizes[key[0]] != size:
                raise DataError(
                    f"was to be seen at {self._sizes[key[0]]} pixels, and is at {size} here",
                    where=_name(key),
                    remedy="Give every image the size that was announced: what a batch pads it to changes its features",
                )
        marks = [(p.data_ptr(), p._version) for p in self._frozen]
        if self._marks is None:
            self._marks = marks
        if marks != self._marks:
            raise DataError(
                "the backbone was changed, or moved, since its features were computed",
                where="features",
                remedy="Make the cache anew",
            )
        if precision_of(self.encoder.body) != self._precision:
            raise DataError(
                f"were computed in {self._precision}, not in {precision_of(self.encoder.body)}",
                where="features",
                remedy="Use one precision, or make the cache anew",
            )
        return size

    def _write(self, slots: Sequence[int], taps: Sequence[Tensor]) -> None:
        for slot, record in zip(slots, torch.cat([tap.flatten(1) for tap in taps], 1).cpu(), strict=True):
            self._records.write(slot, record)

    def _read(self, slots: Sequence[int], size: tuple[int, int]) -> list[Tensor]:
        """The taps of a batch, in the dtypes that the backbone gave them."""
        device = next(self.encoder.body.parameters()).device
        taps, at = [], 0
        for tap in self._replay.taps(size):
            values = self._records.read(slots, at, tap.elements)
            taps.append(values.view(len(slots), *tap.shape).to(device).to(tap.dtype))
            at += tap.elements
        return taps


def _views(views: int | Sequence[int], images: int) -> list[int]:
    """How many views each image has."""
    found = [views] * images if isinstance(views, int) else list(views)
    if len(found) != images:
        raise DataError(f"{images} images have {len(found)} numbers of views", where="views")
    if any(number < 1 for number in found):
        raise DataError(f"must be 1 or more, not {min(found)}", where="views")
    return found


def _lengths(replay: Replay, sizes: Sequence[tuple[int, int]], views: Sequence[int]) -> list[int]:
    """Numbers in the record of each view of each image, all views of an image in a row."""
    found = {size: sum(tap.elements for tap in replay.taps(size)) for size in dict.fromkeys(sizes)}
    return [found[size] for size, number in zip(sizes, views, strict=True) for _ in range(number)]


def _name(key: Key) -> str:
    return f"image {key[0]}, view {key[1]}"


def _backbone(encoder: Fed) -> dict[str, Any]:
    """A fingerprint, which can name what differs, and a hash of every bit but of the adapters and behind the maps."""
    body = encoder.body
    apart: list[nn.Module] = [*hosted(body).values(), *map(body.get_submodule, encoder.behind)]
    ours = {id(t) for module in apart for t in (*module.parameters(), *module.buffers())}
    bits = hashlib.blake2b(digest_size=16)
    for name, tensor in body.state_dict(keep_vars=True).items():
        if id(tensor) not in ours:
            bits.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            bits.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {**fingerprint(_tensors(encoder)), "bits": bits.hexdigest()}


def _tensors(encoder: Fed) -> dict[str, Tensor]:
    """The backbone's own parameters."""
    return body_tensors(encoder.body, encoder.behind, {}, adapter_parameters(encoder.body))


def _samples(replay: Replay, size: tuple[int, int]) -> list[list[float]]:
    """A few numbers of what is kept of an image of noise: what weights do not show, such as the number of heads."""
    found = []
    for tap in replay.record(replay.noise(size)):
        flat = tap.flatten()
        found.append(flat[:: max(flat.numel() // _SAMPLES, 1)].double().tolist())
    return found


def _difference(tensors: dict[str, Tensor], found: dict[str, Any], header: dict[str, Any]) -> str | None:
    if found["precision"] != header["precision"]:  # in bfloat16 the backbone's weights are held in it, too
        return f"precision {found['precision']}, not {header['precision']}"
    if found["backbone"] != header["backbone"]:
        named = compare(found["backbone"], tensors)
        return f"the backbone, {named or 'whose weights differ a little'}"
    for name in ("reads", "dtype"):
        if found[name] != header[name]:
            return f"{name} {found[name]}, not {header[name]}"
    for name in sorted({*found["pixels"], *header["pixels"]}):
        then, now = (side["pixels"].get(name) for side in (found, header))
        if then != now:
            return f"{name} {then}, not {now}"
    for name in ("images", "sizes"):
        if len(found[name]) != len(header[name]):
            return f"{len(found[name])} images, not {len(header[name])}"
        for k, (then, now) in enumerate(zip(found[name], header[name], strict=True)):
            if then != now:
                return f"image {k} has another content" if name == "images" else f"image {k} at {then}, not {now}"
    for k, (then, now) in enumerate(zip(found["views"], header["views"], strict=True)):
        if then != now:
            return f"{then} views of image {k}, not {now}"
    for then, now in zip(found["forward"], header["forward"], strict=True):
        a, b = (torch.tensor(side, dtype=torch.float64) for side in (then, now))
        if not (a - b).norm() <= _TOLERANCE * a.norm():
            return "a backbone of the same weights that computes something else"
    return None
