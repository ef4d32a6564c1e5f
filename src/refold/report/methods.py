"""What is said of a method, in its docstrings and in tables: for the terminal and for the pages in docs/methods."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, dataclass, fields

from refold.bench.shelf import BACKBONES, Cost
from refold.methods import METHODS, Method

__all__ = ["Page", "Parameter", "extra", "link", "merges", "page", "parameters"]

_USE = "Use it"


@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter: its name, default as code, and what it is."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Page:
    """A method's docstrings, taken apart.

    Attributes:
        header: paragraphs of its file's header; a formula is one of lines that begin with four spaces.
        about: paragraphs of the class's docstring, without its sections.
        use: when to use it; "" if the docstring does not say.
        parameters: in the order of the class.
    """

    header: tuple[str, ...]
    about: tuple[str, ...]
    use: str
    parameters: tuple[Parameter, ...]


def page(method: type[Method]) -> Page:
    """The docstrings of a method and of its file."""
    paragraphs = _paragraphs(inspect.getdoc(method) or "")
    use = [p for p in paragraphs if p.startswith(_USE)]
    about = [p for p in paragraphs if p not in use and not re.match(r"(Args|Raises|Attributes):\n", p)]
    meanings = _arguments(method)
    known = tuple(
        Parameter(f.name, "" if f.default is MISSING else repr(f.default), meanings.get(f.name, ""))
        for f in fields(method)
    )
    return Page(tuple(_header(method)), tuple(about), " ".join(" ".join(use).split()), known)


def _paragraphs(text: str) -> list[str]:
    """Parts between blank lines, with roles such as ``:class:`` taken off names."""
    plain = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text)
    return [part.strip("\n") for part in re.split(r"\n\s*\n", plain) if part.strip()]


def _header(method: type[Method]) -> list[str]:
    """The file's header; of a list of methods only the item about this one."""
    others, kept = METHODS.keys() - {method.__name__}, []
    for paragraph in _paragraphs(inspect.cleandoc(sys.modules[method.__module__].__doc__ or "")):
        items = re.split(r"\n(?=\* )", paragraph)
        kept.append("\n".join(i for i in items if not any(i.startswith(f"* ``{name}``") for name in others)))
    return [paragraph for paragraph in kept if paragraph]


def _arguments(method: type[Method]) -> dict[str, str]:
    """Hyper-parameter -> what the ``Args:`` of the class, or of a class it derives from, say."""
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        for paragraph in _paragraphs(inspect.cleandoc(cls.__doc__ or "")):
            if paragraph.startswith("Args:\n"):
                lines = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", paragraph, re.MULTILINE)
                found |= {name: " ".join(text.split()) for names, text in lines for name in names.split(", ")}
    return found


# -- cells of tables ----------------------------------------------------------------------------------------------


def merges(method: Method) -> str:
    """Whether it folds into the backbone: ``"yes"``, ``"no"``, on which condition, or that it trains it in place."""
    if type(method).build is Method.build:
        return "in place"
    return "yes" if method.mergeable else method.folds


def parameters(cost: Cost | None) -> str:
    """Trainable values beside the head, and where they were counted if not on the first of the backbones."""
    if cost is None:
        return "-"
    first = next(iter(BACKBONES))
    return f"{cost.parameters:,}" + ("" if cost.backbone == first else f" ({BACKBONES[cost.backbone]})")


def extra(method: Method, cost: Cost | None) -> str:
    """Operations added at inference, merged where the method merges."""
    if method.mergeable:
        return "none"
    return "-" if cost is None or cost.extra is None else f"+{100 * cost.extra:.2g} %"


def link(paper: str) -> str:
    """The address of ``"arXiv 2302.08106"``; "" for what has no such number."""
    number = re.search(r"arXiv (\d{4}\.\d{4,5})", paper)
    return f"https://arxiv.org/abs/{number[1]}" if number else ""
