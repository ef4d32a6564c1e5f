"""Quantized weights: adapters train beside them; merging gives the folded layers floating weights, if the user asks.

A fold in place would have to be rounded to the few values a quantized weight can take, which undoes much of what a
small adapter learned. So ``merge`` refuses, or, with ``dequantize=True``, first replaces the weights that will hold
a fold by the floating numbers they stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from refold.errors import MergeError
from refold.fold import KINDS
from refold.maps import is_quantized, to_dense
from refold.probe import tensor_name
from refold.state import Record, State, drop_compiled, get_tensor

__all__ = ["dequantize", "quantized_weights", "requantize", "single_precision_copy"]


def quantized_weights(model: nn.Module, records: Iterable[Record]) -> tuple[str, ...]:
    """State-dict names of the quantized weights that these adapters fold into."""
    found = {}
    for site in (site for record in records for site in record.sites):
        name = tensor_name(site.path, KINDS[site.kind].operator(model.get_submodule(site.path)).weight)
        tensor = get_tensor(model, name)
        if tensor is not None and is_quantized(tensor):
            found[name] = None
    return tuple(found)


@torch.no_grad()
def dequantize(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Put floating parameters in the place of quantized ones; returns those by name.

    Raises:
        MergeError: a weight cannot be read. The model is then as it was.
    """
    dense = {}
    for name in names:
        tensor = get_tensor(model, name)
        assert tensor is not None
        values = to_dense(tensor)
        if is_quantized(values):
            raise MergeError(
                f"the values of a {type(tensor).__name__} cannot be read",
                where=name,
                remedy="Ship the adapter unmerged, or load the backbone without quantization and merge there",
            )
        dense[name] = nn.Parameter(values, requires_grad=False)
    return _exchange(model, dense)


def single_precision_copy(model: nn.Module) -> nn.Module:
    """A copy in float32, quantized weights included: ``float()`` leaves them as they are."""
    twin = copy.deepcopy(model)
    dequantize(twin, tuple(n for n, p in twin.named_parameters() if is_quantized(p) and p.is_floating_point()))
    return twin.float()


def requantize(model: nn.Module, state: State) -> None:
    """Put the quantized parameters back that :func:`dequantize` took out, as the objects they were."""
    if state.quantized:
        _exchange(model, state.quantized)
        state.quantized = {}


def _exchange(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    before = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        present = parameters[leaf]
        assert present is not None
        before[name] = present
        moved = tensor if tensor.device == present.device else tensor.to(present.device)
        parameters[leaf] = moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
    if tensors:
        drop_compiled()
    return before
