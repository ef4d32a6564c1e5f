"""Search over the sizes of a composition's adapters."""

from __future__ import annotations

from refold.search.evolution import Candidate, evolve
from refold.search.run import Found, noah
from refold.search.space import Sizes, Space
from refold.search.supernet import SuperNet

__all__ = ["Candidate", "Found", "Sizes", "Space", "SuperNet", "evolve", "noah"]
