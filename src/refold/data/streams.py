"""Images that are read in order: streams of Hugging Face data sets, from the hub or from disk.

Training reads the shards of a data set in an order drawn for each epoch, ten at a time in turn, and shuffles each block
of 1000 encoded images that comes of it. Which images make a batch and how they look is a function of (seed, epoch,
process, place); to go on in the middle of an epoch, the stream is set to where the block began
(``IterableDataset.load_state_dict``). With several processes each reads its own shards where their number divides them,
else every so manieth image. Evaluation reads in order, and every image once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from refold.data.augmentation import Augmentation, make_augmentation
from refold.data.decoding import Rendering, decode
from refold.data.images import ImageSet, Task, Virtual, render_all
from refold.data.listing import Label, Listing, encode, number
from refold.data.loader import Loader, Order, Plans
from refold.data.normalize import Normalize
from refold.data.parallel import one_torch_thread
from refold.data.randomness import generator
from refold.errors import DataError
from refold.preprocessing import Preprocessing

if TYPE_CHECKING:
    import datasets
    from PIL import Image

__all__ = ["BLOCK", "Reading", "StreamLoader", "StreamSet", "Unlabelled", "guarded", "open_loader"]

BLOCK = 1000  # images; the default of datasets' own shuffle buffer
CHANGED = "the data set has changed since its labels were read"
_FILES = "Download the data set as files or shards"


class Unlabelled(DataError):
    """The labels of a split are not published."""


def guarded(rows: Iterable[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """The rows of a stream.

    Raises:
        DataError: in place of whatever files, networks and formats raise.
    """
    try:
        yield from rows
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"cannot be read ({reason})", where=name) from error


@dataclass(frozen=True)
class Reading:
    """What a value in a column of labels means.

    Attributes:
        task: of the labels.
        names: of classes that are stored as indices; None where the values speak for themselves.
    """

    task: Task
    names: tuple[str, ...] | None = None

    def __call__(self, value: Any, place: str) -> Label:
        """
        Raises:
            Unlabelled: there is none.
        """
        if self.task == "multilabel":
            if not isinstance(value, list):
                raise Unlabelled(f"an image has the labels {value!r}", where=place)
            return tuple(dict.fromkeys(self._name(item, place) for item in value))
        return number(str(value), place) if self.task == "regress" else self._name(value, place)

    def _name(self, value: Any, place: str) -> str:
        if value is None or value == "" or (isinstance(value, int) and not 0 <= value < _most(self.names)):
            raise Unlabelled(f"an image has the label {value!r}", where=place, remedy="Choose a split with labels")
        if isinstance(value, int):
            return str(int(value)) if self.names is None else self.names[value]
        return str(value)


def _most(names: tuple[str, ...] | None) -> float:
    return math.inf if names is None else len(names)


class StreamSet(ImageSet):
    """N images that come one after the other, and their targets: an image set that is read in order.

    Args:
        rows: the stream; images are not decoded.
        name: what it is called in messages and predictions.
        image, label: names of the columns.
        reading: what makes a label of a value in the column.
        labels: those that occur.
        codes: (N,) int64, which of them each image has.
        classes: names of the K classes; None for a regression.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        name: str,
        image: str,
        label: str,
        reading: Reading,
        labels: Listing,
        codes: Tensor,
        classes: list[str] | None,
    ) -> None:
        table = encode(labels, classes)
        super().__init__(
            _Numbered(name, len(codes)), table[codes], task=labels.task, classes=classes, cache="stream"
        )  # fmt: skip
        self.rows, self.name, self._image, self._label, self._reading = rows, name, image, label, reading
        self._targets = dict(zip(labels.labels, table, strict=True))

    def content(self, row: dict[str, Any]) -> Any:
        """The image of a row as :meth:`open` takes it."""
        return row[self._image]

    def target(self, row: dict[str, Any]) -> Tensor:
        """The target of a row.

        Raises:
            DataError: a label that was not there when labels were read.
        """
        label = self._reading(row[self._label], self.name)
        if label not in self._targets:
            raise DataError(f"the label {label!r} is new: {CHANGED}", where=self.name)
        return self._targets[label]

    def open(self, content: Any, channels: int) -> Image.Image:
        """Decode an image.

        Raises:
            DataError: it cannot be read or decoded.
        """
        path = f"{self.name}, {content['path'] or 'an image'}"
        data = content["bytes"]
        if data is None:
            from datasets.utils.file_utils import xopen

            try:
                with xopen(content["path"], "rb") as file:
                    data = file.read()
            except OSError as error:
                raise DataError(f"cannot be read ({error})", where=path) from error
        return decode(path, channels, data)

    def render(self, indices: Iterable[int] | Tensor, rendering: Rendering) -> Tensor:
        """As :meth:`ImageSet.render`; reads the stream up to the last of them."""
        wanted = self._checked(indices).tolist()
        chosen = set(wanted)
        rows = islice(guarded(self.rows, self.name), max(chosen, default=-1) + 1)
        found = {i: self.content(row) for i, row in enumerate(rows) if i in chosen}
        if len(found) < len(chosen):
            raise DataError(f"ends early: {CHANGED}", where=self.name)
        return render_all(
            lambda k: self.open(found[wanted[k]], rendering.channels), len(wanted), rendering, threads=True
        )

    def subset(self, indices: Iterable[int] | Tensor) -> ImageSet:
        """
        Raises:
            DataError: always.
        """
        raise DataError("a stream cannot be divided", where=self.name, remedy=_FILES)

    def hold(self, rendering: Rendering) -> bool:
        """
        Raises:
            DataError: always: :class:`StreamLoader` reads it.
        """
        raise DataError("a stream is read in order, and not image by image", where=self.name, remedy=_FILES)


class _Numbered(Virtual):
    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:  # type: ignore[override] (slices are never taken)
        if not 0 <= index < self._count:
            raise IndexError(index)
        return f"{self._name}/{index}"


class StreamLoader:
    """Iterate over ``(images, targets)`` of a stream, as :class:`refold.data.Loader` does over an image set.

    Shuffled, every process has as many images; one whose shards hold fewer begins again.

    Args:
        stream: what to read.
        preprocessing, augment: as for :class:`refold.data.Loader`.
        workers: with 1 or more, a process reads and decodes ahead; what comes is the same.
        block: images that are shuffled together.
        order: the fields of :class:`refold.data.loader.Order`, without ``views``.

    Raises:
        DataError: an argument out of range.
    """

    def __init__(
        self,
        stream: StreamSet,
        preprocessing: Preprocessing,
        *,
        augment: str | None = None,
        workers: int = 0,
        block: int = BLOCK,
        **order: Unpack[Order],
    ) -> None:
        self._normalize = Normalize(preprocessing)
        self._augmentation = make_augmentation(augment, preprocessing, min(3, preprocessing.channels))
        self._plans = Plans(count=len(stream), columns=self._augmentation.columns, **order)
        if self._plans.views is not None:
            raise DataError("a stream's images are not told apart", where="views", remedy="Leave it out")
        self._workers = min(workers, 1)
        self._reader = _Reader(stream, self._augmentation, self._plans, block)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Batches of this process in one epoch."""
        return len(self._plans)

    def set_epoch(self, epoch: int, start: int = 0, state: dict[str, Any] | None = None) -> None:
        """Choose the epoch, from 0, of the next iteration.

        Args:
            epoch: which.
            start: batches to leave out.
            state: what :meth:`state` said after them; without it they are read again.

        Raises:
            DataError: a negative epoch.
        """
        generator(self._plans.seed, epoch, "order")  # complains about bad numbers now
        self._plans.epoch, self._plans.start = epoch, start
        self._reader.state = self._state = state or {}

    def state(self) -> dict[str, Any]:
        """Where in the stream the last batch ended: plain data."""
        return self._state

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(
            DataLoader(self._reader, batch_size=None, num_workers=self._workers, generator=torch.Generator())
        )
        while True:
            with one_torch_thread():
                batch = next(batches, None)
                if batch is None:
                    return
                if isinstance(batch, DataError):
                    raise batch
                images, targets, randomness, self._state = batch
                images = self._augmentation.finish(self._normalize(images), randomness)
            yield images, targets


def open_loader(
    image_set: ImageSet,
    preprocessing: Preprocessing,
    *,
    augment: str | None = None,
    workers: int = 0,
    **order: Unpack[Order],
) -> Loader | StreamLoader:
    """The loader of an image set or a stream."""
    kind = StreamLoader if isinstance(image_set, StreamSet) else Loader
    return kind(image_set, preprocessing, augment=augment, workers=workers, **order)  # type: ignore[arg-type]


class _Sample(NamedTuple):
    content: Any
    target: Tensor
    randomness: Tensor
    state: Callable[[], dict[str, Any]]
    """Where the stream is after it."""


class _Reader(IterableDataset):
    """Reads and augments batches in order; in a worker process, or in this one."""

    def __init__(self, stream: StreamSet, augmentation: Augmentation, plans: Plans, block: int) -> None:
        self.stream, self.augmentation, self.plans, self.block = stream, augmentation, plans, block
        self.state: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Any]:
        plans = self.plans
        size, count = plans.batch_size // plans.world, len(range(plans.rank, plans.total, plans.world))
        try:
            samples = self._shuffled(plans.start * size, count) if plans.shuffle else self._in_order(plans.start * size)
            for first in range(plans.start * size, count, size):
                batch = list(islice(samples, min(size, count - first)))
                if len(batch) < min(size, count - first):
                    raise DataError(f"ends early: {CHANGED}", where=self.stream.name)
                yield self._batch(batch)
        except DataError as error:  # raised by a worker, it would arrive wrapped in a traceback
            yield error

    def _batch(self, samples: list[_Sample]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        rendering = self.augmentation.rendering
        images = render_all(
            lambda k: self.stream.open(samples[k].content, rendering.channels), len(samples), rendering, threads=True
        )
        targets = torch.stack([sample.target for sample in samples])
        randomness = torch.stack([sample.randomness for sample in samples])
        return self.augmentation(images, randomness), targets, randomness, samples[-1].state()

    def _in_order(self, start: int) -> Iterator[_Sample]:
        nothing = torch.zeros(self.augmentation.columns, dtype=torch.float64)
        first = start * self.plans.world + self.plans.rank
        for row in islice(guarded(self.stream.rows, self.stream.name), first, None, self.plans.world):
            yield _Sample(self.stream.content(row), self.stream.target(row), nothing, dict)

    def _shuffled(self, start: int, count: int) -> Iterator[_Sample]:
        """This process's samples from number ``start`` of ``count`` on, block after block."""
        plans, block = self.plans, self.block
        rows, begun = _Endless(self._open, self.stream.name), 0
        if self.state:
            begun = start // block * block
            rows.load(self.state)
        for first in range(begun, count, block):
            at = rows.state()
            samples = list(islice(rows, min(block, count - first)))
            source = generator(plans.seed, plans.epoch, f"block {first} of process {plans.rank}")
            order = torch.randperm(len(samples), generator=source).tolist()
            draws = torch.rand(len(samples), self.augmentation.columns, dtype=torch.float64, generator=source)
            for k, i in enumerate(order):
                if first + k >= start:
                    # What follows the last one of a block is the next block, which begins where the stream is then.
                    state = rows.state if k + 1 == len(order) else partial(dict, at)
                    yield _Sample(self.stream.content(samples[i]), self.stream.target(samples[i]), draws[k], state)

    def _open(self) -> datasets.IterableDataset:
        """The epoch's rows of this process: shards in their order, some of them in turn."""
        from datasets.distributed import split_dataset_by_node

        seed = generator(self.plans.seed, self.plans.epoch, "shards").initial_seed()
        # Its own buffer forgets what it holds when a run is resumed: it is given room for one row.
        rows = self.stream.rows.shuffle(seed=seed % 2**63, buffer_size=1)
        return split_dataset_by_node(rows, self.plans.rank, self.plans.world) if self.plans.world > 1 else rows


class _Endless:
    """Rows, and from the beginning again."""

    def __init__(self, open_: Callable[[], datasets.IterableDataset], name: str) -> None:
        self._open, self._name = open_, name
        self._begin()

    def _begin(self) -> None:
        self._rows = self._open()
        self._iterator = guarded(self._rows, self._name)

    def load(self, state: dict[str, Any]) -> None:
        self._rows.load_state_dict(state)

    def state(self) -> dict[str, Any]:
        return self._rows.state_dict()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        row = next(self._iterator, None)
        if row is None:
            self._begin()
            row = next(self._iterator, None)
        if row is None:
            raise DataError("no image is left for this process", remedy="Start fewer processes")
        return row
