"""A compact description of a backbone's weights that tells whether an adapter file belongs to it.

Samples of every tensor instead of a hash: the comparison tolerates a cast to another dtype, another head and
resized position embeddings, and can name the tensor that differs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from refold.maps import to_dense

__all__ = ["compare", "fingerprint"]

_SAMPLES = 4

#: Last name of tensors whose shape follows the input size; resampled when it changes, so they prove nothing.
_POSITIONS = frozenset(
    {
        "pos_embed",
        "position_embedding",
        "position_embeddings",
        "positional_embedding",
        "relative_position_bias_table",
        "rel_pos",
        "rel_pos_h",
        "rel_pos_w",
    }
)


def fingerprint(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Names (as one hash), sizes and samples of the tensors, position embeddings left out.

    Args:
        tensors: name -> original value of the backbone's parameters, the head's left out.
    """
    names = _names(tensors)
    samples = torch.cat([_sample(tensors[n]) for n in names]) if names else torch.zeros(0)
    return {
        "tensors": len(names),
        "names": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "samples": base64.b64encode(samples.numpy().astype("<f4").tobytes()).decode(),
    }


def compare(stored: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
    """Why a backbone is not the one that was fingerprinted, or None if it is.

    Raises:
        ValueError: the stored record is malformed.
    """
    names = _names(tensors)
    if hashlib.sha256("\n".join(names).encode()).hexdigest() != stored["names"]:
        return f"its tensors have other names or another number ({len(names)} here, {stored['tensors']} in the file)"
    raw = bytearray(base64.b64decode(stored["samples"], validate=True))
    if len(raw) != 4 * _SAMPLES * len(names):
        raise ValueError("the fingerprint's length does not fit its names")
    then = torch.frombuffer(raw, dtype=torch.float32).view(len(names), _SAMPLES) if names else torch.zeros(0, _SAMPLES)
    for name, values in zip(names, then, strict=True):
        now = _sample(tensors[name])
        # bfloat16 keeps 8 bits: 2^-8 relative, with room for one further rounding.
        if not torch.allclose(now, values, rtol=1.2e-2, atol=1e-6):
            return f"{name} has other values"
    return None


def _names(tensors: Iterable[str]) -> list[str]:
    return sorted(n for n in tensors if n.rpartition(".")[2] not in _POSITIONS)


def _sample(tensor: Tensor) -> Tensor:
    """A few elements spread over the tensor, as float32 on the CPU."""
    flat = to_dense(tensor.detach()).reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(_SAMPLES)
    at = torch.linspace(0, flat.numel() - 1, _SAMPLES, dtype=torch.float64).round().long()
    return flat[at.to(flat.device)].float().cpu()


def body_tensors(
    model: nn.Module, head: tuple[str, ...], originals: dict[str, Tensor], skip: set[int]
) -> dict[str, Tensor]:
    """Name -> original value of every floating parameter outside the head.

    Args:
        originals: values that differ from what the model holds now (trained in place, or folded).
        skip: ids of parameters that are not the backbone's (adapters).
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        in_head = any(name == h or name.startswith(f"{h}.") for h in head)
        if id(parameter) not in skip and not in_head and parameter.is_floating_point():
            found[name] = originals.get(name, parameter)
    return found
