"""What a run did, for people: the self-contained HTML page, tables for the terminal, figures."""

from __future__ import annotations

from refold.report.html import write_report

__all__ = ["write_report"]
