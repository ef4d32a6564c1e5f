"""``load_encoder(spec)``: a backbone that gives feature maps, the part of every dense model that adapters attach to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from torch import Tensor

from refold.backbones import load
from refold.dense.fed import Fed
from refold.dense.sources import from_timm, from_torchvision, from_transformers
from refold.dense.stages import Features
from refold.errors import BackboneError, DataError
from refold.preprocessing import Preprocessing

__all__ = ["Encoder", "LoadedEncoder", "load_encoder"]


class Encoder(Fed):
    """Images (B, C, H, W) -> feature maps (B, C_k, H_k, W_k), fine to coarse, always channels first.

    Attributes:
        body: the backbone itself, nothing of ours inside; :func:`refold.attach` it.
        channels: C_k.
        strides: pixels of the image per pixel of map k; all equal for a plain ViT.
        fixed_size: the only (height, width) it takes; None for any multiple of ``multiple``.
        multiple: what height and width must be multiples of.
    """

    def __init__(self, features: Features) -> None:
        super().__init__(features.body)
        self.channels, self.strides = features.channels, features.strides
        self.gives = [["maps", *pair] for pair in zip(self.channels, self.strides, strict=True)]
        self.fixed_size = features.fixed_size
        self.multiple = max(features.strides)
        self._channels_last = features.channels_last

    @property
    def is_pyramid(self) -> bool:
        """Whether the maps differ in stride."""
        return len(set(self.strides)) > 1

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of ``images``.

        Raises:
            DataError: a height or width that the backbone cannot take.
        """
        self.check_size(images.shape[-2], images.shape[-1])
        if self._source is not None:
            return self._source(images)
        out = self.body(images)
        if isinstance(out, dict):  # torchvision's by name; transformers' among other fields
            out = out["feature_maps"] if "feature_maps" in out else out.values()
        return [m.permute(0, 3, 1, 2) if self._channels_last else m for m in out]

    def check_size(self, height: int, width: int) -> None:
        """Raise :class:`DataError` unless the backbone takes images of this size."""
        if self.fixed_size is not None and (height, width) != self.fixed_size:
            rows, columns = self.fixed_size
            raise DataError(
                f"the backbone takes {rows}x{columns} images only, not {height}x{width}",
                where="image size",
                remedy="Build it for another size with image_size, or slide a window over the image",
            )
        if height % self.multiple or width % self.multiple or not height or not width:
            raise DataError(
                f"{height}x{width} is no multiple of the backbone's stride, {self.multiple}",
                where="image size",
                remedy=f"Pad or resize to a multiple of {self.multiple}",
            )


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder ready to be adapted.

    Attributes:
        encoder: on the CPU in float32, in evaluation mode.
        spec: the canonical name; loading it again gives the same weights.
        preprocessing: how images become its input; its size is the one the encoder was built for.
    """

    encoder: Encoder
    spec: str
    preprocessing: Preprocessing


def load_encoder(
    spec: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    pretrained: bool = True,
    stages: Sequence[int] | None = None,
    in_chans: int = 3,
    weights: str | PathLike[str] | None = None,
) -> LoadedEncoder:
    """Build a backbone that gives feature maps, and load its weights; never random weights unless asked.

    Pyramids (Swin, SwinV2, ConvNeXt, ResNet, EfficientNet ...) give maps of strides 4, 8, 16 and 32. A plain ViT gives
    four of one stride, the outputs of the blocks at the ends of its four quarters, prefix tokens dropped.

    Args:
        spec: ``timm/NAME`` (or a bare NAME), ``hf-hub:USER/REPO``, ``packaged/NAME``, ``torchvision/NAME`` (default
            weights), or ``transformers/NAME`` (a repository, or a local folder).
        image_size: pixels, a side or (height, width): the size that training will use. ViT and Swin are built for
            it, with resampled position embeddings, and still take other sizes where the architecture can.
        pretrained: False for random weights.
        stages: which of the backbone's maps, ascending indices; None for the above.
        in_chans: input channels; timm's backbones alone take another number than 3.
        weights: a local file instead of the download, for timm's backbones, see :func:`refold.backbones.load`.

    Raises:
        BackboneError: an unknown spec, weights that do not fit or cannot be had, or a backbone without these stages.
        MissingExtraError: a package that the spec needs is not installed.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    source, _, name = spec.partition("/")
    others = {"torchvision": from_torchvision, "transformers": from_transformers}
    if source in others and name:
        if in_chans != 3 or weights is not None:
            option = "weights" if weights is not None else "in_chans"
            raise BackboneError(f"{source}'s backbones cannot take it", where=option, remedy="Use a timm backbone")
        if size is not None and min(size) < 1:
            raise BackboneError(f"must be positive (got {size})", where="image_size")
        features = others[source](name, size, pretrained, stages)
        canonical = spec
    elif source == "open_clip":
        raise BackboneError(
            "open_clip's image towers give no feature maps", where=spec, remedy="Use the timm tower: timm/vit_*_clip_*"
        )
    else:
        full = load(spec, in_chans=in_chans, image_size=size, pretrained=pretrained, weights=weights)
        features = from_timm(full, stages)
        canonical = full.spec
    return LoadedEncoder(Encoder(features).eval(), canonical, features.preprocessing)
