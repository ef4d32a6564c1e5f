"""DenseCLIP: "Language-Guided Dense Prediction with Context-Aware Prompting" (arXiv 2112.01518), segmentation.

    s = norm(z) . norm(t')   for each pixel z = P x of the last map x and each class' text embedding t'
    t' = t + gamma A(t; [mean z, z])      A a transformer decoder in which words attend to pixels; gamma 1e-4 at first

The scores s, cosines, go to the decoder as K more channels of the last map, and s / tau, enlarged, is a prediction of
its own, with a cross-entropy beside the decoder's (weighted as any auxiliary head's by :func:`segmentation_loss`). A is
the paper's post-model prompting, the better of its two: pre-norm layers of width 256, 4 heads, dropout 0.1, three of
them. The text embeddings t are frozen.

Differences: tau, 0.07 in the released code, is learned from there, as CLIP's is, and never under 0.01; P is a fresh
1 x 1 convolution and the mean stands for the image where CLIP's own attention pooling gives both, so that any encoder
will do; the prompts' contexts are not learned, so that the text tower is run once and is no part of the model; and the
backbone is what :func:`refold.attach` makes it, frozen with adapters, where the paper fine-tunes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.backbones.prompts import embed_classes
from refold.dense import Encoder
from refold.errors import BackboneError, DataError, MissingExtraError
from refold.segmentation.decoders import Decoder
from refold.segmentation.models import Segmenter

__all__ = ["PixelText", "PixelTextScores", "embed_classes", "text_of", "unread_text"]

_WIDTH, _HEADS, _DROPOUT = 256, 4, 0.1
_GAMMA, _TAU = 1e-4, 0.07
_SHARPEST = math.log(100)  # of 1 / tau, as in CLIP


def text_of(spec: str, classes: Sequence[str], *, pretrained: bool = True) -> Tensor:
    """Text embeddings (K, C) of class names by an image-text model's text tower; ``_`` is read as a space.

    Args:
        spec: ``open_clip/NAME/PRETRAINED``.
        pretrained: False for a tower of random weights.

    Raises:
        BackboneError: the model cannot be loaded, or has no text tower.
        DataError: names that are no prompts.
    """
    from refold import backbones

    loaded = backbones.load(spec, head=backbones.Prompts.of(classes), pretrained=pretrained)
    return F.normalize(loaded.model.head.linear.weight.detach(), dim=1)  # type: ignore[union-attr, operator]


def unread_text(spec: str, classes: Sequence[str]) -> Tensor:
    """Something in the shape of :func:`text_of`, for a model whose embeddings come from a file.

    Raises:
        BackboneError: open_clip knows no such model.
        MissingExtraError: it is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError.of("open_clip_torch", "open_clip") from error

    name = spec.removeprefix("open_clip/").partition("/")[0]
    config = open_clip.get_model_config(name)
    if config is None:
        raise BackboneError("open_clip knows no such model", where=spec, remedy="See: refold models open_clip")
    return torch.ones(len(classes), config["embed_dim"])


class PixelTextScores(nn.Module):
    """A map (B, channels, h, w) -> cosines (B, K, h, w) of its pixels and K text embeddings.

    Args:
        channels: of the map.
        text: embeddings (K, C) of the classes, of any length but zero. Frozen, and saved with the model.
        context: layers of the decoder by which the embeddings look at the image; 0 leaves it out.

    Attributes:
        project: P, 1 x 1, to C channels. For an encoder that is an image tower of the text tower's, its own projection
            may be copied in.
        logit_scale: log(1 / tau), learned.

    Raises:
        DataError: embeddings that are no K >= 2 finite vectors.
    """

    text: Tensor

    def __init__(self, channels: int, text: Tensor, *, context: int = 3) -> None:
        super().__init__()
        if text.dim() != 2 or len(text) < 2 or not text.is_floating_point():
            raise DataError(
                f"must be (classes, channels) with two classes at least, not {tuple(text.shape)} of {text.dtype}",
                where="text",
            )
        if not bool((text.isfinite().all(1) & text.any(1)).all()):
            raise DataError("an embedding is zero or not finite", where="text")
        if context < 0:
            raise DataError(f"must be 0 or more, not {context}", where="context")
        width = text.shape[1]
        self.register_buffer("text", F.normalize(text.detach().float(), dim=1))
        self.project = nn.Conv2d(channels, width, 1)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(_TAU)))
        self.context: nn.TransformerDecoder | None = None
        if context:
            layer = nn.TransformerDecoderLayer(
                _WIDTH, _HEADS, 4 * _WIDTH, _DROPOUT, activation="gelu", batch_first=True, norm_first=True
            )
            self.context = nn.TransformerDecoder(layer, context)
            self.see = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, _WIDTH), nn.LayerNorm(_WIDTH))
            self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, _WIDTH))
            self.speak = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, width))
            self.gamma = nn.Parameter(torch.full((width,), _GAMMA))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.project(x)
        words = self.text.expand(len(x), -1, -1)
        if self.context is not None:
            seen = pixels.flatten(2).transpose(1, 2)
            seen = self.see(torch.cat((seen.mean(1, keepdim=True), seen), dim=1))
            words = words + self.gamma * self.speak(self.context(self.read(words), seen))
        return torch.einsum("bkc,bchw->bkhw", F.normalize(words, dim=2), F.normalize(pixels, dim=1))

    def logits(self, scores: Tensor) -> Tensor:
        """s / tau."""
        return scores * self.logit_scale.clamp(max=_SHARPEST).exp()


class PixelText(Segmenter):
    """A :class:`Segmenter` whose decoder sees, and whose training uses, how the features of pixels match class names.

    Images (B, C, H, W) -> logits (B, K, H, W). While training a list, of which the last are those of the scores alone;
    :func:`segmentation_loss` takes it.

    Args:
        encoder: see :func:`refold.dense.load_encoder`; attach adapters to ``model.encoder.body``.
        decoder: one of :data:`refold.segmentation.DECODERS`.
        text: embeddings (K, C) of the K classes in their order, for example of :func:`embed_classes`.
        width: channels inside the decoder.
        context: as for :class:`PixelTextScores`.

    Raises:
        BackboneError, DataError, MissingExtraError: as :class:`Segmenter` and :class:`PixelTextScores`.
    """

    def __init__(self, encoder: Encoder, decoder: str, text: Tensor, *, width: int = 256, context: int = 3) -> None:
        scores = PixelTextScores(encoder.channels[-1], text, context=context)
        wider = copy.copy(encoder)  # what the decoder is built for: it reads no more of an encoder than its numbers
        wider.channels = (*encoder.channels[:-1], encoder.channels[-1] + len(text))
        super().__init__(wider, decoder, len(text), width=width)
        self.encoder = encoder
        self.decoder = _Guided(self.decoder, scores)


class _Guided(Decoder):
    """A decoder that gets the scores as channels of the last map, and in training hands them on."""

    def __init__(self, decoder: Decoder, scores: PixelTextScores) -> None:
        super().__init__(decoder.layers, decoder.multiple, decoder.smallest_batch)
        self.scores = scores

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        scores = self.scores(maps[-1])
        logits = super().forward(images, [*maps[:-1], torch.cat((maps[-1], scores.to(maps[-1].dtype)), dim=1)])
        return [*logits, self.scores.logits(scores)] if self.training else logits
