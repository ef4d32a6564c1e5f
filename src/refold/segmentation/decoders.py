"""Decoders by name: from an encoder's maps to logits at some stride.

``upernet``, ``fpn``, ``dpt`` and ``segformer`` are segmentation-models-pytorch's own modules (arXiv 1807.10221,
1901.02446, 2103.13413, 2105.15203), given our encoder's channels; the ``setr_`` ones are in
:mod:`refold.segmentation.setr`. ``linear`` is the linear probe: batch norm, which has no say after training, and a 1x1
convolution on the last map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from refold.dense import Encoder, SimplePyramid
from refold.dense.stages import PYRAMID
from refold.errors import BackboneError, DataError, MissingExtraError
from refold.segmentation.setr import Mla, Naive, Pup

__all__ = ["DECODERS", "Decoder", "make_decoder"]

_SETR: dict[str, Callable[[Sequence[int], int, int], nn.Module]] = {
    "setr_naive": Naive,
    "setr_pup": Pup,
    "setr_mla": Mla,
}
_PYRAMIDS = ("upernet", "fpn", "segformer")
#: Names that :class:`refold.segmentation.Segmenter` takes.
DECODERS = (*_PYRAMIDS, "dpt", "linear", *_SETR)
_FOUR_STRIDES = f"maps of strides {', '.join(map(str, PYRAMID))}"
_GROUPS = 32  # of the group norms in smp's FPN, half as wide as the pyramid


class Decoder(nn.Module):
    """Images and their maps -> logits at some stride, followed in training by those of auxiliary heads.

    Args:
        layers: maps -> logits, or a list of them.

    Attributes:
        multiple: what the images' height and width must be multiples of, a multiple of the encoder's.
        smallest_batch: images that a training step needs, for batch norms of one pixel.
    """

    def __init__(self, layers: nn.Module, multiple: int, smallest_batch: int = 1) -> None:
        super().__init__()
        self.layers = layers
        self.multiple, self.smallest_batch = multiple, smallest_batch

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        if self.training and len(images) < self.smallest_batch:
            raise DataError(
                f"this decoder's batch norm sees one pixel an image and needs {self.smallest_batch} images",
                where="batch_size",
                remedy="Enlarge the batch, or use fpn, segformer or linear",
            )
        logits = self.layers(maps)
        return logits if isinstance(logits, list) else [logits]


class _Linear(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.head(self.norm(maps[-1]))


class _Pyramid(nn.Module):
    """One of smp's pyramid decoders and a 1x1 head, behind a simple pyramid where the encoder has none.

    Args:
        unused: how many entries, of the image and of stride 2, the decoder expects before the map of stride 4. It asks
            no more of them than the image's size.
    """

    def __init__(self, neck: nn.Module, decoder: nn.Module, head: nn.Module, unused: int) -> None:
        super().__init__()
        self.neck, self.decoder, self.head = neck, decoder, head
        self._unused = unused

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = self.neck(maps)
        finest = levels[0]
        image = finest.new_empty((finest.shape[0], 0, *(PYRAMID[0] * side for side in finest.shape[-2:])))
        return self.head(self.decoder([image] * self._unused + list(levels)))


class _Dpt(nn.Module):
    def __init__(self, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.head(self.decoder(list(maps), [None] * len(maps)))


def make_decoder(name: str, encoder: Encoder, classes: int, width: int) -> Decoder:
    """The decoder ``name`` of ``encoder``'s maps.

    Raises:
        BackboneError: an unknown name, or a decoder that does not go with the encoder.
        MissingExtraError: segmentation-models-pytorch, which it comes from, is not installed.
    """
    if name not in DECODERS:
        raise BackboneError(f"unknown decoder {name!r}", where="decoder", remedy=f"Known: {', '.join(DECODERS)}")
    if name == "linear":
        channels = encoder.channels[-1]
        return Decoder(_Linear(channels, classes), encoder.multiple)
    if name in _SETR:
        if encoder.is_pyramid:
            raise _mismatch(name, encoder, "maps of one stride", "Use a plain ViT, or upernet, fpn, dpt or segformer")
        return Decoder(_SETR[name](encoder.channels, classes, width), encoder.multiple)
    if len(encoder.strides) != 4:
        raise _mismatch(name, encoder, "four maps", "Load the encoder without stages, or use linear")
    try:
        return _make_dpt(encoder, classes, width) if name == "dpt" else _make_pyramid(name, encoder, classes, width)
    except ModuleNotFoundError as error:
        raise MissingExtraError.of("segmentation-models-pytorch", "dense") from error


def _make_pyramid(name: str, encoder: Encoder, classes: int, width: int) -> Decoder:
    neck: nn.Module = nn.Identity()
    channels = encoder.channels
    if not encoder.is_pyramid:
        neck = SimplePyramid(encoder.channels, encoder.strides, width)
        channels = neck.channels
    elif encoder.strides != PYRAMID:
        raise _mismatch(name, encoder, _FOUR_STRIDES, "Load the encoder without stages")
    if name == "upernet":
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        # Entry 0 and 1 stand for the image and stride 2, which it does not use.
        decoder: Any = UPerNetDecoder([0, 0, *channels], encoder_depth=5, decoder_channels=width)
        out, unused, batch = width, 2, 2
    elif name == "fpn":
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

        if width % (2 * _GROUPS):
            raise BackboneError(f"fpn's width must be a multiple of {2 * _GROUPS}, not {width}", where="width")
        # Nearest-neighbour enlargement, its default, as in the released Panoptic FPN.
        decoder = FPNDecoder([0, 0, *channels], pyramid_channels=width, segmentation_channels=width // 2)
        out, unused, batch = decoder.out_channels, 0, 1
    else:
        from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

        decoder = SegformerDecoder([3, *channels], encoder_depth=4, segmentation_channels=width)
        out, unused, batch = width, 1, 1
    layers = _Pyramid(neck, decoder, nn.Conv2d(out, classes, 1), unused)
    return Decoder(layers, encoder.multiple, batch)


def _make_dpt(encoder: Encoder, classes: int, width: int) -> Decoder:
    """DPT on a ViT, without the class token (``readout="ignore"``), or on a pyramid, which needs no reassembling.

    Widths of the reassembled maps: an eighth, a quarter, a half and all of the ViT's (the paper's for ViT-B). A
    ViT/14's maps are reassembled by the same factors as a ViT/16's; the logits are enlarged to the image afterwards.
    """
    from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead

    multiple = encoder.multiple
    if encoder.is_pyramid:
        strides, widths = encoder.strides, encoder.channels
        if strides != PYRAMID:
            raise _mismatch("dpt", encoder, _FOUR_STRIDES, "Load the encoder without stages")
    else:
        strides, multiple = (16,) * 4, 2 * multiple  # one of the maps is halved
        widths = tuple(max(c // share, 1) for c, share in zip(encoder.channels, (8, 4, 2, 1), strict=True))
    if encoder.fixed_size is not None and any(side % multiple for side in encoder.fixed_size):
        raise _mismatch("dpt", encoder, "maps of even size", f"Build it with an image_size divisible by {multiple}")
    decoder = DPTDecoder(
        encoder.channels,
        strides,
        encoder_has_prefix_tokens=False,
        readout="ignore",
        intermediate_channels=widths,
        fusion_channels=width,
    )
    return Decoder(_Dpt(decoder, DPTSegmentationHead(width, classes, upsampling=1.0)), multiple)


def _mismatch(name: str, encoder: Encoder, needed: str, remedy: str) -> BackboneError:
    return BackboneError(f"needs {needed}; the encoder's strides are {encoder.strides}", where=name, remedy=remedy)
