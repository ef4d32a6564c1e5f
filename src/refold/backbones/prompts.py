"""Class names as text: prompts, and the embeddings that a text tower makes of them.

    w_k = norm(mean over templates t of norm(text(t with the name of class k)))

CLIP's protocol ("Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, 3.1.4): an
ensemble over templates in the space of embeddings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from refold.errors import DataError

__all__ = ["TEMPLATES", "Prompts", "average_templates", "embed_classes", "embed_tokens", "stored_head", "tokenize"]

TEMPLATES = ("a photo of a {}.",)
_BATCH = 256  # sentences a forward pass
_MOST = 2**20  # sentences, so that a stranger's file cannot ask for any number


@dataclass(frozen=True)
class Prompts:
    """What a classifier says to a text tower: every name in every template.

    Attributes:
        names: one a class, in the order of the outputs.
        templates: sentences with ``{}`` for the name; ``"openai"`` and ``"simple"`` alone stand for CLIP's 80 and its
            7 templates for ImageNet.
        tower: keep the text tower in the model, to be adapted (:class:`refold.backbones.TextClassifier`), instead of a
            head computed with it once.

    Raises:
        DataError: fewer than two names, two alike, an empty one, no template, or one without ``{}``.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES
    tower: bool = False

    def __post_init__(self) -> None:
        for field in ("names", "templates"):
            values = getattr(self, field)
            if not isinstance(values, list | tuple) or not all(isinstance(v, str) and v.strip() for v in values):
                raise DataError(f"must be texts, not {values!r}", where=field)
            object.__setattr__(self, field, tuple(values))
        if len(self.names) < 2:
            raise DataError("needs two classes at least to tell apart", where="names")
        name, times = Counter(self.names).most_common(1)[0]
        if times > 1:
            raise DataError(f"two classes are called {name!r}", where="names", remedy="Give them different names")
        _require_templates(self.sentences)
        if (count := len(self.names) * len(self.sentences)) > _MOST:
            raise DataError(f"{count} sentences are more than {_MOST}", where="templates", remedy="Use fewer templates")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates, written out."""
        if self.templates not in (("openai",), ("simple",)):
            return self.templates
        import open_clip

        named = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}
        return tuple(template("{}") for template in named[self.templates[0]])

    @classmethod
    def of(
        cls,
        classes: Sequence[str],
        templates: Sequence[str] | None = None,
        names: Mapping[str, str] | None = None,
        *,
        tower: bool = False,
    ) -> Self:
        """Prompts for the classes of a data set.

        Args:
            classes: as the data set calls them; ``_`` is read as a space.
            templates: None is ``a photo of a {}.``.
            names: class -> a better name, for some of them.
            tower: as the attribute.

        Raises:
            DataError: as the constructor, or ``names`` has another class.
        """
        better = names or {}
        if unknown := sorted(set(better) - set(classes)):
            known = ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else "")
            raise DataError(f"{unknown[0]!r} is no class of the data", where="names", remedy=f"It has {known}")
        found = tuple(better.get(name) or name.replace("_", " ") for name in classes)
        return cls(found, TEMPLATES if templates is None else tuple(templates), tower)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"names": list(self.names), "templates": list(self.templates), "tower": self.tower}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Rebuild from :meth:`to_json`.

        Raises:
            DataError: it is something else.
        """
        if not isinstance(data, Mapping) or not {*data} == {"names", "templates", "tower"}:
            raise DataError(f"are no prompts: {data!r:.80}", where="prompts")
        return cls(data["names"], data["templates"], bool(data["tower"]))


def stored_head(prompts: Any) -> str | Prompts:
    """The head of a model that an adapter file is for, as :func:`refold.backbones.load` takes it.

    Args:
        prompts: what the file's ``extra`` says of them; None of a model without.

    Returns:
        ``"cosine"`` where the file holds the head itself, which then need not be computed again.

    Raises:
        DataError: it says something else.
    """
    if prompts is None:
        return "linear"
    found = Prompts.from_json(prompts)
    return found if found.tower else "cosine"


def embed_classes(
    classes: Sequence[str],
    tower: Any,
    tokenizer: Callable[[list[str]], Tensor],
    templates: Sequence[str] = TEMPLATES,
) -> Tensor:
    """Text embeddings (K, C) of class names, of length 1: the mean over the templates' normalised ones.

    Args:
        classes: K names.
        tower: has ``encode_text``, as open_clip's models.
        tokenizer: sentences -> what ``encode_text`` takes, as ``open_clip.get_tokenizer`` gives.
        templates: sentences with ``{}`` for the name.

    Raises:
        DataError: no class, no template, or one without ``{}``.
    """
    if not classes:
        raise DataError("needs class names, and templates with {} for the name", where="embed_classes")
    _require_templates(templates)
    return embed_tokens(tower, tokenize(classes, tokenizer, templates))


def _require_templates(templates: Sequence[str]) -> None:
    if not templates or any("{}" not in template for template in templates):
        wrong = next((t for t in templates if "{}" not in t), None)
        raise DataError(
            "needs class names, and templates with {} for the name" + (f", not {wrong!r}" if wrong else ""),
            where="templates",
        )


def tokenize(
    classes: Sequence[str], tokenizer: Callable[[list[str]], Tensor], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """Tokens (T, K, L) of T templates with K names."""
    return torch.stack([tokenizer([t.replace("{}", name) for name in classes]) for t in templates])


@torch.no_grad()
def embed_tokens(tower: Any, tokens: Tensor) -> Tensor:
    """What ``tower.encode_text``, in evaluation mode, makes of tokens (T, K, L): (K, C), of length 1, on the CPU."""
    was_training = tower.training
    tower.eval()
    try:
        device = next(tower.parameters()).device
        found = [tower.encode_text(part.to(device)) for part in tokens.flatten(0, 1).split(_BATCH)]
    finally:
        tower.train(was_training)
    return average_templates(torch.cat(found).unflatten(0, tokens.shape[:2])).cpu()


def average_templates(features: Tensor) -> Tensor:
    """Text features (T, K, C) of T templates -> embeddings (K, C) of length 1, in float32 at least."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(F.normalize(features, dim=2).mean(0), dim=1)
