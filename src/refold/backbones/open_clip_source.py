"""Image towers of open_clip, with a head: linear, zero-shot, or the text tower itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.backbones.checkpoints import class_count, describe_mismatch, read_state_dict
from refold.backbones.classifier import Classifier, CosineHead
from refold.backbones.hub import hub_access
from refold.backbones.normalization import from_config
from refold.backbones.prompts import Prompts, embed_tokens, tokenize
from refold.backbones.request import Loaded, Request
from refold.backbones.text_tower import TextClassifier
from refold.backbones.timm_source import check_size, close_matches
from refold.errors import BackboneError, DataError, MissingExtraError

__all__ = ["load_open_clip"]


def load_open_clip(name: str, request: Request) -> Loaded:
    """``NAME/PRETRAINED``: the image tower of an open_clip model as a :class:`Classifier`.

    PRETRAINED is a tag that open_clip knows or the path of a checkpoint; it may be empty when ``request`` brings a
    weight file or asks for random weights. A weight file holds the whole image-text model, or the state dict of
    such a :class:`Classifier`. The features are the tower's output in the shared image-text space. A tower has no
    classifier of its own: without ``num_classes``, and without one in the file, the head is the identity. With
    prompts it is their class names' embeddings, or the text tower, and ``num_classes`` is not needed.

    Raises:
        BackboneError: unknown model or tag, no weights named, a failed download, a file that does not fit, or prompts
            beside a file without a text tower.
        DataError: two class names that the tokenizer takes for one.
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

    prompts = request.head if isinstance(request.head, Prompts) else None
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
        if prompts is not None:
            reason = "holds an image tower without the text tower that class names go through"
            raise BackboneError(reason, where=str(path), remedy="Pass weights of the whole image-text model")
        clip = _create(architecture, None, facts, request)
        model = _load_classifier(clip.visual, state, where, path)
    else:
        clip = _create(architecture, path, facts, request)
        model = Classifier(clip.visual, nn.Identity())

    if request.in_chans is not None:
        _adapt_stem(model.backbone, request.in_chans)
    tower, result = model.backbone, model
    if prompts is not None:
        result = _with_prompts(clip, tower, prompts, architecture)
    elif request.num_classes is not None:
        width = open_clip.get_model_config(architecture)["embed_dim"]  # pyright: ignore[reportOptionalSubscript]
        made = CosineHead if request.head == "cosine" else nn.Linear
        model.head = made(width, request.num_classes) if request.num_classes else nn.Identity()
    if hasattr(clip.visual, "output_tokens"):
        clip.visual.output_tokens = False  # CoCa's tower would return the tokens besides the pooled features
    config = open_clip.get_model_preprocess_cfg(clip)
    size = config["size"] if isinstance(config["size"], tuple) else (config["size"], config["size"])
    check_size(size, _patch_size(tower), where)
    channels = _stem(tower)[1].in_channels
    return Loaded(result.eval(), f"open_clip/{name}", from_config(config, channels=channels, size=size))


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
                force_custom_text=isinstance(request.head, Prompts) and request.head.tower,  # a module of its own
                force_image_size=size[0] if size and size[0] == size[1] else size,  # the ResNets take an int only
                force_preprocess_cfg={k: facts[k] for k in ("mean", "std", "interpolation") if k in facts},
            )
    except RuntimeError as error:
        if not isinstance(source, Path):
            raise
        raise _misfit(source, f"open_clip/{architecture}", error) from error


def _with_prompts(clip: Any, image: nn.Module, prompts: Prompts, architecture: str) -> nn.Module:
    """The image tower with the prompts' zero-shot head, or with the text tower."""
    tokens = tokenize(prompts.names, _tokenizer(architecture), prompts.sentences)
    for template, rows in zip(prompts.sentences, tokens, strict=True):
        first: dict[bytes, str] = {}
        for name, row in zip(prompts.names, rows, strict=True):
            if (other := first.setdefault(row.numpy().tobytes(), name)) != name:
                raise DataError(
                    f"{other!r} and {name!r} are one and the same to the tokenizer",
                    where=template,
                    remedy="Give them other names, or shorter ones in a shorter template",
                )
    if not prompts.tower:
        head = CosineHead.of(embed_tokens(clip, tokens), clip.logit_scale, clip.logit_bias)
        return Classifier(image, head)
    text, sample = clip.text, tokens[0, :1]
    with torch.no_grad():
        expected = nn.functional.normalize(clip.eval().encode_text(sample), dim=-1)
        if hasattr(text, "output_tokens"):
            text.output_tokens = False  # CoCa's would return the tokens besides the pooled features
        found = nn.functional.normalize(text(sample), dim=-1)
    if not torch.allclose(found, expected, atol=1e-5):
        raise BackboneError("its text features are not what its text tower returns", where=f"open_clip/{architecture}")
    return TextClassifier(image, text, tokens, clip.logit_scale, clip.logit_bias)


def _tokenizer(architecture: str) -> Any:
    import open_clip

    config = (open_clip.get_model_config(architecture) or {}).get("text_cfg", {})
    needs_hub = config.get("hf_tokenizer_name") or config.get("hf_model_name")
    with hub_access(f"the tokenizer of open_clip/{architecture}") if needs_hub else nullcontext():
        return open_clip.get_tokenizer(architecture)


def _is_classifier(state: Mapping[str, Tensor]) -> bool:
    return all(key.startswith(("backbone.", "head.")) for key in state)


def _load_classifier(tower: nn.Module, state: dict[str, Tensor], where: str, path: Path) -> Classifier:
    """Load the state dict of a :class:`Classifier` around ``tower``, with its own number of channels and classes."""
    stem_path, stem = _stem(tower)
    weight = state.get(f"backbone.{stem_path}.weight")
    if weight is not None and weight.ndim == 4 and weight.shape[1] != stem.in_channels:
        _adapt_stem(tower, weight.shape[1])
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    head: nn.Module = nn.Identity()
    for key, made in (("head", nn.Linear), ("head.linear", CosineHead)):
        if f"{key}.weight" in shapes:
            head = made(shapes[f"{key}.weight"][1], class_count(shapes, (key,)))
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
