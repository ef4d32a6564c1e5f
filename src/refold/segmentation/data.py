"""Images with a mask each, and what is checked of them before a model is trained."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refold.data.decoding import decode
from refold.data.parallel import for_each
from refold.errors import DataError
from refold.segmentation.labels import IGNORE, Labels, read_mask

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MaskSet"]


class MaskSet:
    """N images and their masks, of any sizes, decoded at every reading.

    Args:
        images, masks: N files each; mask k belongs to image k.
        labels: the classes, and what the masks' values mean.

    Attributes:
        images, masks, labels: as above.

    Raises:
        DataError: not as many masks as images, or no image.
    """

    def __init__(self, images: Iterable[str], masks: Iterable[str], labels: Labels) -> None:
        self.images, self.masks, self.labels = list(images), list(masks), labels
        if len(self.images) != len(self.masks):
            raise DataError(f"{len(self.images)} images have {len(self.masks)} masks", where="masks")
        if not self.images:
            raise DataError("there is no image", where="images")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} images, {len(self.classes)} classes)"

    @property
    def classes(self) -> list[str]:
        """Names in the order of the class indices."""
        return self.labels.classes

    def subset(self, indices: Iterable[int]) -> MaskSet:
        """The images at ``indices``, in that order.

        Raises:
            DataError: an index outside the set, or none.
        """
        chosen = list(indices)
        if any(not 0 <= i < len(self) for i in chosen):
            raise DataError(f"not all of {chosen[:8]} are among {len(self)} images", where="indices")
        return MaskSet([self.images[i] for i in chosen], [self.masks[i] for i in chosen], self.labels)

    def read(self, index: int, channels: int = 3) -> tuple[Tensor, Tensor]:
        """Image (channels, H, W) uint8, its EXIF orientation applied, and class indices (H, W) uint8, 255 unlabelled.

        Raises:
            DataError: a file that is missing or broken, image and mask of different size, or a label that is no class.
        """
        import numpy as np

        image = np.asarray(decode(self.images[index], channels))
        mask = self._read_mask(index, (image.shape[0], image.shape[1]))
        pixels = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        return torch.from_numpy(pixels.copy()), torch.from_numpy(mask)

    def check(self) -> Tensor:
        """Decode everything once, before it can fail in the middle of a training.

        Returns:
            pixels of each class, (K,) int64.

        Raises:
            DataError: as :meth:`read`, for the first such image; or no mask has a labelled pixel.
        """
        import numpy as np

        counts, lock = np.zeros(IGNORE + 1, dtype=np.int64), Lock()

        def look(k: int) -> None:
            image = decode(self.images[k], 3)
            found = np.bincount(self._read_mask(k, (image.height, image.width)).ravel(), minlength=IGNORE + 1)
            with lock:
                np.add(counts, found, out=counts)

        for_each(look, len(self), "checking masks")
        pixels = torch.from_numpy(counts[: len(self.classes)])
        if not int(pixels.sum()):
            raise DataError(
                f"none of {len(self)} masks has a labelled pixel: all are ignored",
                where=self.masks[0],
                remedy=f"{IGNORE} means ignored, and in ADE20K 0 as well",
            )
        return pixels

    def _read_mask(self, index: int, size: tuple[int, int]) -> np.ndarray:
        path = self.masks[index]
        values = read_mask(path)
        if values.shape != size:
            turned = values.shape == size[::-1]
            raise DataError(
                f"the mask is {values.shape[0]}x{values.shape[1]} pixels, its image {size[0]}x{size[1]} "
                f"({self.images[index]})",
                where=path,
                remedy="The image's EXIF orientation is applied; was the mask drawn on the image without it?"
                if turned
                else "Make a mask of its image's size, or pair the right files",
            )
        return self.labels.encode(values, path)
