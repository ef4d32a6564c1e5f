"""Seeded, stratified splits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from refold.data.randomness import generator
from refold.errors import DataError

__all__ = ["stratified_split"]

_REMEDY = "Give shares that sum to at most 1, or counts; None once for all the rest"
_QUANTILES = 10


def stratified_split(targets: Tensor, sizes: Sequence[float | None], seed: int = 0) -> tuple[Tensor, ...]:
    """Split N samples at random into disjoint parts that resemble each other.

    Each class is spread over the parts in proportion, to within one or two samples, and the sizes are met exactly.
    Samples are put in an order in which every stretch holds the classes in proportion; the order is then cut. One
    sample of each class comes first of all: the first part, the training set, knows every class, and a class of a
    single sample is in it.

    What counts as a class: the class index; for multi-label targets the rarest label that a sample has; for numbers
    the decile.

    Args:
        targets: (N,) class indices, (N, K) zeros and ones, or (N,) floating-point numbers.
        sizes: one for each part: shares (any float among them, or a sum of at most 1) or counts. None, once, is all
            that the others leave. What no part takes is left out.
        seed: the same seed gives the same split.

    Returns:
        for each part, the sorted indices of its samples, int64.

    Raises:
        DataError: sizes that do not fit, or a first part with fewer samples than there are classes.
    """
    counts = _counts(len(targets), sizes)
    strata = _strata(targets)
    random = generator(seed, 0, "split")
    order = torch.randperm(len(targets), generator=random)
    order = order[torch.argsort(strata[order], stable=True)]  # by class, at random within it
    per_class = torch.bincount(strata)
    first = per_class.cumsum(0) - per_class
    rank = torch.arange(len(targets)) - first[strata[order]]
    place = torch.where(rank == 0, 0.0, (rank + 0.5) / per_class[strata[order]])
    shuffled = torch.randperm(len(targets), generator=random)  # equal places of different classes: at random
    order = order[shuffled][torch.argsort(place[shuffled], stable=True)]
    classes = int((per_class > 0).sum())
    if not targets.is_floating_point() and 0 < counts[0] < classes:
        raise DataError(
            f"{counts[0]} images cannot hold one of each of {classes} classes",
            where="fractions",
            remedy="Enlarge the first part",
        )
    ends = list(accumulate(counts, initial=0))
    return tuple(order[start:end].sort().values for start, end in pairwise(ends))


def _counts(total: int, sizes: Sequence[float | None]) -> list[int]:
    """``sizes`` as counts; each share that is not zero gets at least one sample."""
    given = [size for size in sizes if size is not None]
    where = f"fractions {tuple(sizes)}"
    if any(not 0 <= size < float("inf") for size in given) or len(sizes) - len(given) > 1 or not sizes:
        raise DataError("are no sizes of splits", where=where, remedy=_REMEDY)
    if all(isinstance(size, int) for size in given) and sum(given) > 1:
        taken = {k: int(size) for k, size in enumerate(sizes) if size is not None}
    elif sum(given) <= 1 + 1e-9:
        ends = [round(total * share) for share in accumulate((size or 0.0 for size in sizes), initial=0.0)]
        taken = {k: ends[k + 1] - ends[k] for k, size in enumerate(sizes) if size is not None}
    else:
        raise DataError("are more than all", where=where, remedy=_REMEDY)
    rest = total - sum(taken.values())
    counts = [taken.get(k, rest) for k in range(len(sizes))]
    if rest < 0:
        raise DataError(f"ask for {sum(taken.values())} of {total} images", where=where, remedy=_REMEDY)
    if any(size and not count for size, count in zip(sizes, counts, strict=True)):
        raise DataError(f"leave a part of {total} images empty", where=where, remedy=_REMEDY)
    return counts


def _strata(targets: Tensor) -> Tensor:
    """(N,) int64, a small number for each sample."""
    if targets.ndim == 2:
        frequency = targets.sum(0)
        rarity = torch.where(targets > 0, frequency, torch.inf)
        none = torch.full((len(targets), 1), len(targets) + 1.0)  # the stratum of samples without a label
        return torch.cat([rarity, none.to(rarity)], dim=1).argmin(dim=1)
    if targets.is_floating_point():
        rank = torch.argsort(torch.argsort(targets, stable=True))
        return rank * _QUANTILES // max(len(targets), 1)
    return torch.unique(targets, return_inverse=True)[1]
