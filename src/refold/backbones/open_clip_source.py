"""Image towers of open_clip, with a linear head."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from refold.backbones.checkpoints import class_count, describe_mismatch, read_state_dict
from refold.backbones.classifier import Classifier
from refold.backbones.hub import hub_access
from refold.backbones.normalization import from_config
from refold.backbones.request import Loaded, Request
from refold.backbones.timm_source import check_size, close_matches
from refold.errors import BackboneError, MissingExtraError

__all__ = ["load_open_clip"]


def load_open_clip(name: str, request: Request) -> Loaded:
    """``NAME/PRETRAINED``: the image tower of an open_clip model as a :class:`Classifier`.

    PRETRAINED is a tag that open_clip knows or the path of a checkpoint; it may be empty when ``request`` brings a
    weight file or asks for random weights. A weight file holds the whole image-text model, or the state dict of
    such a :class:`Classifier`. The features are the tower's output in the shared image-text space. A tower has no
    classifier of its own: without ``num_classes``, and without one in the file, the head is the identity.

    Raises:
        BackboneError: unknown model or tag, no weights named, a failed download, or a file that does not fit.
        MissingExtraError: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError.of("open_clip_torch", "open_clip") from error

    architecture, _, pretrained = name.partition("/")
    where = f"open_clip/{architecture}"
    if architecture not in open_clip.list_models():
        remedy = close_matches(architecture, open_clip.list_models(), "open_clip/") or "See: refold models open_clip"
        raise BackboneError("open_clip knows no such model", where=where, remedy=remedy)

    facts = open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else {}
    path = request.weights
    if path is None and request.pretrained and not facts:
        path = Path(pretrained)
        if not path.is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
            remedy = f"Known: {tags}; or pass a file with --weights FILE, or pretrained=False for random weights"
            reason = f"has no weights called {pretrained!r}" if pretrained else "no pretrained weights are named"
            raise BackboneError(reason, where=where, remedy=remedy)

    if path is None:
        clip = _create(architecture, pretrained if request.pretrained else None, facts, request)
        model = Classifier(clip.visual, nn.Identity())
    elif _is_classifier(state := read_state_dict(path)):
        clip = _create(architecture, None, facts, request)
        model = _load_classifier(clip.visual, state, where, path)
    else:
        clip = _create(architecture, path, facts, request)
        model = Classifier(clip.visual, nn.Identity())

    if request.in_chans is not None:
        _adapt_stem(model.backbone, request.in_chans)
    if request.num_classes is not None:
        width = open_clip.get_model_config(architecture)["embed_dim"]  # pyright: ignore[reportOptionalSubscript]
        model.head = nn.Linear(width, request.num_classes) if request.num_classes else nn.Identity()
    if hasattr(clip.visual, "output_tokens"):
        clip.visual.output_tokens = False  # CoCa's tower would return the tokens besides the pooled features
    config = open_clip.get_model_preprocess_cfg(clip)
    size = config["size"] if isinstance(config["size"], tuple) else (config["size"], config["size"])
    check_size(size, _patch_size(model.backbone), where)
    channels = _stem(model.backbone)[1].in_channels
    return Loaded(model.eval(), f"open_clip/{name}", from_config(config, channels=channels, size=size))


def _create(architecture: str, source: str | Path | None, facts: Mapping[str, Any], request: Request) -> Any:
    """The whole image-text model: weights from the hub (a tag), a file (a path) or none; ``facts`` about the tag."""
    import open_clip

    size = request.image_size
    access = hub_access(f"open_clip/{architecture}/{source}") if isinstance(source, str) else nullcontext()
    try:
        with access, _quiet_root_logger():
            return open_clip.create_model(
                architecture,
                pretrained=str(source) if source else None,
                pretrained_text=False,
                force_quick_gelu=bool(facts.get("quick_gelu")),  # a fact of the weights, not of the architecture
                force_image_size=size[0] if size and size[0] == size[1] else size,  # the ResNets take an int only
                force_preprocess_cfg={k: facts[k] for k in ("mean", "std", "interpolation") if k in facts},
            )
    except RuntimeError as error:
        if not isinstance(source, Path):
            raise
        raise _misfit(source, f"open_clip/{architecture}", error) from error


def _is_classifier(state: Mapping[str, Tensor]) -> bool:
    return all(key.startswith(("backbone.", "head.")) for key in state)


def _load_classifier(tower: nn.Module, state: dict[str, Tensor], where: str, path: Path) -> Classifier:
    """Load the state dict of a :class:`Classifier` around ``tower``, with its own number of channels and classes."""
    stem_path, stem = _stem(tower)
    weight = state.get(f"backbone.{stem_path}.weight")
    if weight is not None and weight.ndim == 4 and weight.shape[1] != stem.in_channels:
        _adapt_stem(tower, weight.shape[1])
    classes = class_count({key: tuple(value.shape) for key, value in state.items()}, ("head",))
    head = nn.Linear(state["head.weight"].shape[1], classes) if classes else nn.Identity()
    model = Classifier(tower, head)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise _misfit(path, where, error) from error
    return model


def _stem(tower: nn.Module) -> tuple[str, nn.Conv2d]:
    """Path and module of the convolution that reads the image: the first, in every tower of open_clip."""
    for path, module in tower.named_modules():
        if isinstance(module, nn.Conv2d):
            return path, module
    raise BackboneError("this image tower has no convolution to read images with", where=type(tower).__name__)


def _adapt_stem(tower: nn.Module, in_chans: int) -> None:
    """Give the tower ``in_chans`` input channels, its first weights summed or repeated as timm does."""
    from timm.models import adapt_input_conv

    path, old = _stem(tower)
    if old.in_channels == in_chans:
        return
    weight = adapt_input_conv(in_chans, old.weight.detach())
    new = nn.utils.skip_init(
        nn.Conv2d,
        in_chans,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        bias=old.bias is not None,
    )
    new.weight = nn.Parameter(weight)
    if old.bias is not None:
        new.bias = old.bias
    tower.set_submodule(path, new)


def _patch_size(tower: nn.Module) -> tuple[int, int] | None:
    """Patch size of open_clip's own ViT, or of timm's inside a TimmModel; None for convolutional towers."""
    own = getattr(tower, "patch_size", None)
    return own or getattr(getattr(getattr(tower, "trunk", None), "patch_embed", None), "patch_size", None)


def _misfit(path: Path, where: str, error: Exception) -> BackboneError:
    return BackboneError(
        f"does not fit {where}: {describe_mismatch(error)}",
        where=str(path),
        remedy="Name the open_clip model the weights belong to",
    )


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep open_clip's ``logging.warning(...)`` calls from installing a handler on the root logger for good."""
    root, silence = logging.getLogger(), logging.NullHandler()
    root.addHandler(silence)
    try:
        yield
    finally:
        root.removeHandler(silence)
