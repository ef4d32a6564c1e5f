"""A semantic segmentation model: an encoder that adapters attach to, a decoder that is trained."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from refold.dense import Encoder
from refold.errors import DataError
from refold.segmentation.decoders import make_decoder

__all__ = ["Segmenter"]


class Segmenter(nn.Module):
    """Images (B, C, H, W) -> logits (B, K, H, W), for any size.

    Images are padded below and to the right with zeros, the mean colour of normalised images, to what encoder and
    decoder can take, and the logits are cut again. An encoder of a fixed size takes no larger images; slide a window
    over those (:class:`refold.segmentation.Inference`).

    Args:
        encoder: see :func:`refold.dense.load_encoder`; attach adapters to ``model.encoder.body``.
        decoder: one of :data:`refold.segmentation.DECODERS`. ``upernet``, ``fpn`` and ``segformer`` get a
            :class:`refold.dense.SimplePyramid` in front where the encoder's maps have one stride; the ``setr_`` ones
            take such encoders only.
        classes: K.
        width: channels inside the decoder.

    Raises:
        BackboneError: an unknown decoder, or one that does not go with the encoder.
        DataError: fewer than two classes, or no channels.
        MissingExtraError: segmentation-models-pytorch, which the decoder comes from, is not installed.
    """

    def __init__(self, encoder: Encoder, decoder: str, classes: int, *, width: int = 256) -> None:
        super().__init__()
        if classes < 2:
            raise DataError(f"segmentation needs two classes at least, not {classes}", where="classes")
        if width < 1:
            raise DataError(f"must be positive, not {width}", where="width")
        self.encoder = encoder
        self.decoder = make_decoder(decoder, encoder, classes, width)
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, K, H, W). While training, decoders with auxiliary heads return a list, the main logits first.

        Raises:
            DataError: a size the encoder cannot take, or too small a batch to train.
        """
        height, width = images.shape[-2:]
        if not images.numel():
            raise DataError(f"there is no pixel in images of shape {tuple(images.shape)}", where="images")
        size = self.padded(height, width)
        padded = F.pad(images, (0, size[1] - width, 0, size[0] - height))
        outputs = self.decoder(padded, self.encoder(padded))
        logits = [
            F.interpolate(o, size=size, mode="bilinear", align_corners=False)[..., :height, :width] for o in outputs
        ]
        return logits if len(logits) > 1 else logits[0]

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which the encoder sees an image of this size."""
        if self.encoder.fixed_size is not None:
            rows, columns = self.encoder.fixed_size
            return max(rows, height), max(columns, width)
        multiple = self.decoder.multiple
        return height + -height % multiple, width + -width % multiple
