"""GLoRA's map: weight and bias are multiplied and added to, and a prompt goes through the weight into the bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from refold.adapters.base import WeightAdapter, widened

__all__ = ["PATHS", "Modulated"]

#: Name of a path -> the forms it can take.
PATHS: dict[str, tuple[str, ...]] = {
    "a": ("lora", "vector", "scalar"),
    "b": ("lora", "vector", "scalar"),
    "c": ("lora", "vector"),
    "d": ("vector", "scalar"),
    "e": ("vector", "scalar"),
}


class _Path(nn.Module):
    """A tensor of the given shape, zero at the start: a product of two factors, one value a row, or one in all."""

    def __init__(
        self,
        form: str,
        shape: tuple[int, ...],
        rank: int,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.dims = len(shape)
        factory = {"device": device, "dtype": dtype}
        rows = {"lora": (shape[0], rank), "vector": (shape[0],), "scalar": (1,)}[form]
        self.rows = nn.Parameter(torch.zeros(rows, **factory))
        self.columns = None
        if form == "lora":
            # A vector's second factor is (rank, 1).
            columns = torch.empty(rank, *(shape[1:] or (1,)), **factory)
            self.columns = nn.Parameter(nn.init.xavier_uniform_(columns))

    def value(self, like: Tensor) -> Tensor:
        """The tensor, or one that broadcasts to its shape."""
        rows = self.rows.to(like)
        if self.columns is None:
            return rows.view(-1, *[1] * (self.dims - 1))
        product = torch.einsum("or,r...->o...", rows, self.columns.to(like))
        return product.flatten() if self.dims == 1 else product


class Modulated(WeightAdapter):
    """``W + W * A + B``, ``b + b * D + E + W c``, products with * entry by entry.

    Each path is a product of two factors of rank r ("lora": the first zero, the second Xavier-uniform), one value for
    each row ("vector") or one in all ("scalar"), zero at the start. In a convolution A and B have its kernel, and
    ``W c`` sums over it.

    Args:
        weight_shape: (out, in / groups, *kernel).
        paths: the paths to build, of :data:`PATHS`, and their forms.
        channel_dim: position of the channels in the layer's output, from the end.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        rank: int,
        paths: Mapping[str, str],
        *,
        channel_dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        out, inside = weight_shape[:1], weight_shape[1:2]
        shapes = {"a": weight_shape, "b": weight_shape, "c": inside, "d": out, "e": out}
        self.paths = nn.ModuleDict(
            {name: _Path(form, shapes[name], rank, device, dtype) for name, form in paths.items()}
        )

    def reparameterize(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        wide = widened(weight, self)
        values = {name: path.value(wide) for name, path in self.paths.items() if isinstance(path, _Path)}
        a, b, c, d, e = map(values.get, PATHS)
        moved = wide if a is None else wide + wide * a
        moved = moved if b is None else moved + b
        if c is None and d is None and e is None:
            return moved.to(weight.dtype), bias
        shift = wide.new_zeros(len(wide)) if bias is None else bias.to(wide)
        shift = shift if d is None else shift + shift * d
        shift = shift if e is None else shift + e
        if c is not None:
            shift = shift + (wide.flatten(2).sum(-1) if wide.dim() > 2 else wide) @ c
        return moved.to(weight.dtype), shift.to(weight.dtype)

    def extra_repr(self) -> str:
        return ", ".join(self.paths)
