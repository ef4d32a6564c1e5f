"""Folded weights kept while a model is merged, so that switching back to an adapter is a copy; and checksums.

A fold in float64 costs several passes over the weights, a copy one. What is kept is dropped as soon as it could
be wrong: at merge and unmerge, when the model moved to another dtype or device, when the adapter was changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from refold.adapters import Adapter
from refold.state import Kept, State, get_tensor

__all__ = ["checksums", "find", "keep", "same_bits", "source", "tensor_checksums"]


def checksums(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """State-dict name -> checksum of the tensor's bits, 0 for one that is not there."""
    names = tuple(names)
    return dict(zip(names, tensor_checksums(get_tensor(model, name) for name in names), strict=True))


def tensor_checksums(tensors: Iterable[Tensor | None]) -> list[int]:
    """Of each tensor's bits: one read, no copy, and the same on every device and in every copy.

    Torch's version counters would cost nothing, but writes through ``.data`` or numpy do not raise them.
    """
    sums = [None if tensor is None else _checksum(tensor.detach()) for tensor in tensors]
    # Read back together: on a GPU every ``int()`` would wait for the device.
    return [0 if s is None else int(s) for s in (sums if _on_cpu(sums) else _gathered(sums))]


def _on_cpu(sums: list[Tensor | None]) -> bool:
    return all(s is None or s.device.type == "cpu" for s in sums)


def _gathered(sums: list[Tensor | None]) -> list[Tensor | None]:
    devices = {s.device for s in sums if s is not None}
    read = {d: iter(torch.stack([s for s in sums if s is not None and s.device == d]).cpu()) for d in devices}
    return [None if s is None else next(read[s.device]) for s in sums]


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the tensor's bytes read as 8-byte words, which one read of the memory bounds."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    head = flat[:whole]
    if head.storage_offset() % 8:  # a view in the middle of other values
        head = head.clone()
    return head.view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, on whatever devices, hold the same bits, as far as checksums tell."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    left, right = tensor_checksums((a, b))
    return left == right


def source(adapters: dict[str, Adapter]) -> int:
    """Checksum of everything an adapter folds from."""
    values = [t.detach() for adapter in adapters.values() for t in (*adapter.parameters(), *adapter.buffers())]
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for value in values:  # few sums over many values instead of many over few
        by_kind.setdefault((value.dtype, value.device), []).append(value.flatten())
    return sum(tensor_checksums(torch.cat(group) for group in by_kind.values()))


def keep(model: nn.Module, state: State, limit: int) -> None:
    """Keep the folded weights of the merged adapter, at most ``limit`` adapters' in all, the latest ones."""
    assert state.merged is not None
    record, name = state.records[state.merged], state.merged
    values = {key: t for key in state.folded if (t := get_tensor(model, key)) is not None}
    now = {key: (t.dtype, t.device) for key, t in values.items()}
    before = [(v.dtype, v.device, now.get(key)) for k in state.kept.values() for key, v in k.values.items()]
    if any(here is not None and (dtype, device) != here for dtype, device, here in before):
        state.kept = {}  # the model was cast or moved: what was folded before has another rounding
    kept = state.kept.pop(name, None)
    cast = any(base is not None and base.dtype != now[key][0] for key, base in state.unfolded.items())
    # Tensors that an adapter also trains in place have values of its own under the fold: those are folded anew.
    if limit and values and not cast and not set(record.owned) & values.keys():
        if kept is None or kept.source != state.source:
            copies = {key: t.detach().clone() for key, t in values.items()}
            kept = Kept(copies, dict(state.unfolded), dict(state.folded), state.source)
        state.kept[name] = kept
    while len(state.kept) > limit:
        del state.kept[next(iter(state.kept))]


def find(model: nn.Module, state: State, name: str) -> Kept | None:
    """The kept folded weights of ``name`` if they are still right, for a merged model with nothing changed."""
    kept = state.kept.get(name)
    if kept is None or kept.source != source(state.records[name].parked) or not _base_unchanged(model, state, kept):
        state.kept.pop(name, None)
        return None
    return kept


def _base_unchanged(model: nn.Module, state: State, kept: Kept) -> bool:
    """Layers that the merged adapter does not fold into may have been changed: then they must be folded anew."""
    assert state.merged is not None
    owned = state.records[state.merged].owned
    for name, before in kept.unfolded.items():
        if name in owned:
            now = state.base[name]
        else:
            now = state.unfolded[name] if name in state.unfolded else get_tensor(model, name)
        if now is not before and (now is None or before is None or not same_bits(now, before)):
            return False
    return True
