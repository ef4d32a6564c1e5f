"""What the benchmarks share: models, one results format, and markdown tables."""

from __future__ import annotations

import fcntl
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refold.bench import measure
from refold.training.attention import attention_kernel

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Move every trainable tensor away from its start, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def training_forward(model: nn.Module, images: Tensor, targets: Tensor, low: bool) -> Callable[[], Tensor]:
    """The loss of one batch; ``low`` under autocast to bfloat16."""

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if low else nullcontext():
            logits = model(images)
        return nn.functional.cross_entropy(logits.float(), targets)

    return forward


def training_step(model: nn.Module, forward: Callable[[], Tensor], kernel: str) -> Callable[[], None]:
    """Forward and backward under an attention kernel; gradients do not pile up."""

    def run() -> None:
        with attention_kernel(kernel):
            forward().backward()
        model.zero_grad(set_to_none=True)

    return run


@contextmanager
def claim(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold a piece of work while it is done: whether no other process holds it; ``wait`` until none does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))  # the system frees it when we end
        except BlockingIOError:
            yield False
        else:
            yield True


def slug(text: str) -> str:
    """Its part of a file's name."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


def write(name: str, rows: Iterable[dict[str, Any]], **facts: Any) -> Path:
    """``results/NAME.json``: the command, the environment, whatever else is known, and one object a row."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = " ".join(["python", *sys.argv])
    content = {"command": command, "environment": measure.environment(), **facts, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def remarks(page: Path) -> list[str]:
    """What is said of a page's numbers by hand, in ``PAGE.remarks.md`` beside it, if anything is."""
    path = page.with_suffix(".remarks.md")
    return [path.read_text().strip()] if path.exists() else []


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
