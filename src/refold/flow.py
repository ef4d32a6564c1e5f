"""Which module's result leads to which, as autograd's graph of one forward shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refold.residuals import topological

__all__ = ["Flow", "flow_of"]


@dataclass(frozen=True)
class Flow:
    """How features went from module to module. A result has a number, also where several modules return it.

    Attributes:
        made: module path -> number of its result.
        sources: number -> numbers of the results that it is computed from, with no other between.
        ends: for each tensor that the model returns, the results it is, or is computed from with no other between.
        given: number -> paths of the modules that were given this result, the very tensor, in order.
    """

    made: Mapping[str, int] = field(default_factory=dict)
    sources: Mapping[int, frozenset[int]] = field(default_factory=dict)
    ends: tuple[frozenset[int], ...] = ()
    given: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def leads(self, path: str, to: str) -> bool:
        """Whether the result of the module ``path`` leads to that of ``to``."""
        return path in self.made and to in self.made and self.made[path] in self._behind(self.made[to])

    def _behind(self, number: int) -> set[int]:
        found, pending = {number}, [number]
        while pending:
            new = self.sources[pending.pop()] - found
            found |= new
            pending += new
        return found

    def read_out(self, paths: Iterable[str]) -> set[str]:
        """Those of the modules ``paths`` from whose results the model makes what it returns, past no other of them."""
        wanted = {self.made[path]: path for path in paths if path in self.made}
        seen = set().union(*self.ends)
        found, pending = set(), list(seen)
        while pending:
            number = pending.pop()
            if number in wanted:
                found.add(wanted[number])
                continue
            new = self.sources[number] - seen
            seen |= new
            pending += new
        return found

    def readers(self, path: str) -> tuple[str, ...]:
        """The modules that were given the result of ``path``, in order."""
        return self.given.get(self.made.get(path, -1), ())


def flow_of(outputs: Sequence[Any], given: Mapping[Any, Sequence[str]], first: Mapping[str, Any]) -> Flow:
    """The flow of a forward.

    Args:
        outputs: autograd nodes of the tensors that the model returned.
        given: node -> paths of the modules that were given its result, in the order of their calls.
        first: module path -> node of the first tensor that it returned.
    """
    numbers = {node: number for number, node in enumerate(dict.fromkeys(first.values()))}
    behind: dict[Any, frozenset[int]] = {}  # node -> the results right behind it
    for node in topological({*outputs, *numbers}):
        before = (source for source, _ in node.next_functions if source is not None)
        nearest = ({numbers[source]} if source in numbers else behind[source] for source in before)
        behind[node] = frozenset().union(*nearest)
    return Flow(
        {path: numbers[node] for path, node in first.items()},
        {number: behind[node] for node, number in numbers.items()},
        tuple(frozenset({numbers[node]}) if node in numbers else behind[node] for node in outputs),
        {number: tuple(given.get(node, ())) for node, number in numbers.items()},
    )
