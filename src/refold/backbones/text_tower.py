"""An image classifier whose class weights come from a text tower at every step, and what is shipped of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.attachment import is_attached
from refold.backbones.classifier import Classifier, CosineHead
from refold.backbones.prompts import average_templates
from refold.errors import MergeError
from refold.state import State, state_of, store_state

__all__ = ["TextClassifier", "fixed_texts", "fold_text"]


class TextClassifier(nn.Module):
    """Both towers of an image-text model: images (B, C, H, W) -> logits (B, K) of the classes that prompts name.

    The class embeddings are computed from ``text`` at every forward, so that adapters there learn from images; within
    :func:`fixed_texts` once.
    Adapters go to both towers, or, named by path (``sites="text.*"``, ``"backbone.*"``), to one. After training and
    :func:`refold.merge`, :func:`fold_text` leaves the image tower and a fixed head. There is no head to train here.

    Args:
        backbone: images -> features (B, F).
        text: tokens (N, L) -> features (N, F).
        tokens: (T, K, L) of T templates with K names.
        logit_scale: logarithm of what the cosines are multiplied by.
        logit_bias: added to them, None for nothing.
    """

    tokens: Tensor

    def __init__(
        self, backbone: nn.Module, text: nn.Module, tokens: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.text = text
        self.register_buffer("tokens", tokens, persistent=False)
        self.logit_scale = nn.Parameter(logit_scale.detach().clone().reshape(()))
        bias = torch.zeros_like(self.logit_scale) if logit_bias is None else logit_bias.detach().clone().reshape(())
        self.logit_bias = nn.Parameter(bias)
        self._fixed: list[Tensor] | None = None  # within fixed_texts: none yet, or the embeddings

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """None: nothing here but the towers has weights for classes."""
        return ()

    def embeddings(self) -> Tensor:
        """The classes' text embeddings now, (K, F), of length 1."""
        return average_templates(self.text(self.tokens.flatten(0, 1)).unflatten(0, self.tokens.shape[:2]))

    def forward(self, images: Tensor) -> Tensor:
        features = F.normalize(self.backbone(images), dim=-1)
        cosines = F.linear(features, self._embeddings_to_use().to(features.dtype))
        return self.logit_scale.exp() * cosines + self.logit_bias

    def _embeddings_to_use(self) -> Tensor:
        if self._fixed is None or self.training or torch.is_grad_enabled():
            return self.embeddings()
        if not self._fixed:
            self._fixed.append(self.embeddings())
        return self._fixed[0]


@contextmanager
def fixed_texts(model: nn.Module) -> Iterator[None]:
    """Inside, where no weight may change, each :class:`TextClassifier` of a model computes its class embeddings once.

    That holds for forwards in eval mode and without gradients; all others, and those outside, compute them anew.
    """
    found = [module for module in model.modules() if isinstance(module, TextClassifier)]
    for module in found:
        module._fixed = []
    try:
        yield
    finally:
        for module in found:
            module._fixed = None


@torch.no_grad()
def fold_text(model: nn.Module) -> nn.Module:
    """What is shipped of a model: of a plain or merged :class:`TextClassifier` a copy of its image tower with a fixed
    head, the text embeddings of now; any other model as it is.

    What was described of a merged one stays known of the result, to which only going back is closed, as after a merge
    with ``keep_base=False``.

    Raises:
        MergeError: adapters are attached and not merged.
    """
    if not isinstance(model, TextClassifier):
        return model
    if any(is_attached(module) for module in model.modules()):
        raise MergeError(
            "adapters are attached and not merged, and some may be in the text tower",
            where=type(model).__name__,
            remedy="Call refold.merge first",
        )
    modes = [(module, module.training) for module in model.text.modules()]
    model.text.eval()
    head = CosineHead.of(model.embeddings(), model.logit_scale, model.logit_bias)
    for module, training in modes:
        module.training = training
    plain = Classifier(copy.deepcopy(model.backbone), head).train(model.training)
    state = state_of(model)
    if state is None:
        return plain
    assert state.merged is not None
    old = state.record()
    record = replace(
        old,
        sites=tuple(site for site in old.sites if _in_image_tower(site.path)),
        skipped=tuple(layer for layer in old.skipped if _in_image_tower(layer.path)),
        head=(),
        owned=tuple(filter(_in_image_tower, old.owned)),
        trainable=tuple(filter(_in_image_tower, old.trainable)),
        parked={key: adapter for key, adapter in old.parked.items() if _in_image_tower(key)},
    )
    store_state(plain, State(state.example, {}, {state.merged: record}, merged=state.merged, kept_base=False))
    return plain


def _in_image_tower(path: str) -> bool:
    return path == "backbone" or path.startswith("backbone.")
