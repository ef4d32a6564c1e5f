"""Measuring what adapting and serving cost: time, stored activations, memory, operations."""

from __future__ import annotations

__all__: list[str] = []
