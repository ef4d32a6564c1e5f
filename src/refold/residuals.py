"""Residual branches, found by what a forward does: wherever ``stream + f(stream)`` is computed, f is one.

No name and no type is needed: in autograd's graph of a forward, a sum is residual if one of its operands is computed
from the other. The modules that read the stream and that give the branch's result are where side adapters connect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Branch", "residual_branches", "topological"]

_ADD = "AddBackward0"


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        source: path of a module that reads the stream, "" if none does.
        entry: the same if it is the first part of the branch itself, else "".
        exit: path of the module whose output is added to the stream, "" if no module gives it.
        inside: paths of all modules whose output the branch is made of, in the order in which they return.
        role: the name of the place in the papers, "" if none is known.
    """

    source: str
    entry: str
    exit: str
    inside: tuple[str, ...]
    role: str = ""


def residual_branches(
    outputs: Iterable[Any],
    reads: Mapping[Any, Sequence[str]],
    makes: Mapping[Any, Sequence[str]],
    leaves: frozenset[str],
) -> list[Branch]:
    """The residual branches of a forward, in the order of their sums.

    Args:
        outputs: autograd nodes of what the model returned.
        reads: node -> paths of the modules that were given its result, in the order of their calls.
        makes: node -> paths of the modules that returned its result, in the order of their returns.
        leaves: paths of the modules called once in which no other ran, preferred as entry and exit.
    """
    order = topological(outputs)
    position = {node: index for index, node in enumerate(order)}
    returned = {path: number for number, path in enumerate(dict.fromkeys(p for ps in makes.values() for p in ps))}
    streams: dict[Any, Any] = {}  # residual sum -> the stream it belongs to
    branches = []
    for node in order:
        operands = [source for source, _ in node.next_functions if source is not None]
        if node.name() != _ADD or len(operands) != 2:
            continue
        near, far = sorted(operands, key=position.__getitem__)
        # x + a(x) + b(x) is two sums: the second one's first operand is no input of b, the stream before it is.
        for stream, end in ((near, far), (streams.get(near), far), (streams.get(far), near)):
            between = None if stream is None else _between(stream, end, position)
            if between:
                streams[node] = stream
                branches.append(_branch(stream, end, between, reads, makes, leaves, returned))
                break
    return [branch for branch in branches if branch.inside]


def topological(outputs: Iterable[Any]) -> list[Any]:
    """Every autograd node behind ``outputs``, sources before what is computed from them."""
    order, state = [], dict.fromkeys(outputs, False)
    pending = list(state)
    while pending:
        node = pending.pop()
        if state.get(node):
            continue
        later = [source for source, _ in node.next_functions if source is not None and source not in state]
        if later:
            state.update(dict.fromkeys(later, False))
            pending += [node, *later]
            continue
        waiting = [s for s, _ in node.next_functions if s is not None and not state[s]]
        if waiting:  # pushed by another node and not finished yet
            pending += [node, *waiting]
            continue
        state[node] = True
        order.append(node)
    return order


def _between(stream: Any, end: Any, position: Mapping[Any, int]) -> set[Any]:
    """The nodes through which ``end`` is computed from ``stream``, ``end`` included; empty if it is not."""
    first, seen, pending = position[stream], {end}, [end]
    while pending:
        for source, _ in pending.pop().next_functions:
            if source is not None and source not in seen and position[source] > first:
                seen.add(source)
                pending.append(source)
    reached = {stream}
    for node in sorted(seen, key=position.__getitem__):
        if any(source in reached for source, _ in node.next_functions):
            reached.add(node)
    return reached - {stream} if end in reached else set()


def _branch(
    stream: Any,
    end: Any,
    between: set[Any],
    reads: Mapping[Any, Sequence[str]],
    makes: Mapping[Any, Sequence[str]],
    leaves: frozenset[str],
    returned: Mapping[str, int],
) -> Branch:
    inside = sorted({path for node in between for path in makes.get(node, ())}, key=returned.__getitem__)
    readers = list(reads.get(stream, ()))
    entry = _preferred([path for path in readers if path in inside], leaves)
    # The last: what acts in training alone, dropout and stochastic depth, is inside the branch.
    last = _preferred(makes.get(end, ())[::-1], leaves)
    return Branch(entry or _preferred(readers, leaves), entry, last, tuple(inside))


def _preferred(paths: Sequence[str], leaves: frozenset[str]) -> str:
    """The first leaf, else the first: a layer holds adapters in any backbone, a container may call its children."""
    return next((p for p in paths if p in leaves), paths[0] if paths else "")
