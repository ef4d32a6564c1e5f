"""What every tensor becomes when an adapter is folded into a model: computed in float64, nothing written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refold import hosting
from refold.adapters import Adapter, ChannelAdapter
from refold.errors import MergeError
from refold.fold import KINDS, input_shift
from refold.maps import ChannelMap, to_float64
from refold.probe import tensor_name
from refold.sites import Site
from refold.state import Record, get_tensor

__all__ = ["fold_all"]


@torch.no_grad()
def fold_all(model: nn.Module, record: Record, adapters: dict[str, Adapter]) -> dict[str, Tensor]:
    """State-dict name -> folded value in float64, from the model's present weights."""
    folds: dict[str, Tensor] = {}

    def current(name: str) -> Tensor | None:
        if name not in folds:
            tensor = get_tensor(model, name)
            if tensor is None:
                return None
            folds[name] = to_float64(tensor)
        return folds[name]

    constants: dict[str, Tensor] = {}  # BatchNorm -> what comes before it besides the layer's own output
    before: list[tuple[str, Tensor]] = []  # norm -> a shift behind it, once the norm itself is folded
    for site in record.sites:
        layer = model.get_submodule(site.path)
        op = KINDS[site.kind].operator(layer)
        weight_name, bias_name = tensor_name(site.path, op.weight), tensor_name(site.path, op.bias)
        weight, bias = current(weight_name), folds.get(bias_name)
        if weight is None:
            raise MergeError(hosting.NO_WEIGHT, where=site.path, remedy=hosting.KEEP_WEIGHT)
        if bias is None and (present := get_tensor(model, bias_name)) is not None:
            bias = to_float64(present)
        adapter = adapters[site.key]
        folds[weight_name], folded_bias = hosting.fold_site(op, site, adapter, weight, bias, to_float64)
        if folded_bias is not None and folded_bias is not bias:
            folds[bias_name] = folded_bias
        if not isinstance(adapter, ChannelAdapter) or site.shift is None:
            continue
        channel_map = adapter.channel_map()
        shift = channel_map.shift
        if shift is None:
            continue
        if site.shift.target == "batchnorm":
            constant = constants.get(site.shift.path)
            if site.slot == "output":
                moved = shift if constant is None else channel_map.after(constant, op.groups) + shift
            else:
                moved = input_shift(op, weight, shift)
            constants[site.shift.path] = moved
        elif site.shift.target == "norm":
            before.append((f"{site.shift.path}.bias", _solve(channel_map, shift, site)))
    for path, constant in constants.items():
        mean = current(f"{path}.running_mean")
        assert mean is not None
        folds[f"{path}.running_mean"] = mean - constant
    for name, shift in before:
        norm_bias = current(name)
        assert norm_bias is not None
        folds[name] = norm_bias + shift
    for name, value in folds.items():
        tensor = get_tensor(model, name)
        limit = torch.finfo(tensor.dtype if tensor is not None else torch.float32).max
        low, high = torch.aminmax(value)  # both NaN if one value is
        if not (float(low) >= -limit and float(high) <= limit):
            raise MergeError(
                "the folded value is not finite in the weight's dtype", where=name, remedy="Check training"
            )
    return folds


def _solve(channel_map: ChannelMap, shift: Tensor, site: Site) -> Tensor:
    try:
        return channel_map.solve(shift)
    except RuntimeError as error:  # torch.linalg.LinAlgError, which torch does not export to type checkers
        raise MergeError(
            "the adapter's matrix is singular, so its shift cannot move into the norm before the layer",
            where=site.path,
            remedy="Attach with allow_new_bias=True",
        ) from error
