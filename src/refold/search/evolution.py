"""The evolutionary search of NOAH: the best so far are mutated and crossed, and what comes out is scored.

After a population of random sub-nets, each generation is as many again: half mutations of one of the best, half
crossings of two, all under the cap. No sub-net is scored twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from refold.search.space import Sizes, Space

__all__ = ["Candidate", "evolve"]

_TRIES = 100  # new sub-nets drawn in vain before the space counts as exhausted


@dataclass(frozen=True)
class Candidate:
    """A scored sub-net.

    Attributes:
        sizes: of its adapters, in the order of the space's places.
        parameters: beside the head.
        metrics: on the validation split.
        worth: what the search maximises, most important first.
    """

    sizes: Sizes
    parameters: int
    metrics: dict[str, float]
    worth: tuple[float, ...]


def evolve(
    space: Space,
    score: Callable[[Sizes], Candidate],
    *,
    evaluations: int,
    population: int = 50,
    parents: int = 10,
    mutation: float = 0.2,
    seed: int = 0,
) -> list[Candidate]:
    """Score sub-nets until ``evaluations`` are known or no new one is found; all of them, in their order.

    The same seed and scores give the same sub-nets.

    Args:
        space: what to search.
        score: called once for each sub-net.
        population: sub-nets of a generation.
        parents: the best so far, from which the next generation comes.
        mutation: the probability with which a mutation draws each size anew.
    """
    random = Random(seed)
    scored: dict[Sizes, Candidate] = {}
    best: list[Candidate] = []
    while len(scored) < evaluations:
        if len(scored) % population == 0:
            best = sorted(scored.values(), key=lambda c: c.worth, reverse=True)[:parents]
        child = _new(space, best, len(scored), mutation, scored, random)
        if child is None:
            break
        scored[child] = score(child)
    return list(scored.values())


def _new(
    space: Space, best: list[Candidate], number: int, mutation: float, known: dict[Sizes, Candidate], random: Random
) -> Sizes | None:
    """A sub-net that is not known yet; after many vain tries any random one, None if there is none."""
    for attempt in range(2 * _TRIES):
        if not best or attempt >= _TRIES:
            child = space.sample(random)
        elif number % 2:
            child = _crossed(space, random.choice(best).sizes, random.choice(best).sizes, random)
        else:
            child = _mutated(space, random.choice(best).sizes, mutation, random)
        if child not in known:
            return child
    return None


def _mutated(space: Space, sizes: Sizes, probability: float, random: Random) -> Sizes:
    pairs = zip(space.places, sizes, strict=True)
    drawn = [random.choice(p.choices) if random.random() < probability else size for p, size in pairs]
    return space.fitted(drawn, random)


def _crossed(space: Space, one: Sizes, other: Sizes, random: Random) -> Sizes:
    return space.fitted([random.choice(pair) for pair in zip(one, other, strict=True)], random)
